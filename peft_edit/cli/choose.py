"""Commands that choose: among settings, and a strength."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..arguments import Argument, ArgumentError
from ..choosing.options import CalibrationOptions, SweepOptions
from . import common
from .options import Run


if TYPE_CHECKING:
    from ..choosing.sweep import Sweep
    from ..choosing.trial import Found

Texts = Annotated[Path, {"help": "Text file, one text a line, for the damage: nothing the edit is meant for."}]
Store = Annotated[Path | None, {"help": "Store to learn from; not needed with an adapter."}]
EvalStore = Annotated[Path | None, {"help": "Store of held-out questions, for methods that are trained."}]


def sweep(
    model: common.LoadedModelOptions,
    data: common.DataOptions,
    out: common.Out,
    options: SweepOptions,
    texts: Texts,
    output: common.Output,
    run: Run,
    grid: Annotated[
        dict[str, Any] | list[dict[str, Any]] | None,
        {"help": "Axis to its values, or a list of such grids, as JSON, or in the file of --config. Must be given."},
    ] = None,
    store: Store = None,
    retain: common.Retain = None,
    eval_store: EvalStore = None,
    adapter: Annotated[str | None, {"help": "Trained adapter whose settings are looked for: a local folder."}] = None,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Measure benefit and damage of many settings of a method on validation questions, and make the adapter of one.

    It goes on after an interruption. Settings and how they are chosen: examples/choosing.md.

    Example: peft-edit sweep MODEL valid.jsonl sea --store store --texts other.txt --grid '{"energy": [0.99, 0.998]}'
    """
    from ..choosing.sweep import sweep as sweep_settings
    from ..evaluation.showing import LABELS

    if grid is None:
        raise ArgumentError(Argument("grid"), ' is missing: pass axes and their values, \'{"layers": ["last 3"]}\'')
    validation = common.load_data(data)
    base, tokenizer = common.load_model(model)
    result = sweep_settings(
        base,
        tokenizer,
        grid,
        validation=validation,
        texts=texts,
        store=store,
        retain=retain,
        eval_store=eval_store,
        adapter=adapter,
        out=out,
        allow_fingerprint_mismatch=allow_fingerprint_mismatch,
        **vars(options),
    )
    output.write(run.record(result.to_dict()))
    print(front_table(result))
    within = sum(found.damage <= 1 for found in result.found)
    stopped = sum(found.stopped is not None for found in result.found)
    print(
        f"{len(result.found)} settings, {within} within the budget of {json.dumps(dict(result.limits))}, {stopped} "
        "stopped early; * is the one that was chosen. Damage is the largest share of a limit that is used."
    )
    print(f"Evaluations of each setting for itself would run {result.saved:.2f} times as many tokens through blocks")
    if result.chosen.benefit <= getattr(result.base.scores, result.criterion):
        print(f"The setting that was chosen has no more {LABELS[result.criterion]} than the base model.")
    print(f"Adapter, {common.size_of(out)}: {out}")


def front_table(result: Sweep) -> str:
    """The base model and the settings than which none has both more benefit and less damage; the chosen one too."""
    from ..choosing.sweep import varied

    rows = result.front
    if result.chosen not in rows:
        rows = sorted([*rows, result.chosen], key=lambda found: found.damage)
    axes = list(varied(result.found, result.chosen))
    header = [*axes, "MC1 %", "MC2 %", "perplexity ratio", "KL p95", "touched %", "damage", ""]
    scores = result.base.scores
    base = [*(["base"] + [""] * (len(axes) - 1)), *_percent(scores), "1.000", "0.000", "0.0", "0.00", ""]
    return common.table(header, [base, *(_row(found, axes, found is result.chosen) for found in rows)])


def _percent(scores: Any) -> list[str]:
    return [f"{100 * scores.mc1:.1f}", f"{100 * scores.mc2:.1f}"]


def _row(found: Found, axes: list[str], chosen: bool) -> list[str]:
    effects = found.side_effects
    return [
        *(str(found.setting[name]) for name in axes),
        *_percent(found.scores),
        f"{effects['perplexity_ratio']:.3f}",
        f"{effects['kl_p95']:.3f}",
        f"{100 * effects['touched']:.1f}",
        f"{found.damage:.2f}",
        "*" if chosen else "",
    ]


def calibrate(
    model: common.LoadedModelOptions,
    adapter: common.PositionalAdapter,
    out: common.Out,
    options: CalibrationOptions,
    texts: Texts,
    output: common.Output,
    run: Run,
    allow_fingerprint_mismatch: common.AllowMismatch = False,
) -> None:
    """Find the largest strength at which an adapter stays within a budget of damage, and save it with that strength.

    Example: peft-edit calibrate meta-llama/Llama-2-7b-hf sea-truthful sea-mild --texts unrelated.txt --kl-p95 0.5
    """
    from ..adapters.read import load_adapter_config
    from ..adapters.save import check_adapter_folder, save_adapter
    from ..choosing.calibrate import calibrate as find_strength

    check_adapter_folder(out, load_adapter_config(adapter).peft_type.value)
    base, tokenizer = common.load_model(model)
    adapted = common.load_adapter(base, adapter, allow_fingerprint_mismatch)
    result = find_strength(adapted, tokenizer, texts, **vars(options))
    results = run.record(result.to_dict())
    save_adapter(adapted, out, {"calibration.json": json.dumps(results, indent=2) + "\n"})
    output.write(results)
    rows = [[f"{value:.4g}", "not finite" if kl is None else f"{kl:.4f}"] for value, kl in result.tried]
    print(common.table([result.dial, "KL p95"], rows))
    effects = result.side_effects
    if not result.limited:
        print(f"The largest {result.dial} that was to be tried, {result.value:.4g}, is within the budget")
    print(
        f"{result.dial}: {result.before:.4g} -> {result.value:.4g}, KL p95 {effects.kl_p95:.4f} nats, perplexity ratio "
        f"{effects.perplexity_ratio:.4f}, {effects.tokens} tokens"
    )
    print(f"The base model's logits were computed {'once' if result.kept_logits else 'again for each value'}")
    print(f"Adapter, {common.size_of(out)}: {out}")


COMMANDS = [sweep, calibrate]
