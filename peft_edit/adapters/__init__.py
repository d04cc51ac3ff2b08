"""Adapters as they lie on disk and on the Hub: read, matched with a model and a store, saved, described, uploaded."""
