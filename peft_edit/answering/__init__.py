"""Answers of a model and of its edit to many prompts, written line by line, and the best of several."""

from .generate import generate_answers


__all__ = ["generate_answers"]
