"""A DiT of images becomes one of videos: weights in space are kept, what works over time begins as the identity.

The image model lives on in every frame (Singer et al. 2022, Make-A-Video, section 3.2). There is no way back: no image
model has the new weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kinema.interop.preset import Preset, Record
from kinema.interop.reading import Published
from kinema.interop.recognising import Recognised
from kinema.models.dit import AttentionPattern, DiT, DiTConfig, ModulationSource, Rope, TextEdge

SLOTS = 3  # shift, scale and gate of one sublayer


def inflated_config(image: DiTConfig, attention: AttentionPattern) -> DiTConfig:
    """A DiT of images -> of videos with attention=full, factorised or alternating; ValueError where it cannot be.

    Frames are told apart by rotary positions alone, which change nothing within one frame.
    """
    known = (AttentionPattern.full, AttentionPattern.factorised, AttentionPattern.alternating)
    if attention not in known:
        raise ValueError(f"--inflate {attention.name}: type one of {', '.join(choice.name for choice in known)}.")
    modulation = (ModulationSource.table, ModulationSource.linear)
    checks = {
        f"attention={image.attention.name}": image.attention is AttentionPattern.full,
        f"text={image.text.name}": image.text is TextEdge.cross,
        f"modulation={image.modulation.name}": image.modulation in modulation,
        f"rope={image.rope.name}": image.rope is Rope.none,
        f"patch_size={image.patch_size}": image.patch_size[0] == 1,
    }
    if wrong := [f"model.{choice}" for choice, fits in checks.items() if not fits]:
        raise ValueError(
            "--inflate is for models of images with full attention, modulation=table or linear, no rotary positions, "
            f"not {', '.join(wrong)}."
        )
    depth = image.depth * (2 if attention is AttentionPattern.alternating else 1)
    return replace(image, attention=attention, depth=depth, rope=Rope.axes, rope_axes=[image.head_dim, 0, 0])


def inflate(image: DiTConfig, tensors: Mapping[str, Tensor], new: DiT) -> dict[str, Tensor]:
    """Tensors of the image model, and a fresh model of `inflated_config` -> tensors of the latter."""
    config, state = new.config, new.state_dict()
    fill = {AttentionPattern.factorised: _factorised, AttentionPattern.alternating: _alternating}.get(config.attention)
    found = dict(tensors) if fill is None else fill(image, tensors, state)
    assert found.keys() <= state.keys()
    kind = next(iter(tensors.values())).dtype
    return {name: found[name] if name in found else state[name].to(kind) for name in state}


def _factorised(image: DiTConfig, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One attention more in each block, whose gate is zero."""
    found = {}
    for name, tensor in tensors.items():
        if ".modulation." in name or name.startswith("shared_modulation."):
            first, rest = tensor.split([SLOTS * image.width, len(tensor) - SLOTS * image.width])
            found[name] = torch.cat([first, torch.zeros_like(first), rest])
        else:
            found[_moved(name, "sublayers", lambda place: place + (place > 0))] = tensor
    return found


def _alternating(image: DiTConfig, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block more behind each block; where all blocks share their gates, its ways back are zero instead."""
    found = {_moved(name, "blocks", lambda block: 2 * block): tensor for name, tensor in tensors.items()}
    if image.modulation is ModulationSource.table:
        ways_back = [name for name in state if name not in found and name.endswith("operation.project.weight")]
        found |= {name: torch.zeros_like(state[name]) for name in ways_back}
    return found


def _moved(name: str, part: str, move: Callable[[int], int]) -> str:
    """`blocks.3.x` -> `blocks.6.x`, for the number behind this part of a name."""
    words = name.split(".")
    if part not in words:
        return name
    place = words.index(part) + 1
    return ".".join([*words[:place], str(move(int(words[place]))), *words[place + 1 :]])


@dataclass(frozen=True)
class Inflated:
    """A published image model as the video model that it becomes."""

    image: Recognised
    attention: AttentionPattern

    @property
    def preset(self) -> Preset:
        """That of the image model."""
        return self.image.preset

    @property
    def config(self) -> Record:
        """The reference's config of the image model."""
        return self.image.config

    @property
    def naming(self) -> str:
        """reference or original."""
        return self.image.naming

    @property
    def published(self) -> Published:
        """The image model's files."""
        return self.image.published

    @property
    def skeleton(self) -> nn.Module:
        """Our module, without numbers."""
        with torch.device("meta"):
            return self._new()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of our module; those over time are drawn from a fixed seed."""
        image = self.image.skeleton
        assert isinstance(image, DiT)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return inflate(image.config, self.image.tensors(), self._new())

    def module(self) -> DiT:
        """Our module with these weights, float32, in evaluation mode."""
        module = self._new()
        module.load_state_dict(self.tensors())
        return module.eval()

    def _new(self) -> DiT:
        image = self.image.skeleton
        if not isinstance(image, DiT):
            raise ValueError(f"--inflate {self.attention.name}: {self.image.published.path} is no transformer.")
        return DiT(inflated_config(image.config, self.attention), image.latent_channels, image.text_width)
