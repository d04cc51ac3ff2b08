"""Benchmarks: time and memory of everything against the published formulation, the unedited model, LoRA and the limit.

    python -m examples.benchmarks --device cpu --json out.json

See `examples/benchmarks.md` for what is measured, and for figures.
"""
