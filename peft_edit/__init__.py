"""Edit a language model's activations as Hugging Face PEFT adapters. Importing it registers SEA and HPR with PEFT."""

from .activations.collect import collect_activations
from .activations.store import ActivationStore
from .adapters.hub import push_to_hub
from .combining import combine_sea
from .conversion import convert_hpr, convert_sea
from .data import load_contrast_set
from .evaluation import evaluate_multiple_choice, perplexity
from .exporting import sea_to_lora
from .fitting import fit_sea
from .merging import merge_checkpoint
from .models.fingerprint import fingerprint
from .registration import leave_cards_to, register
from .selection import select_layers
from .training import HPRTrainer, HPRTrainingArguments
from .tuners.config import EditConfig
from .tuners.editing import edit_strength
from .tuners.hpr import HPRConfig, HPRModel
from .tuners.sea import SEAConfig, SEAModel
from .version import __version__


register("sea", SEAConfig, SEAModel)
register("hpr", HPRConfig, HPRModel)
leave_cards_to(EditConfig)

__all__ = [
    "ActivationStore",
    "HPRConfig",
    "HPRModel",
    "HPRTrainer",
    "HPRTrainingArguments",
    "SEAConfig",
    "SEAModel",
    "__version__",
    "collect_activations",
    "combine_sea",
    "convert_hpr",
    "convert_sea",
    "edit_strength",
    "evaluate_multiple_choice",
    "fingerprint",
    "fit_sea",
    "load_contrast_set",
    "merge_checkpoint",
    "perplexity",
    "push_to_hub",
    "sea_to_lora",
    "select_layers",
]
