"""Adapters in the names and layouts of other libraries: a low-rank change of our weights as one of theirs."""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.interop.keymap import (
    Chain,
    Fused,
    Inverse,
    KeyMap,
    Layout,
    MovedRows,
    PermutedRows,
    Place,
    ReorderedRows,
    Same,
)
from kinema.training.finetune import Adapter

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""What pipelines of diffusers look for in a folder."""
DIFFUSERS_PREFIX = "transformer."
COMFYUI_PREFIX = "diffusion_model."
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def placed(adapters: Mapping[str, Adapter], weights: Mapping[str, Tensor], table: KeyMap) -> dict[str, Adapter]:
    """Adapters by our names -> by theirs, exactly. `weights` is our state dict, `table` its way to theirs.

    Rows of a weight are rows of `up`, so a layout that moves rows moves those. Where theirs has several of our layers
    in one, the adapter there has the sum of their ranks: `down` one below the other, `up` block by block.
    """
    found: dict[str, Adapter] = {}
    for place in table.places(f"{name}.weight" for name in adapters):
        check_place(place)
        inside = [adapters.get(name.removesuffix(".weight")) for name in place.ours]
        scales = {adapter.scale for adapter in inside if adapter}
        assert len(scales) == 1, f"{place.ours} have adapters of several strengths"
        ups = place.layout.to_theirs(spread(inside, [len(weights[name]) for name in place.ours]))
        down = torch.cat([adapter.down for adapter in inside if adapter])
        found |= {
            name.removesuffix(".weight"): Adapter(down.clone(), up, min(scales))
            for name, up in zip(place.theirs, ups, strict=True)
        }
    return found


def check_place(place: Place) -> None:
    """Refuse what is no linear layer there."""
    if not all(name.endswith(".weight") for name in place.theirs) or not moves_rows(place.layout):
        raise ValueError(
            f"the adapter of {place.ours[0].removesuffix('.weight')} cannot be written: in this layout it is "
            f"{', '.join(place.theirs)}, which is no linear layer. Train with other finetune.targets, or export merged "
            "weights (--format diffusers or single-file)."
        )


def moves_rows(layout: Layout) -> bool:
    """Whether a layout moves whole rows and leaves the columns as they are."""
    if isinstance(layout, Chain):
        return all(moves_rows(each) for each in layout.layouts)
    if isinstance(layout, Inverse):
        return moves_rows(layout.layout)
    return isinstance(layout, Same | Fused | MovedRows | PermutedRows | ReorderedRows)


def spread(adapters: list[Adapter | None], rows: list[int]) -> list[Tensor]:
    """Each `up` (out, rank) in columns of its own of one common rank; zeros for a layer without an adapter."""
    ranks = [len(adapter.down) if adapter else 0 for adapter in adapters]
    like = next(adapter.up for adapter in adapters if adapter)
    made = []
    for adapter, count, rank, end in zip(adapters, rows, ranks, accumulate(ranks), strict=True):
        up = like.new_zeros(count, sum(ranks))
        if adapter:
            up[:, end - rank : end] = adapter.up
        made.append(up)
    return made


def diffusers_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """For `load_lora_weights`. The strength is in `lora_B`: readers that know no alpha take it as the rank."""
    found: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        found[f"{DIFFUSERS_PREFIX}{name}.lora_A.weight"] = adapter.down
        found[f"{DIFFUSERS_PREFIX}{name}.lora_B.weight"] = adapter.up * adapter.scale
    return found


def comfyui_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """For ComfyUI, whose strength is alpha over the rank."""
    found: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        found[f"{COMFYUI_PREFIX}{name}{DOWN}"] = adapter.down
        found[f"{COMFYUI_PREFIX}{name}{UP}"] = adapter.up
        found[f"{COMFYUI_PREFIX}{name}{ALPHA}"] = torch.tensor(adapter.scale * len(adapter.down))
    return found


def patched(weights: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The maker's weights with such a file applied as ComfyUI does; ValueError for layers that they lack."""
    found = dict(weights)
    for key in [key for key in file if key.endswith(DOWN)]:
        name = key.removesuffix(DOWN)
        down, up, alpha = file[key], file[f"{name}{UP}"], file[f"{name}{ALPHA}"]
        target = f"{name.removeprefix(COMFYUI_PREFIX)}.weight"
        if target not in found:
            raise ValueError(f"{key} changes {target}, which the model does not have.")
        found[target] = found[target] + float(alpha) / len(down) * up @ down
    return found


def load_into(reference: Any, source: "Path | dict[str, Tensor]", count: int) -> None:
    """Adapters into a model of the reference library, by its own loader; ValueError unless `count` layers took one."""
    from peft.tuners.lora import LoraLayer

    folder = {"weight_name": DIFFUSERS_FILE} if isinstance(source, Path) else {}
    reference.load_lora_adapter(source, prefix="transformer", **folder)
    taken = sum(isinstance(module, LoraLayer) for module in reference.modules())
    if taken != count:
        raise ValueError(f"diffusers took {taken} of {count} adapters: nothing was written.")
