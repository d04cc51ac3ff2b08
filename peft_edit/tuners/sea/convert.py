from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import TaskType, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm

from ...adapters.conversion import Conversion, finish, read_json
from ...adapters.save import check_adapter_folder, save_adapter
from ...arguments import Argument, Note, check_choice
from ...models.load import BaseModel, load_structure
from ...models.sites import find_sites, layer_index, text_config
from ...places import LayerIndices, normalise_layers
from .config import SEAConfig
from .layer import SEALayer
from .subspaces import factor_projection
from .tensor_file import read_tensor


# Largest entry of P - U U^T. Projections that went through bfloat16 are off by up to 4e-3, anything else by far less.
PROJECTION_TOLERANCE = 1e-2
SEA_PREFIX = "no_mean_sub_"


@dataclass(frozen=True)
class SEAConversion(Conversion):
    """Result of `convert_sea`.

    Attributes:
        ranks: of each layer, those of the positive and of the negative projection.
        deviation: largest entry of a stored matrix minus what the adapter makes of it.
    """

    ranks: list[list[int]]
    deviation: float

    def table(self) -> tuple[list[str], list[list[str]]]:
        rows = [[str(layer), *map(str, ranks)] for layer, ranks in zip(self.layers, self.ranks, strict=True)]
        return ["layer", "rank +", "rank -"], rows

    def remarks(self) -> list[str]:
        return [f"The projections are those of their factors to {self.deviation:.1g}."]


def convert_sea(
    source_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    base_model: str | os.PathLike,
    layers: LayerIndices = None,
    rescale: str = "token",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> SEAConversion:
    """Turn the dense projections that the published code of SEA writes into a SEA adapter of thin factors.

    The projections, (L, d, d) in each file, edit the outputs of the MLPs, as in the published code. A file is refused
    unless it holds one tensor and nothing else; nothing in it is ever executed. What differs from the published
    behaviour is logged and returned.

    Args:
        source_dir: folder with no_mean_sub_uu_positive.pt and no_mean_sub_uu_negative.pt, or the two names without
            no_mean_sub_. sea-args.json and sea-statistics.json are read where they are there.
        out_dir: folder of the adapter.
        base_model: id on the Hub, or folder; only its configuration is read, unless it is a GGUF file.
        layers: decoder blocks to edit; None for all. The published code takes this when it runs, not from the files.
        rescale: "token", "none" or "average".
        trust_remote_code: run the base model's own code, where it has some.
        gguf_file: name of the GGUF file that holds the base model, in its folder.

    Raises:
        ValueError: a file is missing, too large, damaged, or holds other things than one tensor; its shape is not that
            of the base model; a matrix is not finite or no orthogonal projection; layers that are not there; a rescale
            that needs activations.
    """
    source, out = Path(source_dir), Path(out_dir)
    check_choice("rescale", rescale, ("token", "none", "average"))
    check_adapter_folder(out, "SEA")
    paths, centred_by_sample = _sea_files(source)
    arguments = read_json(source / "sea-args.json")
    statistics = read_json(source / "sea-statistics.json")
    model = load_structure(BaseModel(str(base_model), None, trust_remote_code, gguf_file))
    config = text_config(model)
    shape = (config.num_hidden_layers, config.hidden_size, config.hidden_size)
    stacks = [read_tensor(path, shape, str(base_model)) for path in paths]
    layers = normalise_layers(layers)
    sites = find_sites(model, "mlp", layers=layers)

    factors, deviation = {}, 0.0
    for index in tqdm(sites, desc="factoring", unit="layer", leave=None):
        matrices = (stacks[0][index].double(), torch.eye(shape[1], dtype=torch.float64) - stacks[1][index].double())
        factors[index] = []
        for path, matrix, sign in zip(paths, matrices, ("pos", "neg"), strict=True):
            factor, off = _factor(matrix, f"{path}, layer {index}")
            _check_rank(statistics, index, sign, len(factor), source)
            factors[index].append(factor.float())
            deviation = max(deviation, off)

    ranks = {sites[index]: [len(factor) for factor in both] for index, both in factors.items()}
    feature_map = _feature_map(arguments)
    sea_config = SEAConfig(
        task_type=TaskType.CAUSAL_LM,
        layers_to_transform=layers,
        feature_map=feature_map,
        rescale=rescale,
        rank_pattern=ranks,
        **_energies(arguments),
    )
    adapted = get_peft_model(model, sea_config)
    for module in adapted.modules():
        if isinstance(module, SEALayer):
            module.set_factors("default", *factors[layer_index(module.site)], checked=True)
    save_adapter(adapted, out)
    notes = _sea_notes(rescale, feature_map, centred_by_sample, layers, len(sites))
    return finish(SEAConversion("SEA", list(sites), notes, list(ranks.values()), deviation))


def _sea_files(source: Path) -> tuple[list[Path], bool]:
    """The two files, and whether they were fitted after subtracting each sample's mean."""
    names = ("uu_positive.pt", "uu_negative.pt")
    found = {prefix: [source / f"{prefix}{name}" for name in names] for prefix in (SEA_PREFIX, "")}
    present = [prefix for prefix, paths in found.items() if any(path.exists() for path in paths)]
    if len(present) != 1:
        both = f"{' and '.join(names)}, with or without {SEA_PREFIX}"
        what = "two fits" if present else "no fit"
        raise ValueError(f"{source} holds {what}: it must hold {both}, of one fit")
    paths = found[present[0]]
    for path in paths:
        if not path.exists():
            raise ValueError(f"{source} has no {path.name}: both files of the published code are needed")
    return paths, present[0] == ""


def _factor(matrix: Tensor, where: str) -> tuple[Tensor, float]:
    if not matrix.isfinite().all():
        raise ValueError(f"{where} holds NaN or infinite values: the file is damaged")
    factor, deviation = factor_projection(matrix)
    if not deviation <= PROJECTION_TOLERANCE:
        raise ValueError(
            f"{where} is no orthogonal projection: it deviates by {deviation:.3g} from one of its rank, "
            f"at most {PROJECTION_TOLERANCE:g} is allowed"
        )
    return factor, deviation


def _check_rank(statistics: dict[str, Any] | None, index: int, sign: str, rank: int, source: Path) -> None:
    of_layer = (statistics or {}).get(str(index))
    said = of_layer.get(f"k_id_{sign}") if isinstance(of_layer, dict) else None
    if said not in (None, rank):
        raise ValueError(
            f"sea-statistics.json in {source} says rank {said!s:.20} for layer {index} ({sign}), the projection has "
            f"{rank}: the files are of different fits"
        )


def _feature_map(arguments: dict[str, Any] | None) -> str | None:
    name = (arguments or {}).get("feature_function")
    return name.lower().replace("-", "_") if isinstance(name, str) else name


def _energies(arguments: dict[str, Any] | None) -> dict[str, float]:
    """The energies of the fit; none where the ranks were given instead, or nothing is known."""
    found = {f"{sign}_energy": (arguments or {}).get(f"{sign}_k_ratio") for sign in ("positive", "negative")}
    return {name: energy for name, energy in found.items() if energy is not None}


def _sea_notes(
    rescale: str, feature_map: str | None, centred_by_sample: bool, layers: list[int] | None, count: int
) -> list[str]:
    notes = [
        "the published code fits on the outputs of decoder blocks, the last one after the final norm, and edits the "
        "outputs of MLPs, as this adapter does; a fit by peft_edit is made where it edits"
    ]
    if centred_by_sample:
        notes.append(
            f"the files lack the prefix {SEA_PREFIX}: they were fitted after subtracting each sample's mean over "
            "features, and edit raw activations, there and here"
        )
    if rescale == "token":
        notes.append(
            "the published code scales each feature by its norm over all tokens of the batch, so that a token depends "
            "on later ones; this adapter keeps each token's own norm"
        )
    else:
        kept = ": norms are not kept, as they are, over the batch, in the published code"
        notes.append(Note(Argument("rescale", rescale), kept))
    if feature_map is None and rescale == "token":
        notes.append(
            Note(
                "without activations the mean rescale is not known: this adapter neither merges nor exports; convert "
                "with ",
                *(Argument("rescale", "none"), " for that"),
            )
        )
    if feature_map is not None:
        notes.append(
            f"the published code edits by the inverse of the feature map {feature_map!r} alone; this adapter applies "
            "the map before it, as in the paper"
        )
    if layers is None:
        notes.append(
            Note(
                f"all {count} layers edit; the published code edits the last ones, as many as it is told: pass ",
                Argument("layers"),
                " (the paper: the last 21 of 32 for truthfulness, the last 2 for bias)",
            )
        )
    return notes
