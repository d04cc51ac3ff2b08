"""Edit a language model's activations as Hugging Face PEFT adapters. Importing it registers every method with PEFT."""

from .activations.collect import collect_activations
from .activations.store import ActivationStore
from .adapters.card import write_card_of_saved
from .adapters.hub import push_to_hub
from .adapters.save import replaced_adapters
from .answering import generate_answers
from .choosing import calibrate, sweep
from .data import load_contrast_set
from .evaluation import evaluate, evaluate_multiple_choice, perplexity, side_effects
from .explaining import explain_edit
from .merging import merge_checkpoint
from .models.fingerprint import fingerprint
from .tuners.config import EditConfig
from .tuners.method import methods
from .tuners.registration import save_into, write_cards_with
from .tuners.strength import edit_strength
from .version import __version__


# The methods, in the order in which they are shown: each line registers one and takes over its public names.
# isort: off
from .tuners.sea import *
from .tuners.hpr import *
from .tuners.mean_difference import *
from .tuners.iti import *
from .tuners.diff import *
# isort: on


write_cards_with(EditConfig, write_card_of_saved)
save_into(EditConfig, replaced_adapters)

__all__ = [
    "ActivationStore",
    "__version__",
    "calibrate",
    "collect_activations",
    "edit_strength",
    "evaluate",
    "evaluate_multiple_choice",
    "explain_edit",
    "fingerprint",
    "generate_answers",
    "load_contrast_set",
    "merge_checkpoint",
    "perplexity",
    "push_to_hub",
    "side_effects",
    "sweep",
    *(name for method in methods().values() for name in method.public),
]
