"""The DiT: its parts, how they start, and the way of a pack through it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Attention, Lengths
from kinema.models.dit.blocks import blocks, shared_slots
from kinema.models.dit.conditioning import (
    SHARED_SLOTS,
    AttentionPooling,
    CaptionCondition,
    Condition,
    ExactLinear,
    HeadTable,
    LinearModulation,
    LowRankModulation,
    MeanPooling,
    NormedPooled,
    NormedTimesteps,
    PooledEmbedding,
    TimestepEmbedding,
)
from kinema.models.dit.config import (
    DiTConfig,
    HeadModulation,
    ModulationSource,
    NormKind,
    Rope,
    TextEdge,
    TextEmbedding,
)
from kinema.models.dit.control import ControlTower
from kinema.models.dit.exchange import Exchange, ExchangeCondition
from kinema.models.dit.extras import Extras, Sound
from kinema.models.dit.layers import (
    Activate,
    Counts,
    JointAttention,
    Linear,
    SegmentAttention,
    SingleStream,
    Sublayer,
)
from kinema.models.dit.norms import Norm
from kinema.models.dit.packed import EARS, PackedClock
from kinema.models.dit.patches import patchify, token_grid, unpatchify
from kinema.models.dit.places import Places
from kinema.models.dit.refiner import TextEncoder, TextRefiner, TextTower
from kinema.models.dit.segments import (
    Grid,
    Rows,
    Segment,
    Segments,
    Span,
    Tokens,
    Turns,
    clip_segment,
    joined,
    lengths_of,
    seen,
    totals,
    video_segment,
)
from kinema.models.position import (
    centred,
    fractional_rope,
    grid_positions,
    middles,
    mixed_rope,
    rope_3d,
    shared_frequencies,
)

Timesteps: TypeAlias = Tensor | Sequence[Tensor]
"""(B,), or for each clip one of every frame of tokens (T / patch_size[0],); in [0, 1].

Where frames have their own, the clip's, which captions are modulated with, is the largest: that of the noisiest frame.
"""

NO_EXTRAS = Extras()
IMAGE_NORM_EPSILON = 1e-5


class Source(NamedTuple):
    """Something told of each clip, at the model's width: (M, D), and its tokens for each clip."""

    tokens: Tensor
    lengths: Lengths


class Predictions(NamedTuple):
    """One entry for each clip."""

    video: list[Tensor]
    audio: list[Tensor] | None
    """(channels, T) each; None for a model without a second stream."""


class Entered(NamedTuple):
    """A pack at the first block."""

    tokens: Tokens
    segments: Segments
    condition: Condition
    grids: list[Grid]
    timesteps: Tensor
    """(R,), of every row of the condition."""
    fps: Sequence[float] | None
    dtype: torch.dtype
    """Of the latents."""

    @property
    def clip_timesteps(self) -> Tensor:
        """(B,), of the clips: the last rows."""
        return self.timesteps[-len(self.grids) :]


class DiT(nn.Module):
    """Diffusion transformer over packs: clips of any size in one call, each with its timestep and caption.

    Peebles and Xie 2023, with spacetime patches, positions in three axes, and the caption by cross-attention
    (PixArt-alpha, Chen et al. 2023) or in one softmax with the video (Esser et al. 2024); `DiTConfig` says which.
    Linear layers start from Xavier's uniform distribution with zero biases; everything that modulates, the last
    layer, and the way back of what has no gate start at zero. Hence every block of a new model is the identity, and
    its prediction is exactly zero.
    """

    def __init__(self, config: DiTConfig, latent_channels: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.latent_channels, self.text_width = latent_channels, text_width
        width, bias = config.width, config.edge_bias
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]

        channels = latent_channels + config.condition_channels + config.padding_channel
        self.patch_embedding = Linear(channels * patch, width, bias)
        self.places = Places(config)
        self.rope_frequencies = _frequencies(config) if config.rope is Rope.learned else None
        self.text_embedding = _text_embedding(config, text_width)
        places = (config.image_positions, config.image_width)
        self.image_positions = nn.Parameter(torch.zeros(places)) if config.image_positions else None
        self.image_embedding = _image_embedding(config) if config.image_width else None
        self.glyph_embedding = _glyph_embedding(config) if config.glyph_width else None
        sources = len(config.caption_sources)
        self.source_types = nn.Parameter(torch.zeros(sources, width)) if sources > 1 else None
        self.timestep_embedding = _timestep_embedding(config)
        self.pooled_text = _pooled_text(config, text_width) if config.pooled_text else None
        self.pooled_embedding = _pooled_embedding(config) if config.pooled_width else None
        self.guidance_embedding = (
            TimestepEmbedding(config.timestep_channels, config.condition_width, config.timestep_scale)
            if config.guidance
            else None
        )

        self.ofs_embedding = (
            TimestepEmbedding(config.ofs_channels, config.condition_width, 1.0) if config.ofs_channels else None
        )

        self.caption_condition = (
            CaptionCondition(config.timestep_channels, config.caption_width, config.timestep_scale)
            if config.modulated_captions
            else None
        )

        made = blocks(config)
        shared = SHARED_SLOTS if config.modulation is ModulationSource.lora else shared_slots(made)
        has_own = config.modulation is ModulationSource.linear
        self.shared_modulation = None if has_own else ExactLinear(config.condition_width, shared * width, bias)
        self.blocks = nn.ModuleList(made)
        self.control = ControlTower(config) if config.control_layers else None
        self.packed = PackedClock(config) if config.rope is Rope.packed else None
        self.audio_embedding = Linear(config.audio_channels, width, bias) if config.audio_channels else None
        self.audio = (
            DiT(config.audio_tower, config.audio.channels, config.audio.text_width or text_width)
            if config.audio
            else None
        )
        self.exchanges = nn.ModuleList(Exchange(config) for _ in made if config.audio)
        widths = {"video": width, "audio": config.audio.width} if config.audio else {}
        self.exchange_conditions = nn.ModuleDict(
            {name: ExchangeCondition(config, size) for name, size in widths.items()}
        )

        def norm() -> Norm:
            return Norm(config.head_norm, width, config.norm_eps, affine=config.norm_affine)

        self.final_norm = norm() if config.final_norm else None
        self.head_norm = norm()
        self.head_modulation = _head_modulation(config)
        self.head = Linear(width, latent_channels * patch * (2 if config.learned_variance else 1), bias)
        self.audio_head = Linear(width, config.audio_channels, bias) if config.audio_channels else None
        self._initialise()

    def forward(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras = NO_EXTRAS
    ) -> list[Tensor]:
        """latents (C, T, H, W) each, timesteps (B,) in [0, 1], text (L, text_width) each -> like latents.

        Clips and captions may all differ in size. Equal shapes side by side are fastest, so clips are sorted
        by shape on the way in and put back on the way out. Instead of (B,), timesteps may be one tensor for each
        clip with a timestep for every frame of tokens: a given frame has 0 where the others have noise, and then no
        guidance.
        """
        predictions = self.predict(latents, timesteps, text, extras)
        return [x[: self.latent_channels] for x in predictions] if self.config.learned_variance else predictions

    def predict(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras = NO_EXTRAS
    ) -> list[Tensor]:
        """All that the head says, (2C, T, H, W) each with model.learned_variance: the same, and the variances."""
        return self.predict_streams(latents, timesteps, text, extras).video

    def predict_streams(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras = NO_EXTRAS
    ) -> Predictions:
        """The same for the video and, with model.audio or audio_channels, for the sound in `extras.audio`."""
        self._check(latents, timesteps, text)
        self._check_extras(latents, extras)
        order = sorted(range(len(latents)), key=lambda clip: tuple(latents[clip].shape))
        if order == list(range(len(latents))):
            return self._predict_sorted(latents, timesteps, text, extras)
        times = timesteps[order] if isinstance(timesteps, Tensor) else [timesteps[clip] for clip in order]
        found = self._predict_sorted(
            [latents[clip] for clip in order], times, [text[clip] for clip in order], extras.take(order)
        )
        place = {clip: index for index, clip in enumerate(order)}
        places = [place[clip] for clip in range(len(order))]
        audio = None if found.audio is None else [found.audio[clip] for clip in places]
        return Predictions([found.video[clip] for clip in places], audio)

    def _predict_sorted(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras
    ) -> Predictions:
        video = self._enter(latents, timesteps, text, extras)
        if self.audio is None or extras.audio is None:
            return self._leave(video, self._through(video, extras))
        sound, heard = self.audio, extras.audio
        columns = [x[..., None, None] for x in heard.latents]
        assert heard.text is not None
        sound._check(columns, heard.timesteps, heard.text)
        audio = sound._enter(columns, heard.timesteps, heard.text, NO_EXTRAS)
        seen, played = self._through_both(video, audio)
        sounds = sound._leave(audio, played).video
        return Predictions(self._leave(video, seen).video, [x[..., 0, 0] for x in sounds])

    def _through(self, entered: Entered, extras: Extras) -> Tokens:
        """Through all blocks."""
        tokens, segments, condition = entered.tokens, entered.segments, entered.condition
        hints = self._hints(tokens, segments, condition, extras)
        for layer, each in enumerate(self.blocks):
            tokens = each(tokens, segments, condition)
            if layer in hints:
                tokens = {**tokens, "video": tokens["video"] + hints[layer]}
        return tokens

    def _through_both(self, video: Entered, audio: Entered) -> tuple[Tokens, Tokens]:
        """Through the blocks of both streams, which look at each other before the MLP of each."""
        assert self.audio is not None
        clock = self.config.exchange_clock
        segments = {"video": self._on_clock(video, *clock), "audio": self.audio._on_clock(audio, *clock)}
        times = {"video": video.timesteps, "audio": audio.timesteps}
        if self.config.audio is not None and self.config.audio.crossed:
            times = {"video": audio.clip_timesteps, "audio": video.clip_timesteps}
            segments = {name: replace(each, rows=Rows(each.lengths)) for name, each in segments.items()}
        shared = {name: self.exchange_conditions[name](rows) for name, rows in times.items()}
        seen, heard = video.tokens, audio.tokens
        for block, other, exchange in zip(self.blocks, self.audio.blocks, self.exchanges, strict=True):
            seen = block(seen, video.segments, video.condition, slice(-1))
            heard = other(heard, audio.segments, audio.condition, slice(-1))
            both = exchange({"video": seen["video"], "audio": heard["video"]}, segments, shared)
            seen = block({**seen, "video": both["video"]}, video.segments, video.condition, slice(-1, None))
            heard = other({**heard, "video": both["audio"]}, audio.segments, audio.condition, slice(-1, None))
        return seen, heard

    def _enter(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras
    ) -> Entered:
        grids = [token_grid(clip.shape, self.config.patch_size) for clip in latents]
        if self.config.first_frame_given and isinstance(timesteps, Tensor):
            timesteps = [_first_given(time, frames) for time, (frames, _, _) in zip(timesteps, grids, strict=True)]
        heard = extras.audio if self.config.audio_channels else None
        condition = self._condition(timesteps, text, extras)
        sources = self._sources(text, timesteps, condition, extras)
        told = {name: source.lengths for name, source in sources.items()}
        segments = self._segments(grids, told, condition, extras.fps, heard)
        if self.caption_condition is not None:
            segments["text"] = replace(
                segments["text"], told=self.caption_condition(self._inside(_of_clips(timesteps)))
            )

        given = self._with_given(latents, extras)
        video = self.patch_embedding(patchify(given, self.config.patch_size)).to(condition.embedding.dtype)
        places = self.places.at_start(grids, video)
        if places is not None:
            video = video + places
        tokens: Tokens = {"video": video, **{name: source.tokens for name, source in sources.items()}}
        if self.audio_embedding is not None and heard is not None:
            tokens["audio"] = self.audio_embedding(torch.cat(_both_ears(heard))).to(video.dtype)
        return Entered(tokens, segments, condition, grids, _of_rows(timesteps), extras.fps, latents[0].dtype)

    def _leave(self, entered: Entered, tokens: Tokens) -> Predictions:
        """What the heads make of the tokens behind the last block."""
        grids, segments, condition = entered.grids, entered.segments, entered.condition
        linear = self.config.head_modulation is HeadModulation.linear
        modulation = self.head_modulation(condition.embedding if linear else condition)
        rows = _clip_rows(grids, condition) if self.config.first_frame_given else segments["video"].rows
        patches = self._signed(self.head(self._last(tokens["video"], rows, modulation))).to(entered.dtype)
        video = unpatchify(patches, grids, self.config.patch_size)
        if self.audio_head is None or "audio" not in tokens:
            return Predictions(video, None)
        heard = segments["audio"]
        ears = self._signed(self.audio_head(self._last(tokens["audio"], heard.rows, modulation))).to(entered.dtype)
        return Predictions(video, [clip.unflatten(0, (-1, EARS)).movedim(-1, 0) for clip in ears.split(heard.lengths)])

    def _with_given(self, latents: Sequence[Tensor], extras: Extras) -> list[Tensor]:
        """Noisy latents with the channels that are given beside them."""
        beside = [[x] for x in latents]
        for clip, channels in zip(beside, extras.channels or [], strict=extras.channels is not None):
            clip.append(channels)
        if self.config.padding_channel:
            beside = [[*clip, torch.zeros_like(clip[0][:1])] for clip in beside]
        return [torch.cat(clip) if len(clip) > 1 else clip[0] for clip in beside]

    def _last(self, tokens: Tensor, rows: Rows, modulation: Tensor) -> Tensor:
        """What a head reads: tokens (N, D) behind the last norms, with these rows of the modulation (R, 2 D)."""
        tokens = tokens if self.final_norm is None else self.final_norm(tokens)
        shift, scale = modulation.chunk(2, dim=-1)
        return self.head_norm.modulated(tokens, rows.of(shift), rows.of(scale), rows.lengths)

    def _hints(self, tokens: Tokens, segments: Segments, condition: Condition, extras: Extras) -> dict[int, Tensor]:
        """What the control tower adds to the video after some blocks: layer -> (N, D)."""
        if self.control is None or extras.control is None:
            return {}
        hints = self.control(patchify(extras.control, self.config.patch_size), tokens, segments, condition)
        return dict(zip(self.control.layers, hints, strict=True))

    def _placed(self, image: Tensor) -> Tensor:
        return image if self.image_positions is None else image + self.image_positions

    def _sources(
        self, text: Sequence[Tensor], timesteps: Timesteps, condition: Condition, extras: Extras
    ) -> dict[str, Source]:
        """What is told of each clip, at the model's width: a caption with all that joins it, and what is read apart."""
        words = torch.cat(list(text))
        sources = {"text": Source(self._captions(words, lengths_of(text), timesteps, condition), lengths_of(text))}
        if self.glyph_embedding is not None and extras.glyphs is not None:
            sources["glyph"] = Source(self.glyph_embedding(torch.cat(list(extras.glyphs))), lengths_of(extras.glyphs))
        if self.image_embedding is not None and extras.image is not None:
            placed = torch.cat([self._placed(image) for image in extras.image])
            sources["image"] = Source(self.image_embedding(placed), lengths_of(extras.image))
        if self.source_types is None:
            return sources
        join = [sources.pop(name) for name in self.config.caption_sources]
        lengths = [source.lengths for source in join]
        tokens = joined([x + kind for (x, _), kind in zip(join, self.source_types, strict=True)], lengths)
        return {"text": Source(tokens, totals(lengths)), **sources}

    def _captions(self, words: Tensor, lengths: Lengths, timesteps: Timesteps, condition: Condition) -> Tensor:
        embedded = self._embedded(words, lengths, timesteps, condition)
        if self.config.text is TextEdge.cross:
            return embedded
        embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))  # a residual stream, like the video
        places = self.places.of_words(lengths)
        return embedded if places is None else embedded + places

    def _embedded(self, words: Tensor, lengths: Lengths, timesteps: Timesteps, condition: Condition) -> Tensor:
        if isinstance(self.text_embedding, TextTower):
            return self.text_embedding(words, lengths, condition)
        if isinstance(self.text_embedding, TextRefiner):
            return self.text_embedding(words, lengths, self._inside(_of_clips(timesteps)))
        if isinstance(self.text_embedding, TextEncoder):
            return self.text_embedding(words, lengths)
        return self.text_embedding(words)

    def _condition(self, timesteps: Timesteps, text: Sequence[Tensor], extras: Extras) -> Condition:
        """One row a clip; where frames have timesteps of their own, one for each of them and then one a clip.

        Those of sound in the same softmax come first.
        """
        rows = _of_rows(timesteps)
        if self.audio_embedding is not None and extras.audio is not None:
            assert isinstance(extras.audio.timesteps, Tensor)
            rows = torch.cat([extras.audio.timesteps, rows])
        times = self._inside(rows)
        embedding = self.timestep_embedding(times)
        clips = []  # what is the same for all frames of a clip
        if self.pooled_text is not None:
            clips.append(self.pooled_text(torch.cat(list(text)).to(embedding.dtype), lengths_of(text)))
        if self.pooled_embedding is not None and extras.pooled is not None:
            clips.append(self.pooled_embedding(torch.stack(list(extras.pooled))))
        if self.ofs_embedding is not None and extras.ofs is not None:
            clips.append(self.ofs_embedding(rows.new_tensor(list(extras.ofs))))
        for clip in clips:
            embedding = embedding + _for_rows(clip, timesteps)
        if self.guidance_embedding is not None and extras.guidance is not None:
            guidance = _for_rows(self.guidance_embedding(rows.new_tensor(list(extras.guidance))), timesteps)
            given = rows == 0 if isinstance(timesteps, Sequence) else torch.zeros_like(rows, dtype=torch.bool)
            embedding = torch.where(given[:, None], embedding, embedding + guidance)
        active = F.silu(embedding)
        source = (
            self.timestep_embedding.for_all(times) if isinstance(self.timestep_embedding, NormedTimesteps) else active
        )
        shared = None if self.shared_modulation is None else self.shared_modulation(source)
        return Condition(embedding, active, shared)

    def _inside(self, timesteps: Tensor) -> Tensor:
        """Timesteps as the network counts them."""
        return 1 - timesteps if self.config.reversed_time else timesteps

    def _signed(self, predicted: Tensor) -> Tensor:
        """What a head says, pointing from data to noise."""
        return -predicted if self.config.reversed_time else predicted

    def _segments(
        self,
        grids: Sequence[Grid],
        told: Mapping[str, Lengths],
        condition: Condition,
        fps: Sequence[float] | None,
        sound: Sound | None = None,
    ) -> Segments:
        """Angles (dtype and device of the condition), cuts and orders, made once; blocks only read them."""
        like = condition.embedding
        rope, places = self._rope(grids, fps, told["text"], like), self.places.in_blocks(grids, like)
        rows = _rows(grids, condition, 0 if sound is None else len(sound))
        video = video_segment(grids, rows, rope, places, self._spans, self.config.window, like.device)
        own = len(like) - len(grids)
        segments = {"video": video, **{name: clip_segment(lengths, own) for name, lengths in told.items()}}
        if self.packed is None:
            return segments
        words = told["text"]
        segments["text"] = replace(segments["text"], rope=self.packed.words(words, like))
        if sound is not None:
            lengths = lengths_of(_both_ears(sound))
            segments["audio"] = replace(clip_segment(lengths), rope=self.packed.sound(lengths, grids, words, like))
        return segments

    def _rope(self, grids: Sequence[Grid], fps: Sequence[float] | None, words: Lengths, like: Tensor) -> Turns | None:
        """The rotary table of every token of the video."""
        if self.packed is not None:
            return self.packed.clips(grids, words, like)
        return None if self.config.rope is Rope.none else self._tables(grids, fps, like, self._angles)

    def _tables(
        self, grids: Sequence[Grid], fps: Sequence[float] | None, like: Tensor, angles: Callable[..., Turns]
    ) -> Turns:
        """`angles(positions, rate, dtype)` of every clip, one after the other."""
        tables = []
        rates = [self.config.rope_fps] * len(grids) if fps is None else fps
        for (grid, rate), group in groupby(zip(grids, rates, strict=True)):
            table, clips = angles(grid_positions(*grid, device=like.device), rate, like.dtype), len(list(group))
            tables.append([part.repeat(clips, *[1] * (part.ndim - 1)) for part in table])
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return cos, sin

    def _on_clock(self, stream: Entered, width: int, heads: int, longest: float) -> Segment:
        """The stream's own segment with the time of its tokens, for an exchange of this width."""

        def angles(positions: Tensor, rate: float, dtype: torch.dtype) -> Turns:
            seconds = self._middles(positions, rate)[:, :1]
            return fractional_rope(seconds / longest, width, heads, self.config.rope_theta, dtype, exact=True)

        clock = self._tables(stream.grids, stream.fps, stream.condition.raw, angles)
        return replace(stream.segments["video"], clock=clock)

    def _middles(self, positions: Tensor, rate: float) -> Tensor:
        """Seconds, rows and columns of pixels of the middle of each token, (N, 3)."""
        return middles(positions, self.config.patch_size, self.config.rope_units, rate)

    def _angles(self, positions: Tensor, rate: float, dtype: torch.dtype) -> Turns:
        config = self.config
        if self.rope_frequencies is not None:
            cos, sin = mixed_rope(centred(positions, config.rope_side), self.rope_frequencies)
            return cos.to(dtype), sin.to(dtype)
        if config.rope is Rope.seconds:
            fractions = self._middles(positions, rate) / positions.new_tensor(config.rope_extent)
            turning = fractions[:, [axis for axis, extent in enumerate(config.rope_extent) if extent]]
            return fractional_rope(turning, config.width, config.num_heads, config.rope_theta, dtype, exact=True)
        if config.rope is Rope.axes:
            if rate != config.rope_fps:
                positions[:, 0] = positions[:, 0] / rate * config.rope_fps
            axes, scale = config.rope_axes, config.rope_scale
            return rope_3d(positions, config.head_dim, axes, config.rope_theta, dtype, scale, config.rope_still)
        units, patch, extent = (
            positions.new_tensor(x) for x in (config.rope_units, config.patch_size, config.rope_extent)
        )
        fractions = positions * units * patch / extent
        return fractional_rope(fractions, config.width, config.num_heads, config.rope_theta, dtype)

    def _check(self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor]) -> None:
        if not len(latents) == len(timesteps) == len(text) > 0:
            raise ValueError(
                f"the model got {len(latents)} clips, {len(timesteps)} timesteps, {len(text)} captions: it "
                "needs one timestep and one caption for each clip, and at least one clip."
            )
        for clip in latents:
            if clip.ndim != 4 or clip.shape[0] != self.latent_channels:
                raise ValueError(
                    f"a clip of latents has shape {tuple(clip.shape)} where the model was built for "
                    f"(C={self.latent_channels}, T, H, W)."
                )
        for times in [timesteps] if isinstance(timesteps, Tensor) else timesteps:
            if times.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"timesteps have dtype {times.dtype}: keep them float32, half precision merges some.")
        if not isinstance(timesteps, Tensor):
            for clip, times in zip(latents, timesteps, strict=True):
                frames = clip.shape[1] // self.config.patch_size[0]
                if times.shape != (frames,):
                    raise ValueError(
                        f"timesteps of shape {tuple(times.shape)} for a clip of {clip.shape[1]} latent frames: each "
                        f"frame of tokens needs one, ({frames},) with model.patch_size={self.config.patch_size}."
                    )
        for caption in text:
            if caption.ndim != 2 or caption.shape[1] != self.text_width or len(caption) == 0:
                raise ValueError(
                    f"text embeddings have shape {tuple(caption.shape)}, the model was built for "
                    f"(L >= 1, {self.text_width}). An empty caption is the encoder's null text, never empty."
                )

    def _check_extras(self, latents: Sequence[Tensor], extras: Extras) -> None:
        for key, name in EXTRAS.items():
            built, given = getattr(self.config, key), getattr(extras, name)
            may = name == "audio" and self.config.audio_channels
            if bool(built) != (given is not None) and not may:
                raise ValueError(
                    f"model.{key}={built} but extras.{name} is {'missing' if built else 'given'}: a model reads "
                    "exactly the conditions that it was built for."
                )
            if given is not None and len(given) != len(latents):
                raise ValueError(f"extras.{name} has {len(given)} entries for {len(latents)} clips.")
        if extras.fps is not None and (not self.config.rope_fps or len(extras.fps) != len(latents)):
            raise ValueError(
                f"extras.fps has {len(extras.fps)} entries for {len(latents)} clips and model.rope_fps="
                f"{self.config.rope_fps}: only a model with rope_fps above zero reads rates, one a clip."
            )
        self._check_sound(extras.audio)
        for key, name in GIVEN.items():
            for clip, given in zip(latents, getattr(extras, name) or [], strict=getattr(extras, name) is not None):
                expected = (getattr(self.config, key), *clip.shape[1:])
                if given.shape != expected:
                    raise ValueError(f"extras.{name} has shape {tuple(given.shape)} for a clip that needs {expected}.")
        for image in extras.image or []:
            if self.config.image_positions not in (0, len(image)):
                raise ValueError(
                    f"extras.image has {len(image)} tokens, the model has places for exactly model.image_positions="
                    f"{self.config.image_positions}."
                )
            least = 0 if "image" in self.config.caption_sources else 1
            if image.ndim != 2 or image.shape[1] != self.config.image_width or len(image) < least:
                raise ValueError(
                    f"extras.image has shape {tuple(image.shape)} where the model was built for "
                    f"(L >= {least}, {self.config.image_width})."
                )
        for glyphs in extras.glyphs or []:
            if glyphs.ndim != 2 or glyphs.shape[1] != self.config.glyph_width:
                raise ValueError(
                    f"extras.glyphs has shape {tuple(glyphs.shape)} where the model was built for "
                    f"(L >= 0, {self.config.glyph_width})."
                )

    def _check_sound(self, sound: Sound | None) -> None:
        """Refuse sound of another kind than the model's; the tower of model.audio looks at the rest itself."""
        channels = self.config.audio_channels
        if sound is None:
            return
        if (sound.text is None) is not bool(channels):
            raise ValueError(
                f"extras.audio.text is {'missing' if sound.text is None else 'given'}: a tower (model.audio) has "
                "captions of its own, model.audio_channels reads the clip's."
            )
        if not channels:
            return
        for clip in sound.latents:
            if clip.ndim != 3 or clip.shape[0] != channels or clip.shape[2] != EARS or not clip.numel():
                raise ValueError(
                    f"extras.audio has latents of shape {tuple(clip.shape)} where the model was built for "
                    f"(model.audio_channels={channels}, T >= 1, {EARS})."
                )
        if not isinstance(sound.timesteps, Tensor) or sound.timesteps.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "extras.audio.timesteps must be one tensor (B,) of float32 or float64: with model.audio_channels all "
                "sound of a clip has one timestep."
            )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        zero: list[nn.Linear] = [self.head, *([] if self.audio_head is None else [self.audio_head])]
        zero += [linear for linear in (self.shared_modulation, self.head_modulation) if isinstance(linear, nn.Linear)]
        zero += [module.linear for module in self.modules() if isinstance(module, LinearModulation)]
        zero += [up for module in self.modules() if isinstance(module, LowRankModulation) for up in module.up]
        zero += [hint for tower in self.modules() if isinstance(tower, ControlTower) for hint in tower.hints]
        # Without a gate the last layer of the operation is what makes a new block the identity.
        zero += [m.operation.project for m in self.modules() if isinstance(m, Sublayer) and m.slots == 0]
        zero += [m.gates for m in self.modules() if isinstance(m, SegmentAttention) and m.gates is not None]
        zero += [m.linear for m in self.modules() if isinstance(m, CaptionCondition)]
        zero += [each for made in self.exchange_conditions.values() for each in (made.linear, made.gate)]
        for linear in zero:
            nn.init.zeros_(linear.weight)
        if self.audio is not None:
            self.audio._initialise()

    def replace_attention(self, replace: Callable[[Attention], Attention]) -> None:
        """Put `replace(present)` behind the door of every attention; sequence parallelism wraps it so."""
        for module in self.modules():
            if isinstance(module, SegmentAttention | JointAttention | SingleStream):
                module.attention = replace(module.attention)

    @property
    def _spans(self) -> set[Span]:
        """Of all attentions; cross-attention asks with whole clips."""
        return {Span.clip, *(span for block in range(self.config.depth) for span in self.config.spans(block))}

    def flops(
        self,
        grid: Grid,
        text_tokens: int,
        image_tokens: int = 0,
        glyph_tokens: int = 0,
        audio: tuple[int, int] = (0, 0),
    ) -> float:
        """Floating-point operations of the forward pass on one clip of this token grid; a multiply and an add are two.

        Matrix products only; backward takes twice as many. `audio` are tokens of the sound and, with model.audio, of
        its caption.
        """
        told = {"text": text_tokens, "image": image_tokens, "glyph": glyph_tokens, "audio": audio[0]}
        seen_pairs = {span: seen(span, grid, self.config.window) for span in self._spans}
        counts = Counts({"video": math.prod(grid), **told}, seen_pairs)
        caption = sum(told[source] for source in self.config.caption_sources)
        blocks = Counts({**counts.tokens, "text": caption}, counts.seen)
        rows = 2 if self.config.audio_channels and audio[0] else 1  # sound in the same softmax has its own timestep
        products = 0
        for name, module in self.named_modules():
            if name.startswith(("audio.", "pooled_text.")):  # which count their own
                continue
            if isinstance(module, AttentionPooling):
                products += module.products(text_tokens)
            if isinstance(module, Sublayer):
                products += module.products(counts if name.startswith("text_embedding.") else blocks)
            if isinstance(module, nn.Linear) and ".operation." not in name:  # they see each token, or each clip, once
                part = name.split(".")[0]
                kind = None if isinstance(module, ExactLinear) else EDGES.get(part)
                products += module.weight.numel() * (counts.tokens[kind] if kind else rows)
        sound = 0.0 if self.audio is None else self.audio.flops((audio[0], 1, 1), audio[1])
        return 2.0 * products + sound


EDGES = {
    "patch_embedding": "video",
    "head": "video",
    "control": "video",
    "text_embedding": "text",
    "audio_embedding": "audio",
    "audio_head": "audio",
    "image_embedding": "image",
    "glyph_embedding": "glyph",
}
"""Parts outside the blocks that see every token of a segment; the others see one row a clip."""

GIVEN = {"condition_channels": "channels", "control_channels": "control"}
"""Key of the config -> latents of a clip's own size that it makes the model demand."""

EXTRAS = {
    **GIVEN,
    "image_width": "image",
    "glyph_width": "glyphs",
    "pooled_width": "pooled",
    "guidance": "guidance",
    "audio": "audio",
    "ofs_channels": "ofs",
}
"""Key of the config -> what it makes the model demand."""


def _pooled_text(config: DiTConfig, text_width: int) -> MeanPooling | AttentionPooling:
    heads = config.pooled_text_heads
    if not heads:
        return MeanPooling(text_width, config.condition_width)
    if text_width % heads:
        raise ValueError(f"model.pooled_text_heads={heads} must divide the captions' text.width={text_width}.")
    return AttentionPooling(text_width, config.condition_width, heads)


def _frequencies(config: DiTConfig) -> nn.Parameter:
    return nn.Parameter(shared_frequencies(config.num_heads, config.head_dim, config.rope_theta))


def _pooled_embedding(config: DiTConfig) -> PooledEmbedding | NormedPooled:
    if config.pooled_norm:
        return NormedPooled(config.pooled_width, config.condition_width, config.norm_eps)
    return PooledEmbedding(config.pooled_width, config.condition_width)


def _text_embedding(config: DiTConfig, text_width: int) -> nn.Module:
    """Captions to the model's width."""
    if config.text_embedding is TextEmbedding.refiner:
        return TextRefiner(config, text_width)
    if config.text_embedding is TextEmbedding.tower:
        return TextTower(config, text_width)
    if config.text_embedding is TextEmbedding.encoder:
        return TextEncoder(config, text_width)
    if config.text_embedding is TextEmbedding.none:
        if text_width != config.caption_width:
            raise ValueError(
                f"model.text_embedding=none leaves captions as they are, with text.width={text_width} channels, where "
                f"blocks read {config.caption_width}. Type model.text_channels={text_width}."
            )
        return nn.Identity()
    first = Linear(text_width, config.caption_width)
    if config.text_embedding is TextEmbedding.linear:
        return first
    if config.text_embedding is TextEmbedding.activated:
        return nn.Sequential(first, Activate(config.text_activation))
    return nn.Sequential(first, Activate(config.text_activation), Linear(config.caption_width, config.caption_width))


def _timestep_embedding(config: DiTConfig) -> TimestepEmbedding | NormedTimesteps:
    channels, scale, bias = config.timestep_channels, config.timestep_scale, config.edge_bias
    if config.timestep_norm:
        return NormedTimesteps(channels, scale, bias=bias)
    return TimestepEmbedding(
        channels, config.condition_width, scale, bias=bias, hidden=config.timestep_hidden_width or None
    )


def _head_modulation(config: DiTConfig) -> HeadTable | LowRankModulation | ExactLinear:
    """Shift and scale before the last layer."""
    if config.head_modulation is HeadModulation.table:
        return HeadTable(config.width)
    if config.head_modulation is HeadModulation.lora:
        return LowRankModulation(config.condition_width, config.width, config.modulation_rank, [2])
    return ExactLinear(config.condition_width, 2 * config.width, config.edge_bias)


def _image_embedding(config: DiTConfig) -> nn.Sequential:
    """Image tokens to the model's width: norm, an MLP of the image's own width, norm."""
    given, width = config.image_width, config.width
    norms = (Norm(NormKind.layer, channels, IMAGE_NORM_EPSILON, affine=True) for channels in (given, width))
    return nn.Sequential(next(norms), Linear(given, given), nn.GELU(), Linear(given, width), next(norms))


def _glyph_embedding(config: DiTConfig) -> nn.Sequential:
    """Glyph tokens to the model's width: norm, and an MLP of three layers."""
    inside = config.glyph_hidden_width
    norm = Norm(NormKind.layer, config.glyph_width, IMAGE_NORM_EPSILON, affine=True)
    first, second, last = Linear(config.glyph_width, inside), Linear(inside, inside), Linear(inside, config.width)
    return nn.Sequential(norm, first, nn.GELU(), second, nn.GELU(), last)


def _rows(grids: Sequence[Grid], condition: Condition, ahead: int = 0) -> Rows:
    """The video's rows of the condition behind those of its sound: one a clip, or one a frame where there are those."""
    if len(condition.raw) - ahead == len(grids):
        return _clip_rows(grids, condition)
    return Rows(tuple(h * w for t, h, w in grids for _ in range(t)), ahead)


def _clip_rows(grids: Sequence[Grid], condition: Condition) -> Rows:
    """The same with one row a clip in any case: the last ones."""
    return Rows(tuple(t * h * w for t, h, w in grids), len(condition.raw) - len(grids))


def _both_ears(sound: Sound) -> list[Tensor]:
    """(C, T, 2) each -> tokens (T * 2, C), one ear beside the other."""
    return [clip.flatten(1).T for clip in sound.latents]


def _of_clips(timesteps: Timesteps) -> Tensor:
    """One timestep a clip (B,): the largest of its frames'."""
    return timesteps if isinstance(timesteps, Tensor) else torch.stack([times.max() for times in timesteps])


def _of_rows(timesteps: Timesteps) -> Tensor:
    """One timestep for each row of the condition (R,): the clips', behind those of frames where they have their own."""
    return timesteps if isinstance(timesteps, Tensor) else torch.cat([*timesteps, _of_clips(timesteps)])


def _first_given(timestep: Tensor, frames: int) -> Tensor:
    """A clip's timestep () -> one for each of its frames, 0 for the first."""
    return torch.cat([timestep.new_zeros(1), timestep.expand(frames - 1)])


def _for_rows(clips: Tensor, timesteps: Timesteps) -> Tensor:
    """One row a clip -> the same; where frames have timesteps, one for each of its frames, and then the clips' own."""
    if isinstance(timesteps, Tensor):
        return clips
    frames = torch.tensor([len(times) for times in timesteps], device=clips.device)
    return torch.cat([clips.repeat_interleave(frames, dim=0), clips])
