"""The optimiser: AdamW with weight decay on matrices only."""

from dataclasses import dataclass, field

import torch
from torch import nn


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
