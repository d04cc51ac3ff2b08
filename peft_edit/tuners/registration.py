"""Makes PEFT know the methods of this package. The only place that changes PEFT's globals."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


if TYPE_CHECKING:
    from .config import EditConfig


def peft_type(name: str) -> PeftType:
    """The member of `PeftType` for a method, by its name in upper case: PEFT has no plug-in point, so it is added on
    first use, as `aenum.extend_enum` does it."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # 3.12 and later look members up on the class, earlier versions through the map.
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


def register_with_peft(config_cls: type[EditConfig], model_cls: type) -> None:
    """Register a method with PEFT under its lower-case name. Registering it again changes nothing.

    Raises:
        ValueError: another method has the name.
    """
    name = config_cls.method
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type(name))
    if known is None:
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
    elif (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        raise ValueError(f"PEFT has a method {name} already ({known.__module__}): give this one another name")


def write_cards_with(config_cls: type[EditConfig], writer: Callable) -> None:
    """Let adapters whose configurations are of this class write their own model cards. Doing it again changes nothing.

    PEFT asks no method about the card. Before an adapter gets a say, it fills in a template, or changes the README.md
    that is there, also one that a user has written.

    Args:
        config_cls: base class of the configurations.
        writer: (folder, configuration), writes the card.
    """
    config_cls.card_writer = staticmethod(writer)
    of_peft = PeftModel.create_or_update_model_card
    if of_peft.__module__ == __name__:
        return

    def create_or_update_model_card(self: PeftModel, output_dir: str | os.PathLike) -> None:
        # All adapters of a PeftModel are of one method.
        if not any(isinstance(config, config_cls) for config in self.peft_config.values()):
            of_peft(self, output_dir)

    PeftModel.create_or_update_model_card = create_or_update_model_card


def save_into(config_cls: type[EditConfig], replaced: Callable[[Path], AbstractContextManager[Path]]) -> None:
    """Let adapters whose configurations are of this class be saved whole or not at all. Doing it again changes nothing.

    PEFT writes the weights into their place, and the configuration after them: an interruption would leave new weights
    with an old configuration.

    Args:
        config_cls: base class of the configurations.
        replaced: gives, for a folder, another one whose files move there at the end of a `with` block.
    """
    of_peft = PeftModel.save_pretrained
    if of_peft.__module__ == __name__:
        return

    @wraps(of_peft, assigned=("__doc__", "__name__", "__qualname__"))
    def save_pretrained(self: PeftModel, save_directory: str, *args, **kwargs) -> None:
        given = signature(of_peft).bind(self, save_directory, *args, **kwargs).arguments
        edits = any(isinstance(config, config_cls) for config in self.peft_config.values())
        if edits and given.get("path_initial_model_for_weight_conversion") is not None:
            # PEFT refuses too, after it has written a configuration over the one in that folder.
            self.base_model.subtract_mutated_init()
        # PEFT itself refuses a file, and writes nothing in other processes than the main one.
        if not edits or not given.get("is_main_process", True) or os.path.isfile(save_directory):
            of_peft(self, save_directory, *args, **kwargs)
            return
        with replaced(Path(save_directory)) as folder:
            of_peft(self, str(folder), *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained
