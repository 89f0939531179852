"""The front of the DiT: latents become tokens, captions join them, timesteps become the condition of all blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Lengths
from kinema.models.dit import embeddings
from kinema.models.dit.axes import Rope, TextEdge
from kinema.models.dit.conditioning import CaptionCondition, Condition, ExactLinear, NormedTimesteps
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.extras import Extras, Sound
from kinema.models.dit.layers import Linear
from kinema.models.dit.packed import PackedClock, both_ears
from kinema.models.dit.patches import patchify, token_grid
from kinema.models.dit.places import Places
from kinema.models.dit.refiner import TextEncoder, TextRefiner, TextTower
from kinema.models.dit.rotary import Rotary
from kinema.models.dit.segments import (
    Grid,
    Segment,
    Segments,
    Tokens,
    Turns,
    clip_segment,
    joined,
    lengths_of,
    totals,
    video_segment,
)
from kinema.models.dit.timesteps import Timesteps, first_given, for_rows, of_clips, of_rows, video_rows
from kinema.models.position import shared_frequencies
from kinema.models.sequence import ALONE, SequenceGroup, Share


class Source(NamedTuple):
    """Something told of each clip, at the model's width: (M, D), and its tokens for each clip."""

    tokens: Tensor
    lengths: Lengths


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


class Front(nn.Module):
    """Everything before the first block; a DiT is a front, blocks and heads."""

    config: DiTConfig
    group: SequenceGroup = ALONE
    """The ranks that work on each pack together."""
    shared_modulation: ExactLinear | None
    """Made with the blocks, which say how many vectors they share; None where each has a layer of its own."""
    audio_embedding: Linear | None
    """Sound that shares the video's softmax."""

    def make_front(self, config: DiTConfig, latent_channels: int, text_width: int) -> None:
        """Patches; positions; captions and what joins them; timesteps and what is added to them."""
        self.config = config
        pt, ph, pw = config.patch_size
        channels = latent_channels + config.condition_channels + config.padding_channel
        self.patch_embedding = Linear(channels * pt * ph * pw, config.width, config.edge_bias)

        self.places = Places(config)
        self.rope_frequencies = (
            nn.Parameter(shared_frequencies(config.num_heads, config.head_dim, config.rope_theta))
            if config.rope is Rope.learned
            else None
        )
        self.rotary = Rotary(config)
        self.packed = PackedClock(config) if config.rope is Rope.packed else None

        self.text_embedding = embeddings.text_embedding(config, text_width)
        positions = (config.image_positions, config.image_width)
        self.image_positions = nn.Parameter(torch.zeros(positions)) if config.image_positions else None
        self.image_embedding = embeddings.image_embedding(config) if config.image_width else None
        self.glyph_embedding = embeddings.glyph_embedding(config) if config.glyph_width else None
        sources = len(config.caption_sources)
        self.source_types = nn.Parameter(torch.zeros(sources, config.width)) if sources > 1 else None

        self.timestep_embedding = embeddings.timestep_embedding(config)
        self.pooled_text = embeddings.pooled_text(config, text_width) if config.pooled_text else None
        self.pooled_embedding = embeddings.pooled_embedding(config) if config.pooled_width else None
        self.guidance_embedding = embeddings.guidance_embedding(config) if config.guidance else None
        self.ofs_embedding = embeddings.ofs_embedding(config) if config.ofs_channels else None
        self.caption_condition = (
            CaptionCondition(config.timestep_channels, config.caption_width, config.timestep_scale)
            if config.modulated_captions
            else None
        )

    def enter(self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras) -> Entered:
        """As `DiT.forward` takes them -> the first block's tokens, and all that blocks and heads read beside them."""
        grids = [token_grid(clip.shape, self.config.patch_size) for clip in latents]
        if self.config.first_frame_given and isinstance(timesteps, Tensor):
            timesteps = first_given(timesteps, grids)
        heard = extras.audio if self.config.audio_channels else None

        condition = self.condition(timesteps, text, extras)
        sources = self._sources(text, timesteps, condition, extras)
        told = {name: source.lengths for name, source in sources.items()}
        segments = self.segments(grids, told, condition, extras.fps, heard)
        if self.caption_condition is not None:
            captions = self.caption_condition(self._inside(of_clips(timesteps)))
            segments["text"] = replace(segments["text"], told=captions)
        segments, told_tokens = self._spread(segments, {name: source.tokens for name, source in sources.items()})

        dtype = condition.embedding.dtype
        tokens: Tokens = {"video": self._video(latents, grids, extras, segments["video"].share, dtype), **told_tokens}
        if self.audio_embedding is not None and heard is not None:
            ears = segments["audio"].share.of(torch.cat(both_ears(heard.latents)))
            tokens["audio"] = self.audio_embedding(ears).to(dtype)
        return Entered(tokens, segments, condition, grids, of_rows(timesteps), extras.fps, latents[0].dtype)

    def _spread(self, segments: Segments, told: Tokens) -> tuple[Segments, Tokens]:
        """Segments, and what is told of whole clips, as this rank holds them: of all that attends to itself its share.

        What cross-attention only reads lies here whole, of the clips whose video this rank has.
        """
        if self.config.text is not TextEdge.cross:
            held = {name: each.spread(self.group) for name, each in segments.items()}
            return held, {name: held[name].share.of(x) for name, x in told.items()}
        video = segments["video"].spread(self.group)
        first, pieces = video.share.pieces(video.lengths)
        crossed = {name: segments[name].of_clips(first, len(pieces)) for name in told}
        held = {"video": video, **{name: segment for name, (segment, _) in crossed.items()}}
        return held, {name: share.of(told[name]) for name, (_, share) in crossed.items()}

    def _video(
        self, latents: Sequence[Tensor], grids: Sequence[Grid], extras: Extras, share: Share, dtype: torch.dtype
    ) -> Tensor:
        """(n, D), this share of them, at their places."""
        given = self._with_given(latents, extras)
        video = self.patch_embedding(share.of(patchify(given, self.config.patch_size))).to(dtype)
        places = self.places.at_start(grids, video)
        return video if places is None else video + share.of(places)

    def _with_given(self, latents: Sequence[Tensor], extras: Extras) -> list[Tensor]:
        """Noisy latents with the channels that are given beside them."""
        beside = [[x] for x in latents]
        for clip, channels in zip(beside, extras.channels or [], strict=extras.channels is not None):
            clip.append(channels)
        if self.config.padding_channel:
            beside = [[*clip, torch.zeros_like(clip[0][:1])] for clip in beside]
        return [torch.cat(clip) if len(clip) > 1 else clip[0] for clip in beside]

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

    def _placed(self, image: Tensor) -> Tensor:
        return image if self.image_positions is None else image + self.image_positions

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
            return self.text_embedding(words, lengths, self._inside(of_clips(timesteps)))
        if isinstance(self.text_embedding, TextEncoder):
            return self.text_embedding(words, lengths)
        return self.text_embedding(words)

    def condition(self, timesteps: Timesteps, text: Sequence[Tensor], extras: Extras) -> Condition:
        """One row a clip; where frames have timesteps of their own, one for each of them and then one a clip.

        Those of sound in the same softmax come first.
        """
        rows = of_rows(timesteps)
        if self.audio_embedding is not None and extras.audio is not None:
            assert isinstance(extras.audio.timesteps, Tensor)
            rows = torch.cat([extras.audio.timesteps, rows])
        times = self._inside(rows)
        embedding = self.timestep_embedding(times)
        for clips in self._of_clips(text, extras, embedding.dtype, rows):
            embedding = embedding + for_rows(clips, timesteps)
        if self.guidance_embedding is not None and extras.guidance is not None:
            guidance = for_rows(self.guidance_embedding(rows.new_tensor(list(extras.guidance))), timesteps)
            given = rows == 0 if isinstance(timesteps, Sequence) else torch.zeros_like(rows, dtype=torch.bool)
            embedding = torch.where(given[:, None], embedding, embedding + guidance)
        active = F.silu(embedding)
        source = (
            self.timestep_embedding.for_all(times) if isinstance(self.timestep_embedding, NormedTimesteps) else active
        )
        shared = None if self.shared_modulation is None else self.shared_modulation(source)
        return Condition(embedding, active, shared)

    def _of_clips(self, text: Sequence[Tensor], extras: Extras, dtype: torch.dtype, like: Tensor) -> list[Tensor]:
        """What is added to timesteps and the same for all frames of a clip: (B, D) each."""
        clips = []
        if self.pooled_text is not None:
            clips.append(self.pooled_text(torch.cat(list(text)).to(dtype), lengths_of(text)))
        if self.pooled_embedding is not None and extras.pooled is not None:
            clips.append(self.pooled_embedding(torch.stack(list(extras.pooled))))
        if self.ofs_embedding is not None and extras.ofs is not None:
            clips.append(self.ofs_embedding(like.new_tensor(list(extras.ofs))))
        return clips

    def _inside(self, timesteps: Tensor) -> Tensor:
        """Timesteps as the network counts them."""
        return 1 - timesteps if self.config.reversed_time else timesteps

    def segments(
        self,
        grids: Sequence[Grid],
        told: Mapping[str, Lengths],
        condition: Condition,
        fps: Sequence[float] | None,
        sound: Sound | None = None,
    ) -> Segments:
        """Angles (dtype and device of the condition), cuts and orders, made once; blocks only read them."""
        like, config = condition.embedding, self.config
        rope, places = self._rope(grids, fps, told["text"], like), self.places.in_blocks(grids, like)
        rows = video_rows(grids, len(like), 0 if sound is None else len(sound))
        video = video_segment(grids, rows, rope, places, config.all_spans, config.window, like.device)
        own = len(like) - len(grids)
        segments = {"video": video, **{name: clip_segment(lengths, own) for name, lengths in told.items()}}
        if self.packed is None:
            return segments
        words = told["text"]
        segments["text"] = replace(segments["text"], rope=self.packed.words(words, like))
        if sound is not None:
            lengths = lengths_of(both_ears(sound.latents))
            segments["audio"] = replace(clip_segment(lengths), rope=self.packed.sound(lengths, grids, words, like))
        return segments

    def _rope(self, grids: Sequence[Grid], fps: Sequence[float] | None, words: Lengths, like: Tensor) -> Turns | None:
        """The rotary table of every token of the video."""
        if self.packed is not None:
            return self.packed.clips(grids, words, like)
        if self.config.rope is Rope.none:
            return None
        return self.rotary.clips(grids, fps, like, self.rope_frequencies)

    def on_clock(self, stream: Entered, clock: tuple[int, int, float]) -> Segment:
        """The stream's own segment with the time of its tokens, for an exchange with this clock."""
        cos, sin = self.rotary.times(stream.grids, stream.fps, stream.condition.raw, clock)
        segment = stream.segments["video"]
        return replace(segment, clock=(segment.share.of(cos), segment.share.of(sin)))
