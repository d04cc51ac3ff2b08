"""A contrast set's way through a model: texts are encoded, batched and run, and what the sites give is stored."""
