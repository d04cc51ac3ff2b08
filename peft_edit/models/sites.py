"""Where activations are edited and collected: decoder blocks, MLP outputs and attention heads, found by structure.

PEFT's table of MLP output projections covers some architectures only; the structure of a decoder block covers them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TypeVar, get_args

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from ..arguments import Argument, ArgumentError, check_choice
from ..places import LayerIndices, Site, normalise_layers
from .parts import attention_output, in_features, is_linear, mlp_output, out_features


T = TypeVar("T")


def check_names(field: str, names: object) -> None:
    """Raise ValueError unless names are None, a regular expression or strings, as PEFT matches module names."""
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ArgumentError(
                Argument(field), f" must be a list of names or a regular expression, got {names!r}: {error}"
            ) from error
    elif names is not None and not (isinstance(names, (list, tuple, set)) and all(isinstance(n, str) for n in names)):
        raise ArgumentError(Argument(field), f" must be a list of names or a regular expression, got {names!r}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the `PeftModel` around it, and without what compiled it or spread it over devices. Its
    module names are the adapter's site names.

    Raises:
        ValueError: the adapter is one of prompt learning, which lives in the `PeftModel` and not in the model.
    """
    model = without_wrappers(model)
    if not isinstance(model, PeftModel):
        return model
    if not model.peft_config:  # all adapters were deleted, of which PEFT asks one
        return without_wrappers(model.base_model.model)
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(
            f"an adapter of prompt learning ({config.peft_type.value}) puts virtual tokens before the prompts, which "
            "cannot be followed here: pass the base model, or another adapter"
        )
    return without_wrappers(model.get_base_model())


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model, or the `PeftModel` around it, without what compiled it or spread it over devices, in any order."""
    while not _is_plain(model) and (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def _is_plain(model: nn.Module) -> bool:
    """Whether a model is of Transformers or PEFT itself. What lies around one, accelerate finds by a look at all of its
    modules and at what is installed, which takes longer than a small forward pass."""
    return isinstance(model, (PreTrainedModel, PeftModel)) and "_orig_mod" not in vars(model)


def runnable(model: nn.Module) -> nn.Module:
    """What to call for a forward pass: the model as it is given, but the one inside a `PeftModel` whose adapters were
    all deleted, which PEFT cannot run."""
    inner = without_wrappers(model)
    return unwrap(model) if isinstance(inner, PeftModel) and not inner.peft_config else model


def text_config(model: nn.Module):
    """Configuration of the part that has the decoder blocks; raises ValueError for a model without one."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ArgumentError(
            f"{type(model).__name__} has no Transformers configuration: pass ", Argument("target_modules")
        )
    return config.get_text_config(decoder=True)


def layer_index(name: str) -> int | None:
    """Index of the decoder block in a module's name: its first numeric component."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def by_layer(values: Mapping[str, T]) -> list[tuple[str, T]]:
    """Names of modules with their values, in the order of the decoder blocks. In a file they are sorted as texts."""
    return sorted(values.items(), key=lambda item: (layer_index(item[0]) or 0, item[0]))


def decoder_blocks(model: nn.Module) -> dict[int, str]:
    """Block index to module name, for every decoder block of a Transformers model.

    The blocks are the outermost list of as many modules as the configuration has layers or, without one (LongCat counts
    two layers a block), of modules that the model itself calls its blocks. Where several fit (a vision tower of the
    same depth), it is the one inside `get_decoder()`.

    Raises:
        ValueError: there is no such list, or several, or activations do not begin with the rows of the batch (XLNet).
    """
    config = text_config(model)
    if config.model_type == "xlnet":
        raise ValueError(
            f"the activations of {type(model).__name__} begin with the positions and not with the rows of a batch, "
            "which is not supported; use another model"
        )
    count = getattr(config, "num_hidden_layers", None)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [n for n, m in lists.items() if len(m) == count]
    found = found or [n for n, m in lists.items() if {type(block).__name__ for block in m} <= kinds]
    outermost = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if len(outermost) > 1 and hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
        prefix = next((n for n, m in model.named_modules() if m is decoder), "")
        outermost = [n for n in outermost if n.startswith(f"{prefix}.")] or outermost
    outermost = [n for n in outermost if not re.search(r"vision|visual|image|audio", n)] or outermost
    if len(outermost) != 1:
        raise ArgumentError(
            f"cannot tell which modules of {type(model).__name__} are its decoder blocks "
            f"({count} layers, lists that could be them: {', '.join(outermost) or 'none'}): pass ",
            Argument("target_modules"),
        )
    return {i: f"{outermost[0]}.{i}" for i in range(len(lists[outermost[0]]))}


def takes_input(site: str) -> bool:
    """Whether the activations of a site are the input of its modules, and not their output."""
    return site == "attention"


def site_width(model: nn.Module, module: nn.Module, of_input: bool) -> int:
    """Width of the activations at a module of a Transformers model: of its input, or of its output."""
    if is_linear(module):
        return in_features(module) if of_input else out_features(module)
    return text_config(model).hidden_size


# How a site's module is found in a decoder block, and what a block without one is said to lack.
_PARTS = {
    "mlp": (mlp_output, "gives the output of their MLP"),
    "attention": (attention_output, "projects the heads of their attention"),
}


def find_sites(
    model: nn.Module,
    site: str,
    *,
    layers: LayerIndices = None,
    target_modules: Iterable[str] | str | None = None,
    exclude_modules: Iterable[str] | str | None = None,
) -> dict[int, str]:
    """Block index to the name of the module whose output, or input at "attention", is collected or edited.

    Args:
        model: a Transformers model, bare or in a `PeftModel` (names are those of the bare model).
        site: "mlp" for the output of the MLP's output projection, "block" for the output of the decoder block,
            "attention" for the input of the attention's output projection, the heads' outputs side by side.
        layers: block indices; None for all.
        target_modules, exclude_modules: names or regular expression instead of the default of the site, matched as in
            PEFT.

    Raises:
        ValueError: no or several modules of a block match, a layer that the model does not have, or an unknown site.
    """
    check_choice("site", site, get_args(Site))
    check_names("target_modules", target_modules)
    check_names("exclude_modules", exclude_modules)
    model = unwrap(model)
    wanted = normalise_layers(layers)
    if target_modules is not None:
        sites: dict[int, str] = {}
        for name, _ in model.named_modules():
            if name and matches(name, target_modules, exclude_modules, wanted):
                index = layer_index(name)
                if index is None or index in sites:
                    other = f" and {sites[index]}" if index is not None else " outside the blocks"
                    raise ArgumentError(
                        Argument("target_modules"), f" must match one module in each block, got {name}{other}"
                    )
                sites[index] = name
        if sites and (missing := sorted(set(wanted or ()) - set(sites))):
            raise ArgumentError(
                Argument("target_modules", target_modules), f" match in layers {sorted(sites)}, not in {missing}"
            )
        if not sites:
            raise ArgumentError(
                f"no module of {type(model).__name__} matches ", Argument("target_modules", target_modules)
            )
        return sites

    blocks = decoder_blocks(model)
    if wanted and wanted[-1] >= len(blocks):
        raise ArgumentError(
            f"{type(model).__name__} has layers 0 to {len(blocks) - 1}, got {wanted[-1]}: lower ",
            Argument("layers_to_transform"),
        )
    blocks = {i: name for i, name in blocks.items() if wanted is None or i in wanted}
    if site == "block":
        return blocks
    find, what = _PARTS[site]
    hidden_size = text_config(model).hidden_size
    found = {i: find(model.get_submodule(name), hidden_size) for i, name in blocks.items()}
    missing = [i for i, name in found.items() if name is None]
    if missing:
        raise ArgumentError(
            f"no module of layers {missing} {what}: pass ",
            *(Argument("layers_to_transform"), " without them, ", Argument("target_modules"), " or "),
            Argument("site", "block"),
        )
    return {i: f"{blocks[i]}.{name}" for i, name in found.items()}


def matches(name: str, target_modules, exclude_modules=None, layers: list[int] | None = None, modules_to_save=None):
    """PEFT's matching of a module name, with the layers checked for every form of `target_modules` (PEFT checks them
    for lists of names only, and never finds the index of a block that is itself the target)."""
    names = SimpleNamespace(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        modules_to_save=modules_to_save,
        target_parameters=None,
    )
    found = check_target_module_exists(names, name)
    return found and (layers is None or layer_index(name) in layers) if found else found


def describe_sites(names: Iterable[str]) -> str:
    """One regular expression, for a configuration file, that matches exactly these module names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parts = name.split(".")
        i = next(i for i, part in enumerate(parts) if part.isdecimal())
        head, tail = ".".join(parts[:i]), ".".join(parts[i + 1 :])
        groups.setdefault((head, tail), []).append(parts[i])
    patterns = []
    for (head, tail), indices in groups.items():
        end = rf"\.{re.escape(tail)}" if tail else ""
        patterns.append(rf"{re.escape(head)}\.({'|'.join(indices)}){end}")
    return "|".join(patterns)


def target_modules(model: nn.Module, names: list[str], layers: list[int] | None) -> set[str] | str:
    """What a configuration calls these modules: the conventional short name, {"down_proj"} or {"mlp.c_proj"}, where it
    hits exactly them in these layers, else a regular expression."""
    for parts in (1, 2):
        short = {".".join(name.split(".")[-parts:]) for name in names}
        hit = {n for n, _ in model.named_modules() if n and matches(n, short, layers=layers)}
        if len(short) == 1 and hit == set(names):
            return short
    return describe_sites(names)
