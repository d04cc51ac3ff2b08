"""Benefit and damage of many settings of a method, and the choice of one."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store, open_store
from ..adapters.save import check_adapter_folder, save_adapter
from ..arguments import Argument, ArgumentError, nearest, takes
from ..data import check_contrast_set
from ..data.prompts import prompt_record, settled
from ..data.source import rows_digest
from ..data.texts import load_texts
from ..evaluation.results import versions
from ..json_files import digest_of
from ..models.fingerprint import fingerprint
from ..tuners.method import Method, methods
from .axes import Setting, Settings, Sources, check_bare, settings_of
from .budget import DEFAULT, Budget, choose, front
from .journal import JOURNAL, journal_in
from .options import SweepOptions
from .trial import Base, Found, Trials


# Beside the adapter: what was tried, and the choice.
RECORD = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """Result of `sweep`.

    Attributes:
        method: name of the method.
        criterion: "mc1" or "mc2".
        limits: the budget.
        base: of the base model.
        found: every setting, in the order of the grid.
        chosen: by the rule.
    """

    method: str
    criterion: str
    limits: Mapping[str, float]
    base: Base
    found: Sequence[Found]
    chosen: Found

    @property
    def front(self) -> list[Found]:
        """The settings than which none has both more benefit and less damage, the least damage first."""
        return front(self.found)

    @property
    def saved(self) -> float:
        """How many times the work, tokens times blocks, an evaluation of each setting for itself would take."""
        done = sum(row.block_tokens for row in (self.base, *self.found))
        return len(self.found) * self.base.separate / done

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "method": self.method,
            "criterion": self.criterion,
            "budget": dict(self.limits),
            "base": self.base.to_dict(),
            "chosen": self.chosen.to_dict(),
            "front": [found.key for found in self.front],
            "settings": [found.to_dict() for found in self.found],
            "block_tokens": sum(row.block_tokens for row in (self.base, *self.found)),
            "block_tokens_of_separate_evaluations": len(self.found) * self.base.separate,
        }


@takes(SweepOptions)
def sweep(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    validation: Dataset,
    texts: Dataset | Iterable[str] | str | os.PathLike,
    store: Store | None = None,
    retain: Store | None = None,
    eval_store: Store | None = None,
    adapter: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    allow_fingerprint_mismatch: bool = False,
    **options: Any,
) -> Sweep:
    """Measure benefit and damage of many settings of a method, and choose one.

    Of the settings within the budget it takes that with the greatest benefit on the validation questions, and of all
    within one standard error of the difference, over these questions, that with the least damage: the smallest share of
    its budget.

    What settings have in common is done once: a decomposition or a training serves all settings that follow from it,
    and the base model's blocks below the first one that a setting edits are run once for all.

    Args:
        model: the base model, without adapters.
        tokenizer: of the model.
        grid: axis to a value or a list of values, of which all combinations are tried; or a list of such grids. The
            axes are the fields of the method's settings, `SEASetting` for one, and `layers`: "all", "last 3",
            "first 3", "each" (alone), "windows of 3", "top 3 by probe", "0-3,7", or indices.
        validation: a contrast set, of questions that are not in the store, and not the test's.
        texts: that have nothing to do with the questions, see `load_texts`.
        store: activations that edits are learnt from; not needed with an `adapter`.
        retain: activations of texts to leave alone.
        eval_store: activations of held-out questions, for methods that are trained.
        adapter: folder of a trained adapter whose settings are looked for.
        out: folder for the chosen adapter, as it is learnt with that setting alone. `sweep.jsonl` there has a line for
            each setting that is finished, and the same call goes on after an interruption; `sweep.json` has all.
        allow_fingerprint_mismatch: also where a store says that it was collected from another model.
        options: see `SweepOptions`.

    Raises:
        ValueError: an axis or a value that the method does not have, a store that does not suit, questions or texts
            that cannot be used, or a budget that no setting meets: the nearest one is named.
    """
    chosen_options = settled(tokenizer, SweepOptions(**options))
    budget, method = (
        Budget(DEFAULT if chosen_options.budget is None else chosen_options.budget),
        method_named(chosen_options.method),
    )
    check_bare(model)
    validation, texts = check_contrast_set(validation), list(load_texts(texts)["text"])
    out = None if out is None else Path(out)
    if out is not None:
        check_adapter_folder(out, method.name, JOURNAL)
    sources = Sources(
        *(None if given is None else open_store(given) for given in (store, retain, eval_store)),
        adapter=None if adapter is None else Path(adapter),
        work=None if out is None else out.parent / f".{out.name}.trained",
        allow_fingerprint_mismatch=allow_fingerprint_mismatch,
    )
    if sources.store is None and sources.adapter is None:
        raise ArgumentError(Argument("store"), " is missing: pass the activations that edits are learnt from")
    maker = import_module(method.settings).SETTINGS(model, sources)
    settings = settings_of(maker, grid)
    origin = _origin(model, tokenizer, sources, validation, texts, chosen_options, budget)
    with journal_in(out, origin) as journal:
        maker.prepare(settings)
        trials = Trials(model, tokenizer, maker, settings, validation, texts, chosen_options, budget, journal)
        base = trials.base
        found = _try_all(maker, settings, trials)
        criterion = chosen_options.criterion
        best = choose(found)
        if best is None:
            raise ValueError(_none_within(found, budget))
        result = Sweep(method.name, criterion, budget.limits, base, found, best)
        if out is not None:
            _write(maker, settings[found.index(best)], result, origin, out)
    return result


def method_named(name: str) -> Method:
    """The method of a name, in any case; raises ArgumentError where there is none that can be swept."""
    known = {method.name: method for method in methods().values() if method.settings}
    if name.upper() not in known:
        raise ArgumentError(Argument("method"), f" {name!r} cannot be swept{nearest(name.upper(), known)}")
    return known[name.upper()]


def _origin(model, tokenizer, sources: Sources, validation, texts, options: SweepOptions, budget: Budget) -> dict:
    """All that a setting's figures follow from, besides the setting."""
    stores = (sources.store, sources.retain, sources.eval_store)
    kept = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("memory", "criterion")}
    return {
        "model": fingerprint(model),
        "dtype": str(model.dtype),
        "stores": [None if store is None else [store.site, digest_of(store.metadata)] for store in stores],
        "adapter": None if sources.adapter is None else _files_digest(sources.adapter),
        "validation": rows_digest(validation),
        "texts": digest_of(texts),
        "prompts": prompt_record(tokenizer, options),
        "options": {**kept, "budget": dict(budget.limits), "method": options.method.upper()},
        "versions": versions(),
    }


def _files_digest(folder: Path) -> str:
    return digest_of({file.name: digest_of(file.read_bytes().hex()) for file in sorted(folder.glob("adapter_*"))})


def _try_all(maker: Settings, settings: Sequence[Setting], trials: Trials) -> list[Found]:
    """Settings that follow from one fit or training come one after the other; the results are in the grid's order."""
    groups = list(dict.fromkeys(map(maker.group, settings)))
    ordered = sorted(range(len(settings)), key=lambda place: groups.index(maker.group(settings[place])))
    found: dict[int, Found] = {}
    with tqdm(ordered, desc="settings", unit="setting", leave=None) as progress:
        for place in progress:
            found[place] = trials.of(settings[place])
    return [found[place] for place in range(len(settings))]


def _none_within(found: Sequence[Found], budget: Budget) -> str:
    mildest = min(found, key=lambda row: row.damage)
    effects = mildest.side_effects or {}
    figures = ", ".join(
        f"{name} {effects.get(name, math.nan):.4g} (limit {limit:g})" for name, limit in budget.limits.items()
    )
    setting = ", ".join(f"{name}={value!r}" for name, value in varied(found, mildest).items())
    return f"no setting meets the budget; the nearest is {setting}: {figures}; raise the budget, or try milder settings"


def varied(found: Sequence[Found], row: Found) -> dict[str, Any]:
    """The axes of a row on which settings differ; its layers where none do."""
    names_of = [name for name in row.setting if len({repr(other.setting[name]) for other in found}) > 1]
    return {name: row.setting[name] for name in names_of or ["layers"]}


def _write(maker: Settings, setting: Setting, result: Sweep, origin: Mapping[str, Any], out: Path) -> None:
    with maker.learnt(setting) as adapted:
        text = json.dumps({**result.to_dict(), "origin": origin}, indent=2, default=str) + "\n"
        save_adapter(adapted, out, {RECORD: text}, JOURNAL)
    shutil.rmtree(out.parent / f".{out.name}.trained", ignore_errors=True)
