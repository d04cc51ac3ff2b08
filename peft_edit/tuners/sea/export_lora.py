"""SEA adapter -> LoRA adapter: M W = W + (M - I) W, a low-rank update of the edited layer's weight."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import LoraConfig, PeftConfig, TaskType
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...adapters.card import write_card
from ...adapters.match import check_unmerged, find_config
from ...adapters.save import adapter_folder, check_adapter_folder
from ...arguments import Argument, ArgumentError, Note, parts_of
from ...models.dtypes import as_written
from ...models.load import check_vocabulary_of_base
from ...models.sites import layer_index, target_modules, unwrap
from ..method import lora_method_of
from .config import SEAConfig
from .layer import SEALayer, SEALinear
from .subspaces import change, low_rank


# Written beside the adapter; a LoRA adapter without it is not ours to replace.
RECORD = "sea_to_lora.json"
# What vLLM takes for --max-lora-rank.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class SiteExport:
    """What became of one site.

    Attributes:
        site: name of the linear layer.
        factor_rank: number of directions in the two factors of the edit.
        exact_rank: of the update, after directions that both factors share have cancelled.
        rank: of the exported update, without the padding.
        truncation_error: of the update, relative, in the Frobenius norm; 0 where rank is exact_rank.
        rescale_error: what leaving out the edit's rescaling costs: root mean square of the relative error, on the
            neutral demonstrations of the fit; 0 for rescale="none".
        size: of the layer's weight, in elements.
    """

    site: str
    factor_rank: int
    exact_rank: int
    rank: int
    truncation_error: float
    rescale_error: float
    size: int


@dataclass(frozen=True)
class LoRAExport:
    """Result of `sea_to_lora`.

    Attributes:
        adapter_name: the adapter that was exported.
        rank: r of the LoRA adapter, that of all layers; lower ones are padded with zeros.
        max_lora_rank: the lowest of vLLM's `--max-lora-rank` that takes it; None above the highest.
        lora_bias: whether the adapter also changes biases.
        sites: one entry for each layer.
        notes: what a user of the export must know, the texts of the warnings.
        source: the configuration of the adapter, as JSON values.
    """

    adapter_name: str
    rank: int
    max_lora_rank: int | None
    lora_bias: bool
    sites: list[SiteExport]
    notes: list[str]
    source: dict[str, Any]

    @property
    def exact(self) -> bool:
        return not any(site.truncation_error or site.rescale_error for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, one for each site."""
        header = ["module", "directions", "exact rank", "rank", "truncation error", "rescale error"]
        errors = [(f"{site.truncation_error:.3g}", f"{site.rescale_error:.3g}") for site in self.sites]
        ranks = [(str(site.factor_rank), str(site.exact_rank), str(site.rank)) for site in self.sites]
        return header, [[s.site, *of_s, *e] for s, of_s, e in zip(self.sites, ranks, errors, strict=True)]


def sea_to_lora(
    model: nn.Module, out_dir: str | os.PathLike, rank: int | None = None, adapter_name: str | None = None
) -> LoRAExport:
    """Write a SEA adapter as a standard LoRA adapter, for PEFT without this package and any server that takes LoRA.

    The edit's linear part M = I + U+ U+^T - U- U-^T = I + Q diag(g) Q^T turns the edited layer's weight W into
    M W = W + B A, with A = Q^T W and B = strength Q diag(g). Directions that both factors share have g = 0 and drop
    out. A bias b becomes b + strength Q diag(g) Q^T b. All layers get the rank of the largest, padded with zeros, and
    lora_alpha = r: a scaling of 1 with nothing in rank_pattern and alpha_pattern, which not every server reads.

    Exact for rescale="none". "token" and "mean" multiply by a factor near 1, which is no low-rank update: the export
    leaves it out, and says in a warning and in the card what that costs.

    Args:
        model: with the adapter and the base model's weights.
        out_dir: folder of the LoRA adapter: adapter_config.json, adapter_model.safetensors, sea_to_lora.json (what this
            function returns) and README.md. An earlier export is replaced.
        rank: truncate each layer's update to its best approximation of this rank; None keeps all.
        adapter_name: which adapter; None for the active one.

    Raises:
        ValueError: the adapter is no SEA adapter, merged, inside `edit_strength`, edits nothing or other modules than
            linear layers (decoder blocks, mixtures of experts), has a feature map, modules_to_save, rescale="average"
            or projections="positive"; the weights are quantised or not loaded, or the embeddings resized; or the folder
            holds something else.
    """
    out_dir = Path(out_dir)
    check_folder(out_dir)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ArgumentError(
            Argument("rank"), f" must be an integer of at least 1, or None for the exact one, got {rank!r}"
        )
    adapter_name, config = find_config(model, adapter_name, PeftConfig)
    check_exportable(config)
    check_vocabulary_of_base(unwrap(model), "an export as LoRA")
    layers = [m for m in model.modules() if isinstance(m, SEALayer) and m.is_fitted(adapter_name)]
    for layer in layers:
        _check_layer(layer, adapter_name)

    updates: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    sites = []
    for layer in tqdm(layers, desc="exporting", unit="layer", leave=None):
        site, update = _export_site(layer, adapter_name, config, rank)
        if site.rank:
            sites.append(site)
            updates[site.site] = update
    if not sites:
        raise ValueError(
            f"adapter {adapter_name!r} edits nothing, so that there is nothing to export: fit it, or set its strength "
            "above 0"
        )
    r = max(site.rank for site in sites)
    bias = any(b is not None for _, _, b in updates.values())
    tensors = {}
    for site, (left, right, site_bias) in updates.items():
        name = f"base_model.model.{site}"
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(right, (0, 0, 0, r - len(right)))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(left, (0, r - left.shape[1]))
        if bias:
            tensors[f"{name}.lora_B.bias"] = left.new_zeros(len(left)) if site_bias is None else site_bias
    notes = _notes(config, sites, rank, bias) + _notes_on_size(sites, r, sum(map(Tensor.numel, tensors.values())))
    export = LoRAExport(adapter_name, r, served_rank(r), bias, sites, notes, _source(config))
    lora_config = _lora_config(model, config, export)
    with adapter_folder(out_dir, "LORA") as folder:
        lora_config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / RECORD).write_text(json.dumps(export.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_card(folder, lora_config)
    for note in export.notes:
        warnings.warn(note, stacklevel=2)
    return export


def check_exportable(config: PeftConfig) -> None:
    """Raise ValueError, with the reason, for a configuration that no LoRA adapter can express."""
    lora_method_of(config)
    reason = None
    if not config.is_linear:
        reason = (f"its feature map {config.feature_map!r} is not linear; fit with ", Argument("feature_map", None))
    elif config.site == "block":
        reason = (
            "it edits the outputs of decoder blocks, which are no linear layers; fit with ",
            Argument("site", "mlp"),
        )
    elif config.rescale == "average":
        reason = (
            "rescale='average' halves activations, which is no low-rank update; merge it, or fit with ",
            Argument("rescale", "none"),
        )
    elif config.projections == "positive":
        reason = (
            "projections='positive' removes all but the kept directions, which is no low-rank update; merge it, or "
            "fit with ",
            Argument("projections", "both"),
        )
    elif config.modules_to_save:
        reason = (f"its modules_to_save {config.modules_to_save} are no part of a LoRA update; merge it",)
    if reason:
        raise ArgumentError("this SEA adapter cannot be exported as LoRA: ", *reason)


def check_folder(path: Path) -> None:
    """Raise ValueError unless nothing is at `path`, or an empty folder, or an earlier export."""
    check_adapter_folder(path, "LORA")
    if (path / "adapter_config.json").exists() and not (path / RECORD).exists():
        raise ValueError(f"{path} holds a LoRA adapter that is not an export of SEA: choose another folder")


def check_lora(config: SEAConfig, out_dir: Path) -> None:
    """Raise ValueError where an adapter cannot be exported to a folder."""
    check_folder(out_dir)
    check_exportable(config)


def _check_layer(layer: SEALayer, adapter_name: str) -> None:
    check_unmerged([layer], "export")
    if not isinstance(layer, SEALinear):
        raise ValueError(
            f"cannot export as LoRA: adapter {adapter_name!r} edits the output of {layer.site}, which is no linear "
            "layer; merge it instead"
        )
    try:
        layer.check_mergeable(adapter_name)  # the conditions of merging are those of exporting
    except ValueError as error:
        raise ArgumentError("cannot export as LoRA: ", *parts_of(error)) from error


def _export_site(
    layer: SEALayer, adapter_name: str, config: SEAConfig, rank: int | None
) -> tuple[SiteExport, tuple[Tensor, Tensor, Tensor | None]]:
    """Factors B, (d, r), and A, (r, m), of a layer's update, and the update of its bias, (d,), float32 on the CPU."""
    positive, negative = layer.factors(adapter_name)
    factor_rank = len(positive) + len(negative)
    if config.projections == "exchanged":
        positive, negative = negative, positive
    elif config.projections == "negative":
        positive = positive[:0]
    directions, values = change(positive, negative)
    base = layer.get_base_layer()
    with align_module_device(base), torch.no_grad():
        weight = base.weight
        if weight.is_meta:
            raise ValueError(f"the weights of {layer.site} are not loaded, and the export needs them: load the model")
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = directions.to(weight.device, wide)
        with as_written(weight):
            right = (rows @ (weight if isinstance(base, Conv1D) else weight.T).to(wide).T).cpu()  # (r, m)
        left = config.strength * directions.T * values  # (d, r)
        bias = None if base.bias is None else left @ (directions @ base.bias.detach().cpu().double())
    exact_rank, error = len(values) if config.strength else 0, 0.0
    if rank is not None and rank < exact_rank:
        left, right, error = low_rank(left, right.double(), rank)
    site = SiteExport(
        site=layer.site,
        factor_rank=factor_rank,
        exact_rank=exact_rank,
        rank=min(exact_rank, rank or exact_rank),
        truncation_error=error,
        rescale_error=_rescale_error(layer, config),
        size=weight.numel(),
    )
    left, right = left.float().contiguous(), right.float().contiguous()
    return site, (left, right, None if bias is None else bias.float())


def _rescale_error(layer: SEALayer, config: SEAConfig) -> float:
    if config.rescale == "token":
        return layer.statistic(config, "unscaled_error")
    if config.rescale == "mean":
        # (1 - s) h + s y in place of (1 - s) h + s c y, as a share of h, as long as c y is.
        return config.strength * abs(1 / layer.statistic(config, "mean_rescale") - 1)
    return 0.0


def _lora_config(model: nn.Module, config: SEAConfig, export: LoRAExport) -> LoraConfig:
    bare, names = unwrap(model), [site.site for site in export.sites]
    layers, targets = None, target_modules(bare, names, None)
    if isinstance(targets, str):
        # Not every server reads a regular expression. With their layers, names are enough more often.
        layers = sorted({layer_index(name) for name in names} - {None})
        targets = target_modules(bare, names, layers)
        layers = None if isinstance(targets, str) else layers
    return LoraConfig(
        task_type=config.task_type or TaskType.CAUSAL_LM,
        base_model_name_or_path=config.base_model_name_or_path or getattr(bare, "name_or_path", None),
        revision=config.revision,
        r=export.rank,
        lora_alpha=export.rank,
        target_modules=targets,
        layers_to_transform=layers,
        lora_bias=export.lora_bias,
        fan_in_fan_out=isinstance(bare.get_submodule(names[0]).get_base_layer(), Conv1D),
        inference_mode=True,
    )


def _notes(config: SEAConfig, sites: list[SiteExport], rank: int | None, bias: bool) -> list[str]:
    notes = []
    if config.rescale != "none":
        error = f"relative error {_spread(sites, 'rescale_error')}, measured on the fit's neutral demonstrations"
        notes.append(
            Note(
                f"the export leaves out the edit's rescale={config.rescale!r}: {error}; an adapter fitted with ",
                *(Argument("rescale", "none"), " exports exactly"),
            )
        )
    if any(site.rank < site.exact_rank for site in sites):
        exact = max(site.exact_rank for site in sites)
        notes.append(
            f"updates of rank up to {exact} are truncated to rank {rank}: relative error of the updates "
            f"{_spread(sites, 'truncation_error')} (Frobenius norm)"
        )
    if bias:
        notes.append(
            "the edited layers have a bias, so the adapter has lora_bias=True, which PEFT reads and some servers refuse"
        )
    return notes


def served_rank(rank: int) -> int | None:
    """The lowest of vLLM's values of `--max-lora-rank` that takes a rank; None above the highest."""
    return next((served for served in SERVED_RANKS if served >= rank), None)


def _notes_on_size(sites: list[SiteExport], rank: int, elements: int) -> list[str]:
    """What to say of an adapter that servers do not take, or that saves nothing.

    Args:
        sites: that are exported.
        rank: of the adapter.
        elements: of its tensors together.
    """
    notes = []
    if served_rank(rank) is None:
        highest = SERVED_RANKS[-1]
        notes.append(
            Note(
                f"rank {rank} is above {highest}, the highest that vLLM takes: merge the edit, or truncate with ",
                Argument("rank", highest),
            )
        )
    if elements >= (edited := sum(site.size for site in sites)):
        notes.append(
            Note(
                f"the LoRA adapter has {elements:,} elements, no fewer than the {edited:,} of the weights that it "
                "edits: merge the edit, or truncate with a lower ",
                Argument("rank"),
            )
        )
    return notes


def _source(config: SEAConfig) -> dict[str, Any]:
    """A configuration as JSON values, which `adapters.exported` reads."""
    return json.loads(json.dumps(config.to_dict(), default=sorted))


def _spread(sites: list[SiteExport], name: str) -> str:
    errors = {site.site: getattr(site, name) for site in sites}
    worst = max(errors, key=errors.get)
    return f"{sum(errors.values()) / len(errors):.3g} on average, {errors[worst]:.3g} at {worst}"
