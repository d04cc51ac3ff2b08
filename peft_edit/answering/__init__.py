"""Answers of a model and of its edit to many prompts, written line by line, and the best of several."""
