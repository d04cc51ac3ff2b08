"""Edit a language model's activations as Hugging Face PEFT adapters. Importing it lets PEFT know every method.

All other names are imported when they are used.
"""

from typing import TYPE_CHECKING

from . import plugin
from .importing import on_first_use
from .version import __version__


if TYPE_CHECKING:
    from .activations.collect import collect_activations
    from .activations.store import ActivationStore
    from .adapters.hub import push_to_hub
    from .answering.generate import generate_answers
    from .choosing.calibrate import calibrate
    from .choosing.sweep import sweep
    from .data import load_contrast_set
    from .evaluation.measuring import evaluate
    from .evaluation.multiple_choice import evaluate_multiple_choice
    from .evaluation.perplexity import perplexity
    from .evaluation.side_effects import side_effects
    from .explaining import explain_edit
    from .merging import merge_checkpoint
    from .models.fingerprint import fingerprint
    from .tuners.diff import DiffConfig, DiffModel, DiffTrainer, DiffTrainingArguments
    from .tuners.hpr import HPRConfig, HPRModel, HPRTrainer, HPRTrainingArguments, convert_hpr, select_layers
    from .tuners.iti import ITIConfig, ITIModel, fit_iti
    from .tuners.mean_difference import MeanDifferenceConfig, MeanDifferenceModel, fit_mean_difference
    from .tuners.sea import SEAConfig, SEAModel, combine_sea, convert_sea, fit_sea, sea_to_lora
    from .tuners.strength import edit_strength

__getattr__, __dir__, __all__ = on_first_use(__name__)
__all__ = ["__version__", *__all__]

if not plugin.starts_command_line():
    plugin.register()
