"""One page about an adapter: what it was made of, what it does, and to what else."""

from .report import Material, report_page


__all__ = ["Material", "report_page"]
