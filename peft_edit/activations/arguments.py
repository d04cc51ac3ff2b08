"""Options of a collection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..arguments import Argument, ArgumentError, check_options
from ..data.options import PromptOptions
from ..places import EVERY_TOKEN, LayerIndices, OutputSite, RowTokens, Site


@dataclass(kw_only=True)
class CollectArguments(PromptOptions):
    """
    Options of [`collect_activations`].

    Args:
        site (`str` or sequence of `str`):
            "mlp" for the output of the MLP's output projection, "block" for the output of the decoder block,
            "attention" for the outputs of the attention's heads, which are the input of its output projection; or
            several, ("mlp", "block"), in one pass. By default "mlp", and ("mlp", "block") of plain texts.
        target_modules (`str`, list of `str`, *optional*):
            Names or regular expression of other modules, one in a block.
        layers (`int`, list of `int`, *optional*):
            Indices of the decoder blocks, 0 the first. By default all.
        tokens (`str`):
            Which tokens are kept: of an answer "last", "mean", "random" (one row an answer) or "answer" (every token);
            "all" of plain texts, which are no contrast set.
        neutral (`str`, *optional*):
            Where the neutral activation is taken: "generated", the last token of the model's own greedy answer;
            "prompt", the last token of the prompt; "text", the last token of the `neutral` column. "auto": "text" where
            the column has one, else "generated". None for none, which `tokens="answer"` and `"all"` imply.
        answers (`str`):
            Which answers demonstrate: the "first" of each list, a "random" one, or "all", every positive with every
            negative. `tokens="answer"` takes all.
        prompt_format (`str`), template_arguments (`dict`, *optional*), template_time (`str`, *optional*):
            How a prompt and its answer become tokens, see `PromptOptions`. The time is by default the day on
            which the store was begun.
        max_new_tokens (`int`):
            Longest generated answer, in tokens.
        batch_size (`int`, *optional*):
            Most sequences in a batch. By default there is no limit of its own.
        max_tokens_per_batch (`int`):
            Most tokens in a batch, padding included. Cached prompts can take as many again.
        dtype (`str`):
            Of the store.
        seed (`int`):
            Of the random answers and tokens.
        truncate (`bool`):
            Cut prompts on the left, BOS excepted, where a row's longest answer is more than the model takes; cut plain
            texts at the end.
        resume (`bool`):
            Continue or reuse a store that was begun with the same arguments; False replaces it.
    """

    site: str | Sequence[str] | None = field(
        default=None,
        metadata={"help": "mlp, block, attention, or several: mlp,block. Default: mlp, of texts mlp,block."},
    )
    target_modules: Iterable[str] | str | None = field(
        default=None, metadata={"help": "Comma-separated names of other modules, one in a block."}
    )
    layers: LayerIndices = field(default=None, metadata={"help": "Decoder blocks, such as 0-3,7. Default: all."})
    tokens: Literal[RowTokens, "answer", "all"] = field(
        default="last",
        metadata={
            "help": "Tokens kept: one of an answer (last, mean, random), all of it (answer), all of texts (all)."
        },
    )
    neutral: Literal["auto", "generated", "prompt", "text"] | None = field(
        default="auto", metadata={"help": "Where the neutral activation is taken."}
    )
    answers: Literal["first", "random", "all"] = field(default="first", metadata={"help": "Answers that demonstrate."})
    max_new_tokens: int = field(
        default=64, metadata={"help": "Longest generated answer, in tokens.", "minimum": 1, "allowed": "of at least 1"}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Most sequences in a batch.", "minimum": 1, "allowed": "of at least 1"}
    )
    max_tokens_per_batch: int = field(
        default=8192,
        metadata={"help": "Most tokens in a batch, padding included.", "minimum": 1, "allowed": "of at least 1"},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the store.", "option": "--store-dtype"}
    )
    seed: int = field(default=0, metadata={"help": "Of random answers and tokens."})
    truncate: bool = field(
        default=False, metadata={"help": "Cut prompts on the left where a row is more than the model takes."}
    )
    resume: bool = field(
        default=True, metadata={"help": "Go on with a store begun with the same arguments, or replace it."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_options(self)
        sites = self.chosen_sites
        if not sites or set(sites) - set(get_args(Site)):
            choices = ", ".join(map(repr, get_args(Site)))
            raise ArgumentError(Argument("site"), f" must be one of {choices} or several, got {self.site!r}")
        if len(sites) > 1 and self.target_modules is not None:
            raise ArgumentError(Argument("target_modules"), " replace one site: collect several sites without them")
        if self.tokens == "answer":
            self.neutral, self.answers = None, "all"
        if self.of_texts:
            self._check_of_texts()
            self.neutral, self.prompt_format = None, "plain"

    def _check_of_texts(self) -> None:
        """Raise ArgumentError for options that have a meaning for prompts and answers alone."""
        fits = {
            "prompt_format": ("auto", "plain"),
            "template_arguments": (None, {}),
            "template_time": (None,),
            "neutral": ("auto", None),
            "answers": ("first",),
            "max_new_tokens": (CollectArguments.max_new_tokens,),
        }
        for name, values in fits.items():
            if getattr(self, name) not in values:
                raise ArgumentError(
                    *(Argument("tokens", "all"), " takes plain texts, which have no "),
                    *(Argument(name), ": leave it out"),
                )

    @property
    def chosen_sites(self) -> list[str]:
        """The sites; empty where `site` is none."""
        if self.site is None:
            return list(get_args(OutputSite)) if self.of_texts and self.target_modules is None else ["mlp"]
        given = [self.site] if isinstance(self.site, str) else self.site
        return list(dict.fromkeys(given)) if isinstance(given, Iterable) else []

    @property
    def of_texts(self) -> bool:
        """Whether plain texts are collected, and no contrast set."""
        return self.tokens == "all"

    @property
    def every_token(self) -> bool:
        """Whether all tokens of a span are rows of their own."""
        return self.tokens in EVERY_TOKEN
