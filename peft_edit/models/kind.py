"""Which models are read and evaluated here: those that read a text from left to right, and predict its next token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from ..arguments import Argument, ArgumentError
from .sites import unwrap


# Of AutoModelForCausalLM, and nevertheless with tokens that see later ones, unless they are given masks of their own.
BIDIRECTIONAL = ("cpmant", "xlnet")
REMEDY = "pass a causal language model, as AutoModelForCausalLM loads it"


def check_causal(model: nn.Module) -> None:
    """Raise ValueError for a model whose tokens see later ones, or that reads a prompt apart from its answer: an
    encoder-decoder, an encoder. A causal decoder without an LM head passes.

    Args:
        model: bare, compiled, spread over devices or in a `PeftModel`.
    """
    bare = unwrap(model)
    reason = why_not_causal(getattr(bare, "config", None))
    if reason is not None:
        raise ValueError(f"{type(bare).__name__} is {reason}: {REMEDY}")


def why_not_causal(config: PretrainedConfig | None) -> str | None:
    """What a model of this configuration is instead of a causal one, "an encoder"; None for a causal one, and for a
    configuration of another library, which says nothing."""
    if not isinstance(config, PretrainedConfig):
        return None
    if config.is_encoder_decoder:
        return "an encoder-decoder, which reads the prompt apart from the answer"
    text = config.get_text_config(decoder=True)
    is_decoder = getattr(config, "is_decoder", None)
    # Encoders that can be configured as decoders have the flag; most decoders have none, or a meaningless one.
    encoder = (type(config).is_encoder_decoder or config.model_type == "bert-generation") and is_decoder is False
    encoder |= type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (is_decoder or getattr(config, "causal", False))
    encoder |= config.model_type in BIDIRECTIONAL
    encoder |= getattr(text, "use_bidirectional_attention", None) in (True, "all")
    return "an encoder, whose tokens see those that follow" if encoder else None


def has_head(model: nn.Module) -> bool:
    """Whether a model predicts tokens: it has one LM head."""
    bare = unwrap(model)
    try:
        head = bare.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # as models without a head have it, each in its own way
        head = None
    return isinstance(head, nn.Module) and hasattr(head, "weight")


def check_language_model(model: nn.Module) -> None:
    """Raise ValueError unless a model is causal and has an LM head, as whatever scores answers needs it."""
    check_causal(model)
    if not has_head(model):
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no LM head, which gives tokens their likelihoods: {REMEDY}"
        )


def can_generate(model: nn.Module) -> bool:
    """Whether a model has what generates answers."""
    bare = unwrap(model)
    return has_head(bare) and hasattr(bare, "can_generate") and bare.can_generate()


def check_generates(model: nn.Module) -> None:
    """Raise ArgumentError unless a model can generate neutral answers."""
    if not can_generate(model):
        raise ArgumentError(
            f"{type(unwrap(model)).__name__} cannot generate neutral answers: load the model with its LM head "
            "(AutoModelForCausalLM), or pass ",
            Argument("neutral", "prompt"),
        )


def check_vocabulary(model: nn.Module, sequences: Iterable[Sequence[int]], what: str) -> None:
    """Raise ValueError for a token id that the model has no embedding for.

    Args:
        model: without a `PeftModel` around it.
        sequences: token ids.
        what: they are of, "row 3".
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max((max(ids) for ids in sequences if len(ids)), default=-1)
    if largest >= vocabulary:
        raise ValueError(
            f"{what}: the tokenizer gives the id {largest}, the model has embeddings for {vocabulary} ids: "
            "pass the model's own tokenizer, or resize its embeddings"
        )
