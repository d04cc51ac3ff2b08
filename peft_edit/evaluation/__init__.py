"""What a model does, with or without an edit, measured."""
