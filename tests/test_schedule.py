"""Schedules run every sequence once, within their limits, and go on from caches only where that runs fewer tokens."""

from itertools import pairwise

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_edit.activations import batches as schedule
from peft_edit.activations.batches import make_schedule
from peft_edit.activations.run import Plan
from peft_edit.activations.sequences import SequenceTable
from peft_edit.models.run import batches_within


@st.composite
def questions(draw):
    """Prompts, each with answers."""
    token = st.integers(1, 4)
    prompts = st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=6)
    answers = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=5)
    return [(prompt, draw(answers)) for prompt in draw(prompts)]


def table_of(questions, tokens="answer"):
    table = SequenceTable()
    for group, (prompt, answers) in enumerate(questions):
        for answer in answers:
            ids = prompt + answer
            table.add(ids, len(prompt) if tokens == "answer" else len(ids) - 1, len(ids), group)
    return table


def plan_of(table, **arguments):
    """The plan that an index with this schedule holds."""
    found = make_schedule(table, **{"share": True, "batch_size": None, "max_tokens": 64} | arguments)
    order = numpy.array(found.order)
    spans = numpy.stack((table.starts, table.stops), axis=1)[order]
    rows = spans[:, 1] - spans[:, 0]
    index = {
        "token_ids": numpy.concatenate([table.ids(i) for i in order]),
        "sequence_lengths": table.lengths()[order],
        "spans": spans,
    }
    tensors = {name: schedule.torch.from_numpy(values) for name, values in index.items()}
    return Plan(tensors | found.tensors(rows, row_bytes=8), "answer"), found


@given(st.lists(st.integers(1, 20), max_size=30), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 60))
def test_batches_are_consecutive_and_within_their_limits(lengths, batch_size, max_tokens):
    lengths = sorted(lengths, reverse=True)
    found = list(batches_within(lengths, batch_size, max_tokens))
    assert [i for batch in found for i in batch] == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= (batch_size or len(batch))
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= max_tokens
    for batch, following in pairwise(found):  # no batch could have taken one more
        more = len(batch) + 1
        assert more > (batch_size or more) or more * lengths[batch[0]] > max_tokens or not following


@given(
    questions(), st.sampled_from([None, 1, 2, 3]), st.integers(1, 80), st.integers(0, 6), st.sampled_from([1, 3, 99])
)
def test_a_plan_runs_every_sequence_once(questions, batch_size, max_tokens, forward, shard):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "FORWARD_TOKENS", forward)
        patch.setattr(schedule, "SHARD_SEQUENCES", shard)
        table = table_of(questions)
        plan, found = plan_of(table, batch_size=batch_size, max_tokens=max_tokens)
    unique = {(tuple(prompt + answer), len(prompt)) for prompt, answers in questions for answer in answers}
    assert sorted(found.order) == list(range(len(unique))) == list(range(len(plan)))
    assert {(tuple(plan.ids(i).tolist()), plan.span(i)[0]) for i in range(len(plan))} == unique

    every = [batch for batches in plan.batches for batch in batches]
    assert [i for batch in every for i in batch.sequences] == list(range(len(plan)))
    assert sum(shard.rows for shard in plan.shards) == sum(map(plan.rows, range(len(plan))))
    assert [shard.sequences for shard in plan.shards] == [sum(len(b.sequences) for b in bs) for bs in plan.batches]
    for batch in every:
        common, cut = plan.cuts[batch.bucket]
        prompts = plan.prompts(batch.bucket)
        assert 0 <= common <= cut and (cut == 0 or len(prompts) * cut <= max_tokens or len(prompts) == 1)
        assert len({prompt[:common] for prompt in prompts}) == 1
        assert len(batch.sequences) <= (batch_size or len(plan)) and len(prompts) <= max(batch_size or len(plan), 1)
        lengths = [len(plan.ids(i)) for i in batch.sequences]
        assert lengths == sorted(lengths, reverse=True)
        assert len(lengths) == 1 or len(lengths) * lengths[0] <= max_tokens
        for i in batch.sequences:
            assert plan.prompt(i, batch.bucket) in prompts and cut <= plan.span(i)[0]
    assert all(held.sequences >= shard for held in plan.shards[:-1])


@given(questions(), st.integers(0, 30))
def test_the_cost_is_what_is_run(questions, forward):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "FORWARD_TOKENS", forward)
        table = table_of(questions)
        plan, found = plan_of(table)
        plain = make_schedule(table, share=False, batch_size=None, max_tokens=64)
    assert plain.bucket_cuts == [(0, 0)] and found.cost <= plain.cost
    cost = 0
    for bucket, (common, cut) in enumerate(plan.cuts):
        if cut:
            cost += forward + len(plan.prompts(bucket)) * (cut - common) + (forward + common if common else 0)
    for batch in (batch for batches in plan.batches for batch in batches):
        cost += forward + len(batch.sequences) * (len(plan.ids(batch.sequences[0])) - plan.cuts[batch.bucket][1])
    assert found.cost == cost


def test_long_prompts_with_many_answers_are_run_once_and_their_beginning_once_for_all():
    examples = list(range(1000, 1400))
    questions = [([*examples, *[q] * 60], [[q, a] for a in range(8)]) for q in range(20)]
    plan, found = plan_of(table_of(questions), max_tokens=8192)
    assert {tuple(cuts) for cuts in plan.cuts} == {(400, 460)}
    assert found.cost < 0.1 * make_schedule(table_of(questions), share=False, batch_size=None, max_tokens=8192).cost


def test_short_prompts_with_one_answer_each_are_run_plainly():
    plan, _ = plan_of(table_of([([q, 5], [[q, 7]]) for q in range(40)]), max_tokens=8192)
    assert plan.cuts == [[0, 0]]


def test_the_schedule_of_one_row_an_answer_shares_what_the_answers_begin_with():
    questions = [([1] * 300, [[7, 8, 9], [7, 8, 10], [7, 11, 12]])]
    plan, _ = plan_of(table_of(questions, tokens="last"))
    assert plan.cuts == [[0, 301]]
