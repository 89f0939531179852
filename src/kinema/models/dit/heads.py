"""The heads of the DiT: tokens behind the last block become latents again."""

from typing import NamedTuple

from torch import Tensor, nn

from kinema.models.dit.axes import HeadModulation
from kinema.models.dit.conditioning import ExactLinear, HeadTable, LowRankModulation
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.front import Entered
from kinema.models.dit.layers import Linear
from kinema.models.dit.norms import Norm
from kinema.models.dit.packed import EARS
from kinema.models.dit.patches import unpatchify
from kinema.models.dit.segments import Rows, Tokens
from kinema.models.dit.timesteps import clip_rows


class Predictions(NamedTuple):
    """One entry for each clip."""

    video: list[Tensor]
    audio: list[Tensor] | None
    """(channels, T) each; None for a model without a second stream."""


class Heads(nn.Module):
    """Everything behind the last block: norms, shift and scale, and a linear layer to the latents of each stream."""

    config: DiTConfig

    def make_heads(self, config: DiTConfig, latent_channels: int) -> None:
        """One for the video and, with model.audio_channels, one for the sound in its softmax."""
        pt, ph, pw = config.patch_size
        channels = latent_channels * (2 if config.learned_variance else 1)
        self.final_norm = _norm(config) if config.final_norm else None
        self.head_norm = _norm(config)
        self.head_modulation = _modulation(config)
        self.head = Linear(config.width, channels * pt * ph * pw, config.edge_bias)
        self.audio_head = (
            Linear(config.width, config.audio_channels, config.edge_bias) if config.audio_channels else None
        )

    def leave(self, entered: Entered, tokens: Tokens) -> Predictions:
        """What the heads make of the tokens behind the last block."""
        grids, segments, condition = entered.grids, entered.segments, entered.condition
        linear = self.config.head_modulation is HeadModulation.linear
        modulation = self.head_modulation(condition.embedding if linear else condition)
        seen = segments["video"]
        rows = clip_rows(grids, len(condition.raw)).held(seen.share) if self.config.first_frame_given else seen.rows
        patches = self._signed(self.head(self._last(tokens["video"], rows, modulation))).to(entered.dtype)
        video = unpatchify(seen.group.gather(patches, seen.count), grids, self.config.patch_size)
        if self.audio_head is None or "audio" not in tokens:
            return Predictions(video, None)
        heard = segments["audio"]
        ears = self._signed(self.audio_head(self._last(tokens["audio"], heard.rows, modulation))).to(entered.dtype)
        ears = heard.group.gather(ears, heard.count)
        return Predictions(video, [clip.unflatten(0, (-1, EARS)).movedim(-1, 0) for clip in ears.split(heard.lengths)])

    def _last(self, tokens: Tensor, rows: Rows, modulation: Tensor) -> Tensor:
        """What a head reads: tokens (N, D) behind the last norms, with these rows of the modulation (R, 2 D)."""
        tokens = tokens if self.final_norm is None else self.final_norm(tokens)
        shift, scale = modulation.chunk(2, dim=-1)
        return self.head_norm.modulated(tokens, rows.of(shift), rows.of(scale), rows.lengths)

    def _signed(self, predicted: Tensor) -> Tensor:
        """What a head says, pointing from data to noise."""
        return -predicted if self.config.reversed_time else predicted


def _norm(config: DiTConfig) -> Norm:
    return Norm(config.head_norm, config.width, config.norm_eps, affine=config.norm_affine)


def _modulation(config: DiTConfig) -> HeadTable | LowRankModulation | ExactLinear:
    """Shift and scale before the last layer."""
    if config.head_modulation is HeadModulation.table:
        return HeadTable(config.width)
    if config.head_modulation is HeadModulation.lora:
        return LowRankModulation(config.condition_width, config.width, config.modulation_rank, [2])
    return ExactLinear(config.condition_width, 2 * config.width, config.edge_bias)
