"""The benchmarks: their plain forms of what is published agree with the package, and the runner keeps what it has."""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import agree

from peft_edit import collect_activations, evaluate_multiple_choice
from peft_edit.tuners.hpr.maths import edit as hpr_edit
from peft_edit.tuners.hpr.maths import rotate
from peft_edit.tuners.sea.maths import edit, fit, merge, project


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY))

from examples.benchmarks import __main__ as runner  # noqa: E402
from examples.benchmarks import data, hpr_training, machine, models, published, scaling, timing  # noqa: E402
from examples.benchmarks.fit import demonstrations, projector_distance  # noqa: E402
from examples.benchmarks.report import Bench, Case, Row  # noqa: E402
from examples.benchmarks.timing import Elapsed, Spread, Work, measure  # noqa: E402


CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The plain forms


def test_the_plain_fit_of_sea_finds_the_directions_of_the_package():
    sets = demonstrations(60, 40, CPU)
    found, plain = fit(*sets), published.sea_bases(*sets)
    for spectrum, basis in zip((found.positive, found.negative), plain, strict=True):
        assert len(spectrum.basis) == len(basis)
        assert projector_distance(spectrum.basis, basis) < 1e-9


@pytest.mark.parametrize("rescale", [False, True])
def test_the_plain_edit_of_sea_is_that_of_the_package(rescale):
    bases = [models.orthonormal(5, 24, seed).double() for seed in (0, 1)]
    h, projections = normal(2, 3, 24), [partial(project, basis=basis) for basis in bases]
    expected = edit(h, *projections, rescale="token" if rescale else "none")
    torch.testing.assert_close(published.sea_edit(h, *published.sea_projections(*bases), rescale), expected)


def test_the_plain_merge_of_sea_is_that_of_the_package():
    bases = [models.orthonormal(5, 24, seed).double() for seed in (0, 1)]
    weight, projections = normal(24, 7), [partial(project, basis=basis, columns=True) for basis in bases]
    plain = published.sea_merge(weight, *published.sea_projections(*bases))
    torch.testing.assert_close(plain, merge(weight, *projections, rescale="none"))


def test_the_plain_rotation_of_hpr_is_that_of_the_package():
    a, w = normal(4, 3, 16), normal(16, seed=1)
    angles, reflection = normal(4, 3, seed=2).sigmoid(), published.householder(w)
    # The quotient of equation 12 rotates away from the normal where a reflection would.
    away = torch.where((a @ w <= 0).unsqueeze(-1), a, -a)
    torch.testing.assert_close(published.hpr_rotate(away, angles, reflection), rotate(away, w, angles))

    def angle(tokens):
        return math.pi * torch.sigmoid(tokens.sum(dim=-1))

    torch.testing.assert_close(published.hpr_edit(a, w, angle, reflection), hpr_edit(a, w, angle))


def test_the_plain_training_of_hpr_has_the_losses_of_the_trainer(tmp_path):
    bench, sizes = Bench(CPU, tmp_path, quick=True), hpr_training.Sizes(hidden=16, layers=2, steps=8)
    store, losses = hpr_training.token_pairs(tmp_path / "store", sizes, pairs=64), []
    assert hpr_training.train_loop(bench, sizes, store, losses.extend).cpu > 0
    trainer = hpr_training.make_trainer(bench, sizes, store, hpr_training.PUBLISHED_BATCH, logging=1)
    trainer.train()
    clock = hpr_training.clock_of(trainer)
    assert clock.losses == pytest.approx(losses, rel=1e-4) and len(losses) == sizes.steps
    assert losses[-1] != losses[0] and clock.of_each(1).wall > 0
    layers = [block.hpr for block in hpr_training.fresh_model(sizes).get_base_model().model.layers]
    number = sum(p.numel() for layer in layers for p in layer.parameters())
    biases = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if name.endswith("bias"))
    assert hpr_training.weights(sizes) == number - biases


@pytest.fixture(scope="module")
def subject():
    return data.subjects(Bench(CPU, Path(), quick=True))[0]


def test_plain_scores_are_those_of_the_evaluation(subject):
    model, tokenizer, questions = subject.model(), subject.tokenizer(), subject.data()
    for question, row in zip(evaluate_multiple_choice(model, tokenizer, questions).questions, questions, strict=True):
        assert published.answer_scores(model, tokenizer, row) == pytest.approx(question.log_likelihoods, abs=1e-3)


def test_plain_activations_are_those_of_a_collection(subject, tmp_path):
    model, tokenizer, questions = subject.model(), subject.tokenizer(), subject.data().select([0])
    store = collect_activations(model, tokenizer, questions, tmp_path / "store", site="block", tokens="answer")
    (answer, *_) = published.encoded(tokenizer, questions[0], "positives")
    states = published.answer_states(model, answer)
    collected = store.answer_tokens(1)
    found = (collected.unsqueeze(0) - states[2].unsqueeze(1)).abs().amax(dim=-1).min(dim=1)
    assert len(states[2]) == len(answer.answer_ids) and found.values.max() < 1e-4
    members = 2 * len(questions[0]["positives"]) * len(questions[0]["negatives"])
    assert published.collect_pairs(model, tokenizer, questions) == members
    assert published.collect_pairs(model, tokenizer, questions, once=True) < members


# Models


def test_merging_into_a_model_leaves_those_that_share_its_weights():
    base = models.random_model(models.TINY, CPU, torch.float32)
    ids = torch.arange(8).unsqueeze(0)
    before = base(ids).logits
    merged = models.with_sea(models.sharing(base, own="down_proj"), [1, 2], 4, rescale="none").merge_and_unload()
    assert torch.equal(base(ids).logits, before) and not torch.allclose(merged(ids).logits, before)
    shared = {p.data_ptr() for p in base.parameters()}
    own = [name for name, p in merged.named_parameters() if p.data_ptr() not in shared]
    assert own and all("down_proj" in name for name in own)
    edited = models.with_sea(models.sharing(base), [1, 2], 4, rescale="none")
    agree(edited(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("shape", models.SHAPES, ids=lambda shape: shape.name)
def test_parameters_of_a_shape_are_counted(shape):
    small = shape.of_layers(1)
    number = sum(p.numel() for name, p in models.structure(small.config, torch.float32).named_parameters())
    norms = 3 * shape.hidden
    assert small.parameters == number - norms and small.name == f"{shape.name}, 1 of its {shape.layers} blocks"


def test_the_papers_blocks_are_the_last_ones():
    assert models.last_blocks(32, 21) == list(range(11, 32)) and models.last_blocks(30, 5) == list(range(25, 30))
    assert models.last_blocks(16, 21) == list(range(6, 16)) and models.last_blocks(4, 1) == [3]


# Timing


def test_calls_take_turns_and_slow_ones_run_once():
    calls = []

    def call(name, seconds):
        return lambda: calls.append(name) or Elapsed(seconds, 2 * seconds)

    every = {"a": call("a", 1.0), "b": call("b", 3.0), "slow": call("slow", 10.0)}
    timings = measure(every, CPU, rounds=3, slow=["slow"], in_turns=True)
    assert calls == ["a", "a", "b", "b", "a", "b", "slow", "b", "a", "a", "b"]  # another begins each round
    assert timings.ratio("a", "b", "wall") == Spread(3, 3, 3) and timings.ratio("a", "slow", "cpu").median == 10
    assert timings.spread("b", "cpu").median == 6


def test_short_calls_are_timed_by_several_in_a_row():
    count = 0

    def call():
        nonlocal count
        count += 1

    assert measure({"call": call}, CPU, rounds=4).spread("call", "cpu").median < 1e-3
    assert count > 100
    count = 0
    measure({"call": call}, CPU, rounds=4, in_turns=True)
    assert count == 2 + 4


def test_rounds_end_with_the_budget_but_for_the_least():
    timings = measure({"a": lambda: Elapsed(1, 1)}, CPU, rounds=50, budget=0, in_turns=True)
    assert len(timings.samples["a"].elapsed) == timing.LEAST_ROUNDS


def test_gradients_are_recorded_for_trainings_alone():
    seen = []
    for training in (False, True):
        measure({"a": lambda: seen.append(torch.is_grad_enabled())}, CPU, rounds=1, in_turns=True, training=training)
    assert seen == [False] * 3 + [True] * 3 and torch.is_grad_enabled()


def test_the_limit_is_the_larger_of_bytes_and_products(monkeypatch):
    probes = {
        "reading memory": timing._Probe(lambda: Elapsed(1, 2), amount=100),
        "matrix product": timing._Probe(lambda: Elapsed(3, 4), amount=10),
    }
    monkeypatch.setattr(timing, "_probes", lambda *args: probes)
    call = {"a": lambda: Elapsed(8, 8)}
    for work, wall, cpu in ((Work(200, 10), 3, 4), (Work(400, 10), 4, 8)):
        timings = measure(call, CPU, rounds=3, work=work, in_turns=True)
        assert set(timings.samples) == {"a", timing.LIMIT}
        assert timings.ratio("a", timing.LIMIT, "wall").median == wall / 8
        assert timings.ratio("a", timing.LIMIT, "cpu").median == cpu / 8


def test_memory_is_watched():
    with timing.watched_memory(CPU) as peak:
        kept = torch.ones(2**24)
    assert 0.8 * kept.nbytes < peak.bytes < 3 * kept.nbytes


def test_the_exponent_of_a_power_is_found():
    assert scaling.exponent((1, 3, 10), [5 * size**1.7 for size in (1, 3, 10)]) == pytest.approx(1.7)


# The runner


def run(capsys, *arguments):
    """Exit status, lines on standard output and on standard error."""
    try:
        status = runner.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decodin"], r"there is no benchmark 'decodin': did you mean 'decoding'\? There are fit, edit, .*, scaling"),
        (["xyz"], r"there is no benchmark 'xyz': There are fit, edit"),
        (["--device", "gpu"], r"there is no device 'gpu': did you mean 'cpu'\? There are cpu, cuda$"),
        (["--device", "cud"], r"there is no device 'cud': did you mean 'cuda'\? There are cpu, cuda$"),
        (["--model", "nowhere"], r"nowhere is no folder of a model: it has no config.json"),
        (["--json", "."], r"\. is a folder: pass a file"),
        (
            ["--json", "nowhere/deep/a.json"],
            r"nowhere/deep/a.json cannot be written: pass a file in a folder that exists",
        ),
        (["--plot", "curves.pdf"], r"curves.pdf must end in .png or .svg"),
        (["--minutes", "0"], r"must be a number above 0, got 0"),
        (["loading", "--shape", "none"], r"there is nothing to measure: leave out --shape none"),
        (["--shape", "none", "--shape", "Llama-2-7B"], r"argument --shape: none beside others: give shapes, or none"),
        (["fit", "--plot", "curves.svg"], r"--plot draws the curves of the benchmark scaling: name that too"),
        (["--quik"], r"unrecognized arguments: --quik"),
    ],
    ids=str,
)
def test_wrong_use_is_one_line(capsys, arguments, message):
    status, printed, (line,) = run(capsys, *arguments)
    assert status == 2 and printed == [] and re.search(message, line), line


def test_a_device_that_is_not_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, printed, (line,) = run(capsys, "--device", "cuda")
    assert status == 2 and printed == []
    assert "finds no CUDA device here: take --device cpu, or a machine with a GPU" in line


def of_cases(monkeypatch, *cases):
    """Let every benchmark have these cases."""
    monkeypatch.setattr(runner, "cases_of", lambda name, bench: list(cases))


def row(case="whole", **fields):
    return Row("fit", case, "ours", "theirs", "published", Spread(2, 1, 3), Spread(2, 1, 3), Spread(1, 1, 1), **fields)


def test_an_interrupted_run_keeps_what_was_measured(capsys, monkeypatch, tmp_path):
    def interrupted():
        yield row("first of two")
        raise KeyboardInterrupt

    of_cases(monkeypatch, Case("whole", lambda: [row()]), Case("cut", interrupted), Case("never", lambda: [row("no")]))
    path = tmp_path / "out.json"
    status, printed, errors = run(capsys, "fit", "--json", path)
    assert status == 130 and errors[-1] == f"interrupted: above is what was measured, {path} holds it"
    assert [found["case"] for found in json.loads(path.read_text())["rows"]] == ["whole", "first of two"]
    assert any("first of two" in line for line in printed)


def test_results_are_on_the_disk_after_each_row(capsys, monkeypatch, tmp_path):
    path, seen = tmp_path / "out.json", []

    def looking():
        for number in range(2):
            seen.append(len(json.loads(path.read_text())["rows"]))
            yield row(f"row {number}")

    of_cases(monkeypatch, Case("looking", looking))
    assert run(capsys, "fit", "--json", path)[0] == 0
    found = json.loads(path.read_text())
    assert seen == [0, 1] and len(found["rows"]) == 2
    assert found["machine"]["threads"] == torch.get_num_threads() and found["settings"]["names"] == ["fit"]


def test_what_does_not_fit_is_skipped_and_the_rest_goes_on(capsys, monkeypatch, tmp_path):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        yield

    never = Case("7B", lambda: pytest.fail("it does not fit"), needs=1e15)
    of_cases(monkeypatch, never, Case("8B", too_large), Case("whole", lambda: [row()]))
    path = tmp_path / "out.json"
    status, printed, _ = run(capsys, "fit", "--json", path)
    first, second, third = json.loads(path.read_text())["rows"]
    assert status == 0 and third["case"] == "whole"
    assert first["skipped"].startswith("needs 1000000.0 GB of memory, ") and first["skipped"].endswith("GB are free")
    assert second["skipped"] == "CUDA out of memory. Tried to allocate"
    assert any("| 7B |" in line and "skipped: needs 1000000.0 GB of memory" in line for line in printed)


def test_wrong_use_leaves_old_results(capsys, tmp_path):
    path = tmp_path / "old.json"
    path.write_text("{}")
    assert run(capsys, "loading", "--shape", "none", "--json", path)[0] == 2
    assert path.read_text() == "{}"


def test_nothing_begins_when_the_time_is_over(capsys, monkeypatch, tmp_path):
    of_cases(monkeypatch, Case("whole", lambda: [row()]), Case("free", lambda: [row("free")], measures=False))
    path = tmp_path / "out.json"
    assert run(capsys, "fit", "--minutes", "1e-9", "--json", path)[0] == 0
    found, free = json.loads(path.read_text())["rows"]
    assert found["skipped"] == "the 1e-09 minutes were over" and "ratio" not in found
    assert free["case"] == "free" and free["ratio"]["median"] == 2


def test_the_plot_shows_the_curves_that_there_are(tmp_path):
    bench = Bench(CPU, tmp_path, plot=tmp_path / "curves.svg")
    (found,) = scaling.plot(bench, {})
    assert found.skipped == "no curve was measured" and not bench.plot.exists()
    assert [*scaling.plot(bench, {scaling.Curve("fit", "tokens", (1, 2), 1, "why"): ((1, 0.1), (2, 0.2))})] == []
    assert "(exponent 1)" in bench.plot.read_text(encoding="utf-8")


def test_what_does_not_fit_the_disk_is_said(tmp_path):
    machine.check_disk(1, tmp_path)
    with pytest.raises(machine.DoesNotFitError, match=r"needs 1000000000.0 GB of disk, .* GB are free"):
        machine.check_disk(1e18, tmp_path)


def test_a_case_that_fails_is_said_and_the_rest_goes_on(capsys, monkeypatch, tmp_path):
    of_cases(monkeypatch, Case("broken", lambda: [1 / 0]), Case("whole", lambda: [row()]))
    path = tmp_path / "out.json"
    status, printed, errors = run(capsys, "fit", "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert status == 1 and [found["case"] for found in rows] == ["broken", "whole"]
    assert rows[0]["failed"] == "ZeroDivisionError: division by zero" and any("Traceback" in line for line in errors)
    assert any("failed: ZeroDivisionError: division by zero" in line for line in printed)


def test_ratios_are_written_as_what_they_are():
    cells = {kind: Row("", "", "", "", kind, Spread(0.955, 0.9, 1)).cells() for kind in ("base", "published")}
    assert cells["base"][3:5] == ("95.5 %", "90.0 % to 100.0 %")
    assert cells["published"][3:5] == ("0.95 x", "0.90 x to 1.00 x")
    assert Row("", "", "", "", "exponent", Spread(1.9, 1.9, 1.9), peak=2_000_000).cells()[3:] == (
        *("1.90", "", "", "", "2 MB"),
    )


def test_small_benchmarks_run(capsys, tmp_path):
    path = tmp_path / "out.json"
    names = ("fit", "edit", "hpr-edit", "decoding")
    status, printed, _ = run(capsys, *names, "--quick", "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert status == 0 and not any("failed" in found or "skipped" in found for found in rows)
    assert {found["benchmark"] for found in rows} == set(names)
    assert {found["kind"] for found in rows} == {"published", "base", "LoRA", "limit", "other"}
    assert all(found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"] for found in rows)
    assert len([line for line in printed if line.startswith("| ")]) == len(rows) + 2 * len(names)
    decoded = [found["what"] for found in rows if found["against"] == "the model without an edit"]
    assert {name.split(" ")[0] for name in decoded} == {"SEA", "the", "HPR", "mean-difference", "ITI", "Diff", "LoRA"}


def test_every_benchmark_has_its_module_and_is_on_the_page():
    page = (REPOSITORY / "examples" / "benchmarks.md").read_text(encoding="utf-8")
    for name in runner.BENCHMARKS:
        assert (REPOSITORY / "examples" / "benchmarks" / f"{name.replace('-', '_')}.py").is_file()
        assert f"| {name} |" in page
