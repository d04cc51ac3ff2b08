"""Results stand side by side only where what they follow from is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..arguments import Argument, ArgumentError
from .results import Results


# What to do where results differ in something, by the beginning of its name.
REMEDIES = {
    "model.dtype": "evaluate all in one dtype",
    "model": "evaluate one base model, without and with the adapter",
    "data": "evaluate all on the same rows",
    "questions": "evaluate all on the same rows, with the same skip and limit",
    "prompts.format": "evaluate all in one prompt format",
    "prompts.template_time": "give all the same template_time",
    "prompts": "evaluate all with one tokenizer and one template",
    "texts": "take the side effects on the same texts",
}


def check_comparable(results: Sequence[Results]) -> None:
    """Raise ValueError, which names what differs, unless results can stand side by side: all of one base model, and
    those of one data set, or of the same rows whatever they are called, of the same rows and prompts, each adapter
    and strength once."""
    for later_place, later in enumerate(results):
        for earlier in results[:later_place]:
            for name, first, second in _differences(earlier, later):
                remedy = next(remedy for start, remedy in REMEDIES.items() if name.startswith(start))
                raise ValueError(
                    f"{earlier.where} and {later.where} must agree in {name}, got {first} and {second}: {remedy}"
                )
            if _same_data(earlier, later) and earlier.row == later.row:
                raise ValueError(
                    f"{earlier.where} and {later.where} are of the same model on the same data: pass one of them"
                )


def _differences(one: Results, other: Results) -> Iterator[tuple[str, str, str]]:
    """Name of each thing in which results that are compared differ, and both values, to print."""
    known = one.model.get("fingerprint") and other.model.get("fingerprint")  # it tells more than a name
    yield from _differing("model", one.model, other.model, ("fingerprint" if known else "name", "dtype"))
    if not _same_data(one, other):
        return
    if one.ids != other.ids:
        yield "questions", *_different_ids(one.ids, other.ids)
    yield from _differing("data", one.data, other.data, ("digest",))
    yield from _differing("prompts", one.prompts, other.prompts, sorted({*one.prompts, *other.prompts}))
    for effects in one.side_effects:
        for others in other.side_effects:
            if effects["texts"].get("file") == others["texts"].get("file"):
                yield from _differing("texts", effects["texts"], others["texts"], ("digest",))


def _same_data(one: Results, other: Results) -> bool:
    return one.data_set == other.data_set or one.rows == other.rows


def _differing(
    part: str, one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    for name in names:
        if one.get(name) != other.get(name):
            yield f"{part}.{name}", _short(one.get(name)), _short(other.get(name))


def _different_ids(one: Sequence[int], other: Sequence[int]) -> tuple[str, str]:
    if len(one) != len(other):
        return str(len(one)), str(len(other))
    first, second = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
    return f"id {first}", f"id {second}"


def check_adapter(
    results: Results, adapter: Mapping[str, str], where: str, base_fingerprint: str | None = None
) -> None:
    """Raise ValueError unless results are of the base model alone, or with this adapter and no other.

    Args:
        adapter: what is known of `adapter_record` of the adapter.
        where: what to call the adapter in messages.
        base_fingerprint: of the model that it was learnt on; None where it is not known.
    """
    of_model = results.model.get("fingerprint")
    if None not in (base_fingerprint, of_model) and base_fingerprint != of_model:
        raise ValueError(
            f"{results.where} and {where} must agree in the fingerprint of the base model: {of_model} there, "
            f"{base_fingerprint} here; evaluate the model that the adapter was made for"
        )
    if len(results.adapters) > 1:
        names = ", ".join(repr(found["name"]) for found in results.adapters)
        raise ValueError(f"{results.where} is of several adapters ({names}): evaluate with {where} alone")
    for found in results.adapters:
        for name, value in adapter.items():
            if found[name] != value:
                raise ArgumentError(
                    f"{results.where} is of another adapter ({found['name']!r}, {name} {found[name]!r}) than {where} "
                    f"({name} {value}): evaluate with ",
                    Argument("adapter", where),
                )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
