"""The DiT: front, blocks and heads, how they start, and the way of a pack through them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from kinema.models.attention import Attention
from kinema.models.dit.axes import ModulationSource
from kinema.models.dit.blocks import blocks, shared_slots
from kinema.models.dit.compiled import Compiler
from kinema.models.dit.conditioning import (
    SHARED_SLOTS,
    CaptionCondition,
    ExactLinear,
    LinearModulation,
    LowRankModulation,
)
from kinema.models.dit.config import DiTConfig
from kinema.models.dit.control import ControlTower
from kinema.models.dit.counting import products
from kinema.models.dit.exchange import Exchange, ExchangeCondition
from kinema.models.dit.extras import Extras
from kinema.models.dit.front import Entered, Front
from kinema.models.dit.heads import Heads, Predictions
from kinema.models.dit.inputs import check_extras, check_pack
from kinema.models.dit.layers import JointAttention, Linear, SegmentAttention, SingleStream
from kinema.models.dit.patches import patchify
from kinema.models.dit.segments import Grid, Rows, Tokens
from kinema.models.dit.sublayers import Block, Sublayer
from kinema.models.dit.timesteps import Timesteps
from kinema.models.sequence import SequenceGroup

NO_EXTRAS = Extras()


class DiT(Front, Heads):
    """Diffusion transformer over packs: clips of any size in one call, each with its timestep and caption.

    Peebles and Xie 2023, with spacetime patches, positions in three axes, and the caption by cross-attention
    (PixArt-alpha, Chen et al. 2023) or in one softmax with the video (Esser et al. 2024); `DiTConfig` says which.
    Linear layers start from Xavier's uniform distribution with zero biases; everything that modulates, the last
    layer, and the way back of what has no gate start at zero. Hence every block of a new model is the identity, and
    its prediction is exactly zero.
    """

    def __init__(self, config: DiTConfig, latent_channels: int, text_width: int) -> None:
        super().__init__()
        self.latent_channels, self.text_width = latent_channels, text_width
        self.make_front(config, latent_channels, text_width)
        self._make_blocks(config)
        self.audio_embedding = (
            Linear(config.audio_channels, config.width, config.edge_bias) if config.audio_channels else None
        )
        self._make_second_stream(config)
        self.make_heads(config, latent_channels)
        self._initialise()

    def _make_blocks(self, config: DiTConfig) -> None:
        """The blocks with what they share, and the tower that adds to some of them."""
        made = blocks(config)
        shared = SHARED_SLOTS if config.modulation is ModulationSource.lora else shared_slots(made)
        self.shared_modulation = (
            None
            if config.modulation is ModulationSource.linear
            else ExactLinear(config.condition_width, shared * config.width, config.edge_bias)
        )
        self.blocks = nn.ModuleList(made)
        self.control = ControlTower(config) if config.control_layers else None

    def _make_second_stream(self, config: DiTConfig) -> None:
        """A DiT of its own for the sound, and what the two exchange in every block."""
        self.audio = (
            DiT(config.audio_tower, config.audio.channels, config.audio.text_width or self.text_width)
            if config.audio
            else None
        )
        self.exchanges = nn.ModuleList(Exchange(config) for _ in self.blocks if config.audio)
        widths = {"video": config.width, "audio": config.audio.width} if config.audio else {}
        self.exchange_conditions = nn.ModuleDict(
            {name: ExchangeCondition(config, size) for name, size in widths.items()}
        )

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
        check_extras(self.config, latents, extras)
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

    def _check(self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor]) -> None:
        check_pack(self.config, self.latent_channels, self.text_width, latents, timesteps, text)

    def _predict_sorted(
        self, latents: Sequence[Tensor], timesteps: Timesteps, text: Sequence[Tensor], extras: Extras
    ) -> Predictions:
        video = self.enter(latents, timesteps, text, extras)
        if self.audio is None or extras.audio is None:
            return self.leave(video, self._through(video, extras))
        sound, heard = self.audio, extras.audio
        columns = [x[..., None, None] for x in heard.latents]
        assert heard.text is not None
        sound._check(columns, heard.timesteps, heard.text)
        audio = sound.enter(columns, heard.timesteps, heard.text, NO_EXTRAS)
        seen, played = self._through_both(video, audio)
        sounds = sound.leave(audio, played).video
        return Predictions(self.leave(video, seen).video, [x[..., 0, 0] for x in sounds])

    def _through(self, entered: Entered, extras: Extras) -> Tokens:
        """Through all blocks."""
        tokens, segments, condition = entered.tokens, entered.segments, entered.condition
        hints = self._hints(entered, extras)
        for layer, each in enumerate(self.blocks):
            tokens = each(tokens, segments, condition)
            if layer in hints:
                tokens = {**tokens, "video": tokens["video"] + hints[layer]}
        return tokens

    def _hints(self, entered: Entered, extras: Extras) -> dict[int, Tensor]:
        """What the control tower adds to the video after some blocks: layer -> (N, D)."""
        if self.control is None or extras.control is None:
            return {}
        patches = entered.segments["video"].share.of(patchify(extras.control, self.config.patch_size))
        hints = self.control(patches, entered.tokens, entered.segments, entered.condition)
        return dict(zip(self.control.layers, hints, strict=True))

    def _through_both(self, video: Entered, audio: Entered) -> tuple[Tokens, Tokens]:
        """Through the blocks of both streams, which look at each other before the MLP of each."""
        assert self.audio is not None
        clock = self.config.exchange_clock
        segments = {"video": self.on_clock(video, clock), "audio": self.audio.on_clock(audio, clock)}
        times = {"video": video.timesteps, "audio": audio.timesteps}
        if self.config.audio is not None and self.config.audio.crossed:
            times = {"video": audio.clip_timesteps, "audio": video.clip_timesteps}
            segments = {
                name: replace(each, rows=Rows(each.lengths).held(each.share)) for name, each in segments.items()
            }
        shared = {name: self.exchange_conditions[name](rows) for name, rows in times.items()}
        seen, heard = video.tokens, audio.tokens
        for block, other, exchange in zip(self.blocks, self.audio.blocks, self.exchanges, strict=True):
            seen = block(seen, video.segments, video.condition, slice(-1))
            heard = other(heard, audio.segments, audio.condition, slice(-1))
            both = exchange({"video": seen["video"], "audio": heard["video"]}, segments, shared)
            seen = block({**seen, "video": both["video"]}, video.segments, video.condition, slice(-1, None))
            heard = other({**heard, "video": both["audio"]}, audio.segments, audio.condition, slice(-1, None))
        return seen, heard

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

    def all_blocks(self) -> list[Block]:
        """All that repeats, first to last: with those of the caption's refiner, the control tower and the sound."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def replace_attention(self, replace: Callable[[Attention], Attention]) -> None:
        """Put `replace(present)` behind the door of every attention."""
        for module in self.modules():
            if isinstance(module, SegmentAttention | JointAttention | SingleStream):
                module.attention = replace(module.attention)

    def compile_blocks(self, compiler: Compiler) -> None:
        """Compile what all blocks, and what two streams exchange, compute around their attention."""
        for module in self.modules():
            if isinstance(module, Sublayer):
                module.compile_around_attention(compiler)

    def share_tokens(self, group: SequenceGroup) -> None:
        """Work on every pack together with the other ranks of a group, which have the same weights and packs."""
        self.group = group
        if self.audio is not None:
            self.audio.share_tokens(group)

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
        sound = 0.0 if self.audio is None else self.audio.flops((audio[0], 1, 1), audio[1])
        return 2.0 * products(self, self.config, grid, told) + sound
