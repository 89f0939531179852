"""AdamW with moments of 8 bits, quantised block by block (Dettmers et al. 2022), in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kinema.distributed.optimizer_state import ADAM_STATE, Allocate

BLOCK = 256
"""Values that share one scale, their largest magnitude: an outlier spoils its own block only."""
CHUNK = 1 << 22
"""Values that are float32 at a time, a multiple of `BLOCK`."""


def codebook(signed: bool) -> Tensor:
    """The values in [-1, 1] or [0, 1] that 8 bits stand for, ascending: dynamic tree quantisation (section 1.3).

    Leading zeros count decades, the rest of the bits divide a decade evenly. Each decade ends at a power of ten, so 1
    and -1 are exact, and quantising what was quantised changes nothing.
    """
    bits = 7 if signed else 8
    decades = [10.0**-zeros * (0.1 + 0.9 * steps(2 ** (bits - 1 - zeros))) for zeros in range(bits)]
    positive = torch.cat(decades).sort().values
    parts = [-positive.flip(0), torch.zeros(1), positive] if signed else [torch.zeros(1), positive]
    return torch.cat(parts).to(torch.float32)


def steps(count: int) -> Tensor:
    """1/n, 2/n, ..., 1 in float64."""
    return torch.arange(1, count + 1, dtype=torch.float64) / count


class Moment:
    """One moment of a flat tensor as codes (N,) uint8 and scales (N / 256,) float32."""

    def __init__(self, like: Tensor, signed: bool, allocate: Allocate) -> None:
        self.values = codebook(signed).to(like.device)
        self.borders = (self.values[1:] + self.values[:-1]) / 2
        self.zero = int((self.values == 0).nonzero())
        blocks = -(-like.numel() // BLOCK)
        self.codes = allocate(torch.empty(like.numel(), dtype=torch.uint8, device=like.device)).fill_(self.zero)
        self.scales = allocate(torch.empty(blocks, device=like.device))

    def read(self, start: int, end: int) -> Tensor:
        """Values `start` to `end` as float32; `start` begins a block."""
        values = self.values[self.codes[start:end].int()]
        return values * self._scales(start, end)

    def write(self, start: int, values: Tensor) -> None:
        """Quantise values (N,) from `start` on, which begins a block, to the nearest code.

        A second moment above zero stays above: rounded to zero it would divide its update by almost nothing.
        """
        blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        self.scales[start // BLOCK : start // BLOCK + len(blocks)] = blocks.abs().amax(dim=1)
        scales = self._scales(start, start + len(values))
        codes = torch.bucketize(values / scales.clamp(min=torch.finfo(scales.dtype).tiny), self.borders)
        if self.zero == 0:
            codes = torch.where(values > 0, codes.clamp(min=1), codes)
        self.codes[start : start + len(values)] = codes.to(torch.uint8)

    def _scales(self, start: int, end: int) -> Tensor:
        scales = self.scales[start // BLOCK : -(-end // BLOCK)]
        return scales.repeat_interleave(BLOCK)[: end - start]


class BlockwiseAdamW(torch.optim.Optimizer):
    """Groups with `quantized=True` keep moments of 8 bits; others are plain AdamW. 2 bytes a weight in place of 8."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """See `NamedState`."""
        return ADAM_STATE

    def create_state(self, moved: Tensor, group: dict[str, Any], allocate: Allocate) -> None:
        """See `NamedState`."""
        self.state[moved]["step"] = torch.zeros((), device=moved.device)
        for name in ADAM_STATE:
            self.state[moved][name] = (
                Moment(moved.detach(), name == "exp_avg", allocate) if group["quantized"] else allocate(moved.detach())
            )

    def read_state(self, moved: Tensor, name: str) -> Tensor:
        """See `NamedState`: the float32 values that the codes stand for."""
        moment = self.state[moved][name]
        return moment.read(0, moved.numel()).view(moved.shape) if isinstance(moment, Moment) else moment

    def write_state(self, moved: Tensor, name: str, value: Tensor) -> None:
        """See `NamedState`: exact for values that were read with the same blocks, to the nearest code otherwise."""
        moment = self.state[moved][name]
        if isinstance(moment, Moment):
            moment.write(0, value.reshape(-1))
        else:
            moment.copy_(value)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every tensor that has a gradient."""
        for group in self.param_groups:
            for moved in (moved for moved in group["params"] if moved.grad is not None):
                if not group["quantized"]:
                    adamw_step(moved, self.state[moved], group)
                    continue
                state = self.state[moved]
                state["step"] += 1
                for start in range(0, moved.numel(), CHUNK):
                    move_chunk(moved.view(-1), moved.grad.reshape(-1), start, state, group)


def move_chunk(weights: Tensor, gradient: Tensor, start: int, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) on flat weights from `start` on, its moments read and written."""
    end = min(start + CHUNK, weights.numel())
    weights, gradient = weights[start:end], gradient[start:end]
    (beta1, beta2), count = group["betas"], float(state["step"])
    mean = state["exp_avg"].read(start, end).lerp_(gradient, 1 - beta1)
    square = state["exp_avg_sq"].read(start, end).lerp_(gradient.square(), 1 - beta2)
    denominator = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
    weights.mul_(1 - group["lr"] * group["weight_decay"])
    weights.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**count))
    state["exp_avg"].write(start, mean)
    state["exp_avg_sq"].write(start, square)


def adamw_step(moved: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """torch's fused AdamW on one tensor, with state `step`, `exp_avg` and `exp_avg_sq`."""
    assert moved.grad is not None
    beta1, beta2 = group["betas"]
    adamw(
        [moved], [moved.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
        eps=group["eps"], maximize=False,
    )  # fmt: skip
