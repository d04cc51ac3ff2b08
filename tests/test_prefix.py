"""Passes that begin at a later block give what whole passes give, and run that many blocks fewer."""

from collections import Counter

import pytest
import torch
from edits import EDITS, at, edited_model, layers_of
from test_collect import TOKENIZER, contrast, text
from test_evaluation import VARIANTS, sharp
from tiny import tiny_model

from peft_edit import evaluate_multiple_choice
from peft_edit.choosing.sharing import SharedPasses, most_useful
from peft_edit.evaluation.texts import text_batches
from peft_edit.models.prefix import SharedPrefix, reproducing
from peft_edit.models.run import inference
from peft_edit.models.sites import decoder_blocks, unwrap


TEXTS = [text(ids) for ids in ([5, 6, 7, 8, 9, 10], [6, 7, 5], [12, 11, 10, 9, 8])]
BLOCKS = 3  # of the tiny models


def scores(model, **options):
    result = evaluate_multiple_choice(model, TOKENIZER, contrast(), batch_size=3, **options)
    return torch.tensor([score for question in result.questions for score in question.log_likelihoods.values()])


def text_logits(model):
    with inference(model):
        return torch.cat([batch.predict(model)[0] for batch in text_batches(model, TOKENIZER, TEXTS, 2, "it")])


@pytest.mark.parametrize("run", [scores, text_logits])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_model_gives_the_same(variant, run):
    family, changes = VARIANTS[variant]
    model = sharp(tiny_model(family, **changes))
    expected = run(model)
    prefix = SharedPrefix(model, range(BLOCKS + 1))
    with prefix.recording():
        assert torch.equal(run(model), expected)
    whole = prefix.block_tokens
    for skip in range(BLOCKS + 1):
        before = prefix.block_tokens
        with prefix.skipping(skip):
            assert torch.equal(run(model), expected)
        assert (prefix.block_tokens - before) * BLOCKS == whole * (BLOCKS - skip)
    assert not any("forward" in vars(block) for block in prefix.blocks)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_edits_of_later_blocks_give_the_same(edit, family):
    model = edited_model(edit, family, layers_to_transform=1)
    bare = unwrap(model)
    prefix = SharedPrefix(bare, range(BLOCKS + 1))
    with model.disable_adapter(), prefix.recording():
        scores(model)
    expected = scores(model)
    for skip in range(2 + (at(edit) == "block")):
        with prefix.skipping(skip):
            assert torch.equal(scores(model), expected)
    assert len(layers_of(model)) == 1


def test_every_block_that_is_skipped_is_not_run():
    model = tiny_model()
    prefix = SharedPrefix(model, [2])
    ran = []
    for index, name in decoder_blocks(model).items():
        attention = model.get_submodule(name).self_attn
        attention.register_forward_hook(lambda *_, index=index: ran.append(index))
    with prefix.recording():
        text_logits(model)
    assert ran == [0, 1, 2, 0, 1, 2]
    ran.clear()
    with prefix.skipping(2):
        text_logits(model)
    assert ran == [2, 2]


def test_passes_may_begin_at_a_later_one_and_must_be_of_the_same_size():
    model = tiny_model()
    first, second = text_batches(model, TOKENIZER, TEXTS, 2, "it")
    prefix = SharedPrefix(model, [1])
    with inference(model):
        with prefix.recording():
            first.predict(model)
            expected, _ = second.predict(model)
        with prefix.skipping(1, first=1):
            assert torch.equal(second.predict(model)[0], expected)
        with prefix.skipping(1), pytest.raises(RuntimeError, match="follows one over"):
            second.predict(model)
    assert not any("forward" in vars(block) for block in prefix.blocks)


def whispering(model):
    """A model whose second block tells the third something besides its output."""
    second, third = (model.get_submodule(decoder_blocks(model)[index]) for index in (1, 2))
    forward_second, forward_third = second.mlp.forward, third.mlp.forward
    told = []

    def tell(x):
        told.append(x.mean())
        return forward_second(x)

    second.mlp.forward = tell
    third.mlp.forward = lambda x: forward_third(x) * (1 + told.pop())
    return model


def test_models_that_hand_more_from_block_to_block_are_run_from_further_down(caplog):
    model = whispering(tiny_model())
    found = reproducing(SharedPrefix(model, [1, 2]), lambda: text_logits(model), 1e-6)
    assert set(found) == {1}
    passes = SharedPasses(model, [2, 2, 1], run=lambda: text_logits(model), samples=1.0, memory=2**20)
    assert "hands more from block to block" in caplog.text and "its first 2 blocks" in caplog.text
    with passes.recording():
        expected = text_logits(model)
    with passes.skipping(2):
        assert torch.equal(text_logits(model), expected)


def test_what_is_kept_fits_the_memory():
    model = tiny_model()
    size = reproducing(SharedPrefix(model, [1]), lambda: text_logits(model), 1e-6)[1]
    for memory, kept in ((2 * size, [1, 2]), (2 * size - 1, [2]), (size - 1, [])):
        passes = SharedPasses(model, [1, 2, 2, 0], run=lambda: text_logits(model), samples=1.0, memory=memory)
        with passes.recording():
            text_logits(model)
        assert [passes._prefix.usable(need) for need in (0, 1, 2)] == [0, 1 in kept, 2 if 2 in kept else 1 in kept]


def test_the_most_useful_are_kept():
    assert most_useful(Counter({1: 1, 5: 1, 9: 10}), [1, 5, 9], 2) == [5, 9]
    assert most_useful(Counter({1: 1, 5: 1, 9: 10}), [1, 5, 9], 1) == [9]
    assert most_useful(Counter({1: 100, 5: 100, 6: 1}), [1, 5, 6], 1) == [5]
    assert most_useful(Counter({7: 3}), [5], 1) == [5]  # 7 itself cannot be left out
