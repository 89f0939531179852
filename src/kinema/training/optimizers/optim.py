"""Optimisers: what is typed under `optim`, and which parameters each of them moves how."""

from dataclasses import dataclass, field

import torch
from torch import nn

from kinema.distributed.engine import Precision
from kinema.training.optimizers.blockwise import BlockwiseAdamW
from kinema.training.optimizers.muon import Muon


@dataclass
class AdamW:
    """AdamW (Loshchilov and Hutter 2019) on float32 weights; norms, biases and vectors are not decayed."""

    learning_rate: float = 1e-4
    """Peak rate; the schedule multiplies it."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay of tensors with two or more axes."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"optim.learning_rate={self.learning_rate} must be positive.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} must be two numbers in [0, 1), for example [0.9, 0.99].")
        if self.gradient_clipping <= 0:
            raise ValueError(f"optim.gradient_clipping={self.gradient_clipping} must be positive.")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimiser over the trainable parameters of `module`, in two groups: decayed and not."""
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            fused=True,
        )


@dataclass
class AdamW8bit(AdamW):
    """AdamW with moments of 8 bits for matrices and kernels: 2 bytes a weight, not 8 (Dettmers et al. 2022)."""

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """See `AdamW.build`; vectors keep moments of 32 bits."""
        groups = super().build(module).param_groups
        chosen = [
            {key: group[key] for key in ("params", "weight_decay")} | {"quantized": group["params"][0].ndim >= 2}
            for group in groups
        ]
        return BlockwiseAdamW(chosen, lr=self.learning_rate, betas=tuple(self.betas), eps=self.eps)


@dataclass
class MuonAdamW(AdamW):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, scaled to AdamW's step; AdamW for everything else."""

    momentum: float = 0.95
    """Decay of Muon's momentum, which is Nesterov's."""
    newton_schulz_steps: int = 5
    """Iterations that make the momentum orthogonal."""
    newton_schulz_precision: Precision = Precision.bfloat16
    """Number format of those iterations, which need no more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum={self.momentum} must be in [0, 1), for example 0.95.")
        if self.newton_schulz_steps < 1:
            raise ValueError(f"optim.newton_schulz_steps={self.newton_schulz_steps} must be at least 1; 5 are usual.")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Three groups: hidden matrices and kernels, other decayed tensors, and vectors."""
        hidden = hidden_matrices(module)
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in {id(p) for p in hidden}]
        groups = [
            {"params": hidden, "muon": True, "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p.ndim >= 2], "muon": False, "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "muon": False, "weight_decay": 0.0},
        ]
        return Muon(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=tuple(self.betas),
            eps=self.eps,
            momentum=self.momentum,
            steps=self.newton_schulz_steps,
            dtype=getattr(torch, self.newton_schulz_precision.value),
        )


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Trainable matrices and kernels inside lists of modules: neither what enters the network nor what leaves it."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    inside = {id(p): p for members in lists for p in members.parameters() if p.requires_grad and p.ndim >= 2}
    return [p for p in module.parameters() if id(p) in inside]
