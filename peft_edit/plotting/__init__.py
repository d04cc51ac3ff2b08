"""Results -> figures of matplotlib, legible in black and white. They need the extra `plots`."""

from .damage import side_effects_figure
from .layers import curve_figure, probe_figure, signature_figure, spectrum_figure
from .measures import category_figure, demonstrations_figure, measure_figure
from .settings import front_figure, layer_count_figure
from .stored import norms_figure, scatter_figure
from .style import save_figure, svg_text


__all__ = [
    "category_figure",
    "curve_figure",
    "demonstrations_figure",
    "front_figure",
    "layer_count_figure",
    "measure_figure",
    "norms_figure",
    "probe_figure",
    "save_figure",
    "scatter_figure",
    "side_effects_figure",
    "signature_figure",
    "spectrum_figure",
    "svg_text",
]
