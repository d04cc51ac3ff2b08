"""Conversations with a base model and its edit side by side: their state and commands, without terminal or page."""

from typing import TYPE_CHECKING

from ..importing import on_first_use


if TYPE_CHECKING:
    from .chat import BASE, EDITED, Chat, Conversation, Turn
    from .models import ChatModels
    from .settings import Sampling, Settings

__getattr__, __dir__, __all__ = on_first_use(__name__)
