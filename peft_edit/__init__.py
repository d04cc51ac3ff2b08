"""Edit a language model's activations as Hugging Face PEFT adapters. Importing it registers SEA and HPR with PEFT."""

from .activations.collect import collect_activations
from .activations.store import ActivationStore
from .adapters.hub import push_to_hub
from .data import load_contrast_set
from .evaluation import evaluate_multiple_choice, perplexity
from .merging import merge_checkpoint
from .models.fingerprint import fingerprint
from .tuners.config import EditConfig
from .tuners.hpr import HPRConfig, HPRModel
from .tuners.hpr.convert import convert_hpr
from .tuners.hpr.select import select_layers
from .tuners.hpr.train import HPRTrainer, HPRTrainingArguments
from .tuners.layer import edit_strength
from .tuners.registration import leave_cards_to, register
from .tuners.sea import SEAConfig, SEAModel
from .tuners.sea.combine import combine_sea
from .tuners.sea.convert import convert_sea
from .tuners.sea.export_lora import sea_to_lora
from .tuners.sea.fit import fit_sea
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
