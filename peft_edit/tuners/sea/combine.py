"""Several SEA adapters -> one: a joint edit, for example for truthfulness and fairness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ...activations.store import Store, open_store
from ...adapters.match import check_store, check_unmerged, find_adapter, find_config
from ...arguments import Argument, ArgumentError
from ...models.sites import layer_index, target_modules, unwrap, without_wrappers
from .config import FIT_SETTINGS, SEAConfig
from .fit import site_statistics
from .layer import SEALayer
from .subspaces import join


# What the edits must have in common, because the joint edit has one of each.
COMMON = ("site", "projections", "rescale", "strength")


def combine_sea(
    model: nn.Module,
    adapters: Sequence[str],
    adapter_name: str | None = None,
    store: Store | None = None,
) -> str:
    """Make one SEA adapter of several fitted ones, that does what each of them does.

    With the factors of the edits a, b, ... the joint edit is

        y = h + U+ (U+^T h) - U- (U-^T h)
        U+ U+^T = the orthogonal projection nearest to the sum of U+_a U+_a^T, U+_b U+_b^T, ...; likewise U-

    nearest in the Frobenius norm: U+ spans the eigenvectors of the sum whose eigenvalues are above 1/2. Directions of
    two edits less than 60 degrees apart become one, their mean; of those further apart both stay. So it amplifies,
    once, what any edit amplifies, removes what any removes, and leaves alone what one amplifies and another removes.
    Equal edits give themselves, the order does not matter, and the result is an ordinary SEA adapter: saved, merged and
    exported like any other, of at most the sum of the ranks. Where one adapter alone edits a site, its edit stays. The
    energies in its configuration are those of the first adapter; `fitted_on["combined"]` has the data and the energies
    of each.

    That is not one edit after the other, as several active adapters are, M_b M_a h: there a direction that both amplify
    grows fourfold instead of twofold, and where the spans are oblique to each other the order matters. The two agree
    where the spans of one edit are orthogonal to those of the other.

    Where the demonstrations are at hand, one fit to those of all behaviours together (`concatenate_datasets` of
    contrast sets, then `collect_activations` and `fit_sea`) knows more than the fitted factors do.

    Args:
        model: a model with the adapters. They stay as they are, and active or not.
        adapters: their names, at least two.
        adapter_name: of the new adapter; None joins the names by "_and_". `model.set_adapter` makes it the active one.
        store: neutral activations of this model, from which the statistics of the rescaling are taken. Without it there
            are none: rescale="mean" is refused, and rescale="token" edits but neither merges nor exports.

    Returns:
        The new adapter's name.

    Raises:
        ValueError: an adapter is missing, merged, not fitted, has a feature map or modules_to_save, or differs from
            the others in its site, projections, rescale, strength or base model; the name is taken; the store is of
            another model.
    """
    model = without_wrappers(model)
    configs = _configs(model, adapters)
    config = configs[0]
    adapter_name = "_and_".join(adapters) if adapter_name is None else adapter_name
    if not adapter_name or "." in adapter_name:
        raise ArgumentError(
            *(Argument("adapter_name"), f" must be a name without dots, got {adapter_name!r}: pass "),
            Argument("adapter_name"),
        )
    if adapter_name in model.peft_config:
        raise ArgumentError(
            f"the model already has an adapter {adapter_name!r}: pass another ", Argument("adapter_name")
        )
    if store is None and config.rescale == "mean":
        raise ArgumentError(
            *(Argument("rescale", "mean"), " needs that of the joint edit: pass "),
            *(Argument("store"), ", with neutral activations"),
        )
    if store is not None:
        store = open_store(store)
        for name in adapters:
            store = check_store(model, store, config.site, find_adapter(model, name, SEAConfig, SEALayer)[2])

    layers = [m for m in model.modules() if isinstance(m, SEALayer) and any(map(m.is_fitted, adapters))]
    check_unmerged(layers, "combine")
    factors, statistics = {}, {}
    for layer in tqdm(layers, desc="combining", unit="layer", leave=None):
        fitted = [layer.factors(name) for name in adapters if layer.is_fitted(name)]
        both = [join(parts) for parts in zip(*fitted, strict=True)]
        factors[layer.site] = both
        if store is not None:
            neutral = store.neutral(layer_index(layer.site)).double()
            statistics[layer.site] = site_statistics(neutral, *both, config)

    joint = replace(
        config,
        target_modules=target_modules(unwrap(model), list(factors), None),
        exclude_modules=None,
        layers_to_transform=None,
        rank_pattern={site: [len(factor) for factor in both] for site, both in factors.items()},
        fit_statistics=statistics,
        fitted_on=_provenance(adapters, configs),
        base_model_fingerprint=next((c.base_model_fingerprint for c in configs if c.base_model_fingerprint), None),
    )
    for layer in layers:
        device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        layer.update_layer(adapter_name, joint)
        layer.set_factors(adapter_name, *(f.float().to(device) for f in factors[layer.site]), checked=True)
    model.peft_config[adapter_name] = joint
    return adapter_name


def _provenance(adapters: Sequence[str], configs: Sequence[SEAConfig]) -> dict[str, Any]:
    """What a joint edit keeps of the data that each adapter was fitted on, and how; of one that is itself a joint edit,
    what that has of its own. Nothing where nothing is known of any."""
    parts: list[dict[str, Any]] = []
    for name, config in zip(adapters, configs, strict=True):
        how = {field: getattr(config, field) for field in FIT_SETTINGS} if config.fitted_on else {}
        parts += config.fitted_on.get("combined") or [{"adapter": name, **config.fitted_on, **how}]
    return {"combined": parts} if any(len(part) > 1 for part in parts) else {}


def _configs(model: nn.Module, adapters: Sequence[str]) -> list[SEAConfig]:
    """Configurations of the adapters, which suit each other."""
    if isinstance(adapters, str) or len(set(adapters)) < 2 or len(set(adapters)) < len(adapters):
        raise ArgumentError(Argument("adapters"), f" must be two or more different names, got {adapters!r}")
    configs = [find_config(model, name, SEAConfig)[1] for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        if config.feature_map is not None:
            raise ValueError(
                f"adapter {name!r} has the feature map {config.feature_map!r}, whose directions are not those of "
                "activations: fit one adapter to the demonstrations of all behaviours together"
            )
        if config.modules_to_save:
            raise ValueError(f"adapter {name!r} has modules_to_save, which cannot be joined: fit one without them")
        if not config.rank_pattern:
            raise ValueError(f"adapter {name!r} edits nothing: fit it first")
        for field in COMMON:
            if getattr(config, field) != getattr(configs[0], field):
                raise ArgumentError(
                    *("adapters to combine must agree in ", Argument(field)),
                    f", got {getattr(configs[0], field)!r} of "
                    f"{adapters[0]!r} and {getattr(config, field)!r} of {name!r}: change one in its configuration, "
                    "or fit it again",
                )
    fingerprints = {config.base_model_fingerprint for config in configs} - {None}
    if len(fingerprints) > 1:
        raise ValueError(
            f"the adapters were fitted on different models (fingerprints {', '.join(sorted(fingerprints))}): "
            "combine adapters of one model"
        )
    return configs
