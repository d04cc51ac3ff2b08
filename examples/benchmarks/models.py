"""Models of real shapes with random weights, and adapters with random contents: of a duration only shapes matter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_edit import HPRConfig, SEAConfig
from peft_edit.tuners.layer import edit_layers
from peft_edit.tuners.method import methods


# Of each sign, as fits of real models find them (48 to 126), and of LoRA: an SEA edit is one of rank k+ + k-.
RANK = 64
# How many of 32 blocks the papers edit.
SEA_BLOCKS, HPR_BLOCKS = 21, 5
# Random weights are pieces of one random tensor of so many elements, for to draw billions takes minutes.
DRAWN = 2**22


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the Llama architecture."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.hidden // self.heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=4096,
        )

    @property
    def parameters(self) -> int:
        """Their number."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * head * (self.heads + self.key_value_heads)
        block = attention + 3 * self.hidden * self.intermediate
        return self.layers * block + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def of_layers(self, layers: int) -> Shape:
        """The same with fewer decoder blocks, and a name that says so."""
        return replace(self, name=f"{self.name}, {layers} of its {self.layers} blocks", layers=layers)


SHAPES = (
    Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, tied=True),
    Shape("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000),
    Shape("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256),
)
TINY = Shape("tiny", 64, 128, 4, 4, 2, 256)


def structure(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
    """A model on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def skeleton(hidden: int, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model whose blocks have a hidden size and few weights: to hold an adapter that is fitted or trained."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=1,
        head_dim=8,
        vocab_size=8,
    )
    return structure(config, dtype).to_empty(device=device).requires_grad_(False)


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of a shape with small random weights, in evaluation mode and frozen."""
    model = structure(shape.config, dtype).to_empty(device=device).requires_grad_(False)
    model.tie_weights()
    # What is computed from the configuration, and was empty too.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    drawn = (0.02 * torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1)
            continue
        for piece in parameter.view(-1).split(DRAWN):
            piece.copy_(drawn[: len(piece)])
    return model


def sharing(model: nn.Module, own: str | None = None) -> nn.Module:
    """A copy of a model on the same weights in memory, which are to stay as they are.

    Args:
        model: without adapters.
        own: ending of the names of modules whose weights the copy has for itself, because they will change.
    """
    kept = {name for name, _ in model.named_parameters() if own and f".{own}." in f".{name}"}
    memo = {
        id(p): nn.Parameter(p.data, requires_grad=False) for name, p in model.named_parameters() if name not in kept
    }
    return copy.deepcopy(model, memo)


def orthonormal(rank: int, width: int, seed: int = 0) -> Tensor:
    """(rank, width) with orthonormal rows."""
    drawn = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q.T.contiguous()


def last_blocks(layers: int, of_32: int) -> list[int]:
    """Indices of the last blocks of a model that are edited where it is so many of 32: as many of a model of 30 blocks
    or more, a like share of a smaller one, at least one."""
    count = of_32 if layers >= 30 else max(1, round(layers * of_32 / 32))
    return list(range(layers - count, layers))


def with_sea(base: nn.Module, blocks: Sequence[int], rank: int = RANK, **fields) -> PeftModel:
    """SEA of a rank for each sign at the MLP outputs of some blocks."""
    model = get_peft_model(base, SEAConfig(layers_to_transform=list(blocks), **fields))
    config, factors = model.peft_config["default"], None
    for layer in edit_layers(model):
        factors = factors or [orthonormal(rank, layer.features, seed) for seed in (0, 1)]
        device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        # Each has its own: shared, they would stay in the caches.
        layer.set_factors("default", *(factor.to(device or "cpu", copy=True) for factor in factors), checked=True)
        config.rank_pattern[layer.site] = [rank, rank]
        config.fit_statistics[layer.site] = {
            **dict.fromkeys(("rms", "mean_rescale", "strength"), 1.0),
            **dict.fromkeys(("mean_rescale_deviation", "relative_error", "unscaled_error", "change"), 0.0),
        }
    return model.eval()


def with_hooks(base: nn.Module, sites: Sequence[str], rank: int = RANK) -> nn.Module:
    """The products of `with_sea` at some modules, in hooks that do nothing else: the least that it takes eagerly."""
    factors = [orthonormal(rank, base.config.hidden_size, seed).to(base.device, base.dtype) for seed in (0, 1)]

    def hook(module: nn.Module, args: tuple, output: Tensor, *, positive: Tensor, negative: Tensor) -> Tensor:
        h = output.view(-1, output.shape[-1])
        y = torch.addmm(h, functional.linear(h, positive), positive)
        return y.addmm_(functional.linear(h, negative), negative, alpha=-1).view(output.shape)

    for site in sites:
        positive, negative = (factor.clone() for factor in factors)
        base.get_submodule(site).register_forward_hook(partial(hook, positive=positive, negative=negative))
    return base


def with_hpr(base: nn.Module, blocks: Sequence[int], **fields) -> PeftModel:
    """HPR of random weights on some blocks."""
    torch.manual_seed(0)
    return get_peft_model(base, HPRConfig(selected_layers=list(blocks), init_weights=False, **fields)).eval()


def with_lora(base: nn.Module, blocks: Sequence[int], rank: int = 2 * RANK) -> PeftModel:
    """LoRA at the MLP output projections of some blocks, by default of the rank of an SEA edit."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank, target_modules=["down_proj"], layers_to_transform=list(blocks), init_lora_weights=False, lora_alpha=rank
    )
    return get_peft_model(base, config).eval()


def other_edits() -> Mapping[str, Callable[[nn.Module, Sequence[int]], PeftModel]]:
    """Short name of each further method to what gives a model a random edit of it, on some blocks."""

    def making(config: type) -> Callable[[nn.Module, Sequence[int]], PeftModel]:
        def make(base: nn.Module, blocks: Sequence[int]) -> PeftModel:
            torch.manual_seed(0)
            return get_peft_model(base, config(layers_to_transform=list(blocks), init_weights=False)).eval()

        return make

    own = (SEAConfig, HPRConfig)
    return {method.short: making(method.config) for method in methods().values() if method.config not in own}
