"""Conversations with a base model and its edit side by side: their state and commands, without terminal or page."""

from .chat import BASE, EDITED, Chat, Conversation, Turn
from .models import ChatModels
from .settings import Sampling, Settings


__all__ = ["BASE", "EDITED", "Chat", "ChatModels", "Conversation", "Sampling", "Settings", "Turn"]
