"""A random edit of every method of the registry at every site that it offers, for the tests of what all methods do.

A new method is tested by them without any change here.
"""

import functools

import torch
from copying import made_once
from peft import get_peft_model
from tiny import logits, vivid_model

from peft_edit.models.sites import find_sites, takes_input, unwrap
from peft_edit.tuners.layer import edit_layers
from peft_edit.tuners.method import methods


# Fields with which the tests see more of an edit: one that merges exactly, a gate that some of the tokens pass, and as
# many heads as a tiny model has.
FIELDS = {"SEA at the MLP": {"rescale": "none"}, "HPR": {"gate": 0.6}, "ITI": {"num_heads": 2}}
PLACES = {"mlp": "MLP", "block": "block"}


def _factory(method, label, fixed):
    def make(**fields):
        return method.config(**{"init_weights": False, **fixed, **FIELDS.get(label, {}), **fields})

    return make


# Label to the method, and to what makes a configuration of a random edit, given more fields.
METHOD_OF, EDITS = {}, {}
for _method in methods().values():
    for _site in _method.sites if len(_method.sites) > 1 else (None,):
        _label = _method.name + (f" at the {PLACES[_site]}" if _site else "")
        METHOD_OF[_label] = _method
        EDITS[_label] = _factory(_method, _label, {"site": _site} if _site else {})


def label_of(config):
    """The label of an adapter's method and site."""
    return next(label for label in EDITS if METHOD_OF[label].config is type(config) and at(label) == config.site)


def at(edit):
    """The site of an edit."""
    return EDITS[edit]().site


@made_once
def edited_model(edit, family="llama", seed=0, dtype=torch.float32, **fields):
    """A vivid model in evaluation mode with a random edit."""
    base = vivid_model(family, dtype)
    torch.manual_seed(seed)
    return get_peft_model(base, EDITS[edit](**fields)).eval()


@made_once
def two_adapters(edit, family="llama", first=None, second=None):
    """Adapters "default" and "other", with further fields for each."""
    model = edited_model(edit, family, **(first or {}))
    torch.manual_seed(1)
    model.add_adapter("other", EDITS[edit](**(second or {})))
    return model


def layers_of(model, adapter="default"):
    """The layers that hold an adapter."""
    return [layer for layer in edit_layers(model) if layer.has_adapter(adapter)]


def outputs(model, edit="block", **kwargs):
    """Block index to the activations of an edit's site there as any later forward hook sees them."""
    seen, handles = {}, []
    site = at(edit) if edit in EDITS else edit
    for index, name in find_sites(model, site).items():
        module = unwrap(model).get_submodule(name)

        def keep(module, *values, index=index):  # a copy: Falcon adds the attention's output to the MLP's in place
            seen[index] = (values[-1][0] if isinstance(values[-1], tuple) else values[-1]).clone()

        hook = module.register_forward_pre_hook if takes_input(site) else module.register_forward_hook
        handles.append(hook(keep))
    logits(model, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def own_parameters(model):
    """Name to parameter of all that edits hold."""
    prefixes = tuple(f".{method.model.prefix}" for method in methods().values())
    return {name: p for name, p in model.named_parameters() if any(prefix in name for prefix in prefixes)}


@functools.cache
def trains(edit):
    """Whether a method's weights can be trained."""
    return any(p.requires_grad for p in edited_model(edit).parameters())


def refusal(call, *args, **kwargs):
    """The message of a call that is refused; None where it is not."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def merges(edit, family="llama"):
    """Whether an edit can be merged into the weights of a model, found by trying."""
    reason = refusal(edited_model(edit, family).merge_adapter)
    assert reason is None or ("'default' cannot be merged" in reason and "\n" not in reason), reason
    assert METHOD_OF[edit].no_merge is None or reason is not None
    return reason is None
