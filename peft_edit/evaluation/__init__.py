"""What a model does, with or without an edit, measured."""

from .likelihood import answer_log_likelihoods
from .measuring import evaluate
from .multiple_choice import MultipleChoiceResult, QuestionScore, evaluate_multiple_choice
from .perplexity import perplexity
from .side_effects import SideEffects, side_effects


__all__ = [
    "MultipleChoiceResult",
    "QuestionScore",
    "SideEffects",
    "answer_log_likelihoods",
    "evaluate",
    "evaluate_multiple_choice",
    "perplexity",
    "side_effects",
]
