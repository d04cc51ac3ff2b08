"""Which adapter of a model is meant, and whether an activation store suits it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from peft import PeftConfig
from torch import nn

from ..activations.store import ActivationStore
from ..arguments import Argument, ArgumentError
from ..data.names import data_name
from ..models.fingerprint import fingerprint
from ..models.sites import layer_index, takes_input, without_wrappers
from ..tuners.layer import EditLayer, edit_layers
from ..tuners.method import methods


logger = logging.getLogger(__name__)

# Tokens of texts to leave alone, below which they say nothing.
MIN_RETAINED = 100

Config = TypeVar("Config", bound=PeftConfig)
Layer = TypeVar("Layer", bound=EditLayer)


def find_config(model: nn.Module, adapter_name: str | None, config_cls: type[Config]) -> tuple[str, Config]:
    """Name and configuration of an adapter.

    Args:
        model: from `get_peft_model`, or a Transformers model after `add_adapter`.
        adapter_name: None for the active one.
        config_cls: of the method.

    Raises:
        ValueError: there is no such adapter, or it is of another method.
    """
    model = without_wrappers(model)
    configs = getattr(model, "peft_config", {})
    if adapter_name is None:
        active = getattr(model, "active_adapters", [])
        active = active() if callable(active) else active  # a method in Transformers, a property in PEFT
        if len(active) != 1:
            raise ArgumentError(
                f"{len(active)} adapters are active ({', '.join(active) or 'none'}): pass ", Argument("adapter_name")
            )
        adapter_name = active[0]
    config = configs.get(adapter_name)
    if not isinstance(config, config_cls):
        found = ", ".join(f"{name} ({config.peft_type.value})" for name, config in configs.items()) or "none"
        method = next((method.short for method in methods().values() if method.config is config_cls), "PEFT")
        raise ValueError(
            f"{adapter_name!r} is no {method} adapter of this model (adapters: {found}): "
            f"add one of {method}, or pass another adapter"
        )
    return adapter_name, config


def find_adapter(
    model: nn.Module, adapter_name: str | None, config_cls: type[Config], layer_cls: type[Layer]
) -> tuple[str, Config, dict[int, Layer]]:
    """Name, configuration and layers, by index of the decoder block, of an adapter; see `find_config`.

    Args:
        layer_cls: of the method.

    Raises:
        ValueError: there is no such adapter, it is of another method, or it edits several modules of one block.
    """
    adapter_name, config = find_config(model, adapter_name, config_cls)
    layers: dict[int, Layer] = {}
    for layer in model.modules():
        if isinstance(layer, layer_cls) and layer.has_adapter(adapter_name):
            index = layer_index(layer.site)
            if index is None or index in layers:
                raise ArgumentError(
                    f"an adapter is fitted with one site in a block, got {layer.site}: change ",
                    Argument("target_modules"),
                )
            layers[index] = layer
    return adapter_name, config, dict(sorted(layers.items()))


def check_unmerged(layers: Iterable[EditLayer], doing: str) -> None:
    """Raise ValueError where adapters are merged at any of the layers. `doing` is what cannot be done: "fit"."""
    if any(layer.merged for layer in layers):
        raise ValueError(f"cannot {doing} while adapters are merged: call unmerge_adapter first")


def replace_config(model: nn.Module, adapter_name: str, **changes: Any) -> PeftConfig:
    """Give an adapter a new configuration with some fields changed. The old one may be an object of the user's, who
    passes it again, and stays as it is.

    Args:
        model: with the adapter.
        adapter_name: of the adapter.
        changes: field to value.
    """
    config = replace(without_wrappers(model).peft_config[adapter_name], **changes)
    give_config(model, adapter_name, config)
    return config


def give_config(model: nn.Module, adapter_name: str, config: PeftConfig) -> None:
    """Let an adapter that is in a model have a configuration, this very object."""
    model = without_wrappers(model)
    model.peft_config[adapter_name] = config
    for layer in edit_layers(model):
        if layer.has_adapter(adapter_name):
            layer.set_config(adapter_name, config)


def check_store(
    model: nn.Module,
    store: ActivationStore,
    site: str,
    layers: Mapping[int, EditLayer],
    allow_fingerprint_mismatch: bool = False,
) -> ActivationStore:
    """The store, read at the site of an adapter. Raises ValueError unless its activations are of this model there, and
    of tokens that the adapter's method learns from.

    Args:
        model: with the adapter.
        store: the activations.
        site: "mlp", "block" or "attention".
        layers: block index to the adapter's layers.
        allow_fingerprint_mismatch: accept a store of a model with other weights.
    """
    _check_tokens(store, layers)
    return _check_origin(model, store, site, layers, allow_fingerprint_mismatch)


def check_retain(
    model: nn.Module,
    store: ActivationStore,
    site: str,
    layers: Mapping[int, EditLayer],
    allow_fingerprint_mismatch: bool = False,
) -> ActivationStore:
    """The store of texts that an edit shall leave alone, read at the site of an adapter. Raises ValueError unless it is
    one, of this model there, and of enough tokens. The arguments are those of `check_store`."""
    if store.tokens != "all":
        raise ArgumentError(
            *(f"{store.path} holds {store.held}, to ", Argument("retain"), " are plain texts: collect some with "),
            Argument("tokens", "all"),
        )
    if len(store) < MIN_RETAINED:
        raise ArgumentError(
            f"{store.path} holds {len(store)} tokens, too few to say what to ",
            *(Argument("retain"), f": collect texts of at least {MIN_RETAINED}"),
        )
    return _check_origin(model, store, site, layers, allow_fingerprint_mismatch)


def _check_origin(model, store, site, layers, allow_fingerprint_mismatch) -> ActivationStore:
    """The store, read at a site, where it is of this model and of these layers."""
    if site not in store.sites:
        held = " and ".join(map(repr, store.sites))
        what = "activations" if any(map(takes_input, store.sites)) else "output"
        raise ValueError(f"{store.path} holds the {what} of {held}, the adapter edits {site!r}: collect that site")
    store = store.at(site)
    _check_layers(store, layers)
    if active := store.metadata["active_adapters"]:
        logger.warning(
            "%s was collected while adapters were active (%s): it suits a model that has them active too",
            store.path,
            ", ".join(active),
        )
    if not allow_fingerprint_mismatch:
        _check_model(store, model)
    return store


def _check_tokens(store: ActivationStore, layers: Mapping[int, EditLayer]) -> None:
    """Raise ArgumentError unless the method of these layers learns from the tokens of a store."""
    for method in methods().values():
        of_method = any(isinstance(layer, method.layer) for layer in layers.values())
        if of_method and store.tokens not in method.tokens:
            raise ArgumentError(
                f"{store.path} holds {store.held}: collect with ",
                Argument("tokens", method.tokens[0]),
                f" for {method.short}",
            )


def _check_layers(store: ActivationStore, layers: Mapping[int, EditLayer]) -> None:
    """Raise ValueError unless a store has the modules of these layers."""
    if missing := sorted(set(layers) - set(store.layers)):
        raise ArgumentError(
            f"{store.path} has layers {store.layers}, the adapter also edits {missing}: "
            "collect those layers too, or make an adapter without them (",
            *(Argument("layers_to_transform"), ")"),
        )
    for index, layer in layers.items():
        module = store.modules[index]
        if module is not None and module != layer.site:
            raise ArgumentError(
                f"{store.path} holds the {'input' if layer.of_input else 'output'} of {module}, the adapter edits "
                f"{layer.site}: pass the same ",
                Argument("target_modules"),
            )
        if store.hidden_size != layer.features:
            raise ValueError(
                f"{store.path} has hidden size {store.hidden_size}, {layer.site} has {layer.features}: "
                "it is of another model"
            )


def _check_model(store: ActivationStore, model: nn.Module) -> None:
    """Raise ArgumentError where a store was collected from a model with other weights."""
    of_store = store.metadata["fingerprint"]
    if of_store is None:
        return
    of_model = fingerprint(model)
    if of_model is None:
        logger.warning(
            "%s cannot be compared with the weights of the model, which are not loaded and not on this machine: only "
            "its layers and its hidden size were checked",
            store.path,
        )
    elif of_store != of_model:
        raise ArgumentError(
            f"{store.path} was collected from another model ({store.metadata['model']}, fingerprint {of_store}; "
            f"this model has {of_model}): collect again, or pass ",
            Argument("allow_fingerprint_mismatch", True),
        )


def describe_data(store: ActivationStore) -> dict[str, Any]:
    """What a configuration keeps of the data that an adapter comes from: the name and what is known of it, how its
    activations were collected, and the number of questions."""
    metadata = store.metadata
    known = {
        **_describe_source(store),
        **{key: metadata.get(key) for key in ("tokens", "neutral", "prompt_format")},
    }
    return {
        **{key: value for key, value in known.items() if value is not None},
        "questions": len(store.questions().unique()),
    }


def describe_retained(store: ActivationStore) -> dict[str, Any]:
    """What a configuration keeps of the texts to leave alone: the same, and the numbers of texts and of tokens."""
    source = {key: value for key, value in _describe_source(store).items() if value is not None}
    return {**source, "texts": len(store.questions().unique()), "tokens": len(store)}


def _describe_source(store: ActivationStore) -> dict[str, Any]:
    source = store.metadata.get("data") or {}
    name = source.get("name")
    return {"data": data_name(name) if name else None, **{key: source.get(key) for key in ("subset", "split", "files")}}
