"""What of a model is trained: everything, chosen parts of it, or low-rank adapters beside its linear layers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kinema.models.dit import name_in_expert

ONE = "default"
"""The name that peft gives to an only adapter."""
OPERATIONS = "blocks.*.sublayers.*.operation.*"
"""The linear layers of attention and MLP in every block."""


@dataclass
class Full:
    """Every parameter."""

    def prepare(self, model: nn.Module) -> str:
        """Freeze what is not trained, before an optimiser sees the model; returns a line for the run's header."""
        return trained_line(model)


@dataclass
class Parts:
    """Only the parameters with these names; the others stay as they were when the run began."""

    train: list[str] = field(default_factory=lambda: [OPERATIONS])
    """Patterns over parameter names, where `*` stands for anything."""

    def prepare(self, model: nn.Module) -> str:
        """As `Full.prepare`."""
        chosen = set(matching(self.train, list(trained_parameters(model)), "finetune.train"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return trained_line(model)


@dataclass
class LoRA:
    """Low-rank adapters beside linear layers of a frozen DiT (Hu et al. 2022), by the `peft` library.

    A layer with weight W computes (W + alpha / rank * B A) x; B starts at zero, so the first output is the base's own.
    """

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """Strength of the adapter; its weight is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapters' inputs that are zeroed in training."""
    targets: list[str] = field(default_factory=lambda: [OPERATIONS])
    """Patterns over names of linear layers, where `*` stands for anything."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"finetune.rank={self.rank} and finetune.alpha={self.alpha} must be above zero.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"finetune.dropout={self.dropout} must be in [0, 1).")

    def prepare(self, model: nn.Module) -> str:
        """As `Full.prepare`."""
        from peft import LoraConfig, inject_adapter_in_model

        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        linear = [name for name in linear if model.get_submodule(name).weight.requires_grad]  # not of a frozen expert
        chosen = matching(self.targets, linear, "finetune.targets")
        exactly = "|".join(re.escape(name) for name in chosen)  # peft takes names in a list as endings of names
        strength: Any = self.alpha  # peft says int and takes any number
        config = LoraConfig(r=self.rank, lora_alpha=strength, lora_dropout=self.dropout, target_modules=exactly)
        inject_adapter_in_model(config, model)
        return f"adapters of rank {self.rank} on {len(chosen)} linear layers, {trained_line(model)}"


@dataclass(frozen=True)
class Adapter:
    """What was added to the weight (out, in) of one linear layer: scale * up @ down."""

    down: Tensor
    """(rank, in)"""
    up: Tensor
    """(out, rank)"""
    scale: float


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the name of their layer; none of a model without."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {
        name: Adapter(layer.lora_A[ONE].weight.detach(), layer.lora_B[ONE].weight.detach(), layer.scaling[ONE])
        for name, layer in layers.items()
    }


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as it was before adapters came in."""
    state = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model that computes what a model with adapters computes."""
    weights = base_weights(model)
    for name, adapter in adapters_of(model).items():
        key = f"{name}.weight"
        weights[key] = weights[key] + adapter.scale * adapter.up @ adapter.down
    return weights


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def matching(patterns: Iterable[str], names: list[str], key: str) -> list[str]:
    """The names that any of the patterns matches, in their order; ValueError for a pattern that matches none.

    Layers of two experts go by the names that they have in their expert too: `blocks.*` is those of both.
    """
    patterns = list(patterns)
    if not patterns:
        raise ValueError(f"{key}=[] chooses nothing. Type patterns over names such as {names[0]} or {OPERATIONS}.")
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            near = sorted(names, key=lambda name: likeness(name, pattern), reverse=True)[:3]
            raise ValueError(f"{key}: {pattern} matches none of {len(names)} names. Near it are {', '.join(near)}.")
    return [name for name in names if any(fits(name, pattern) for pattern in patterns)]


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name, or the one within its expert."""
    return fnmatchcase(name, pattern) or fnmatchcase(name_in_expert(name), pattern)


def likeness(name: str, pattern: str) -> tuple[float, float]:
    """How near the last words of two dotted names are, then the whole names."""
    last = SequenceMatcher(None, name.rpartition(".")[2], pattern.rpartition(".")[2]).ratio()
    return last, SequenceMatcher(None, name, pattern).ratio()


def trained_line(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    everything = list(model.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    count, whole = sum(p.numel() for p in trained), sum(p.numel() for p in everything)
    share = f"{count:,} of {whole:,} parameters ({count / whole:.1%})"
    return f"trains {len(trained)} of {len(everything)} tensors, {share}"


def frozen_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not trained, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}


@torch.no_grad()
def assign(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model weights by name, all that are given; what it holds besides stays."""
    own = model.state_dict()
    for name, value in weights.items():
        own[name].copy_(value)
