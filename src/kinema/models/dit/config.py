"""What a DiT can be: its sizes and the axes along which published models differ."""

from dataclasses import dataclass, field, replace

from kinema.models.attention import AttentionKernel
from kinema.models.dit.axes import (
    Activation,
    AttentionPattern,
    CrossNorm,
    Expert,
    HeadModulation,
    ModulationSource,
    NormKind,
    PositionEmbedding,
    QKNorm,
    Rope,
    TextEdge,
    TextEmbedding,
)
from kinema.models.dit.rules import check
from kinema.models.dit.segments import Span


@dataclass
class StreamConfig:
    """A second stream, sound: a tower of blocks like the video's at a size of its own (HaCohen et al. 2026, LTX-2).

    Its latents (channels, T) are tokens as they are.
    """

    channels: int = 128
    """Channels of its latents at one time."""
    width: int = 96
    """Channels of a token."""
    num_heads: int = 3
    """Attention heads of its blocks and of the exchange."""
    extent: float = 20.0
    """Seconds of the longest clip."""
    stride: int = 4
    """Frames of the spectrogram in a latent; the first latent holds one."""
    fps: float = 100.0
    """Frames of the spectrogram a second."""
    text_width: int = 0
    """Channels of its captions; 0 for as many as the video's have."""
    crossed: bool = False
    """Whether the other's timestep modulates a stream where the two look at each other (LTX-2.3), not its own."""


@dataclass
class DiTConfig:
    """Size and shape of the diffusion transformer."""

    width: int = 192
    """Channels of a token."""
    depth: int = 6
    """Number of blocks."""
    single_depth: int = 0
    """How many of them, at the end, are single streams: video and caption share all weights, and attention and MLP
    run side by side (Dehghani et al. 2023; FLUX, HunyuanVideo). With text=joint.
    """
    num_heads: int = 6
    """Attention heads; each is width / num_heads channels wide, or `head_channels`."""
    head_channels: int = 0
    """Channels of a head where all heads together are wider or narrower than a token; 0 for width / num_heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over width."""
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Latent frames, rows and columns that one token holds."""
    condition_channels: int = 0
    """Channels of given latents (a first frame, a mask) beside the noisy ones, in the same patches."""
    padding_channel: bool = False
    """One channel more, which says where a frame is padding (Cosmos). No clip here is padded: it is zero."""
    attention: AttentionPattern = AttentionPattern.full
    window: list[int] = field(default_factory=lambda: [8, 7, 7])
    """Frames, rows and columns of tokens of a box of attention=windowed; at the edges of a clip boxes are smaller."""
    attention_kernel: AttentionKernel = AttentionKernel.sdpa
    text: TextEdge = TextEdge.cross
    text_to_the_end: bool = False
    """Whether the last block changes captions that nobody reads any more: published models have such weights."""
    text_queries_to_the_end: bool = False
    """Whether captions have queries even in the last block, where nobody asks them: Mochi has such weights."""
    activation: Activation = Activation.gelu
    bias: bool = True
    """Whether attention and MLP have biases."""
    mlp_bias: bool = True
    """Whether the MLP has them where attention has; single streams have both or none."""
    qkv_bias: bool = True
    """Whether queries, keys and values have them where attention has."""
    edge_bias: bool = True
    """Whether the layers of patches, timesteps, shared modulation and head have them."""
    norm: NormKind = NormKind.layer
    norm_eps: float = 1e-6
    """Added to the variance before the root."""
    norm_affine: bool = False
    """Whether norms have weights of their own before they are modulated."""
    head_norm: NormKind = NormKind.layer
    """The norm before the last layer."""
    final_norm: bool = False
    """One more norm between the last block and the head."""
    sandwich_norm: bool = False
    """The block's norm once more behind each operation, before its gate (Ding et al. 2021, CogView; Zhuo et al. 2024,
    Lumina-Next).
    """
    cross_norm: CrossNorm = CrossNorm.modulated
    modulated_captions: bool = False
    """Blocks read captions behind a shift and scale of the timestep, from an embedding of its own and a table in each
    (LTX-2.3). With text=cross.
    """
    modulation: ModulationSource = ModulationSource.table
    modulation_rank: int = 64
    """Width of the thin layers of modulation=lora."""
    modulation_shift: bool = True
    """Whether blocks shift what they norm, or only scale it (Mochi)."""
    tanh_gates: bool = False
    """Gates between -1 and 1 (Alayrac et al. 2022, Flamingo)."""
    head_modulation: HeadModulation = HeadModulation.linear
    qk_norm: QKNorm = QKNorm.rms_head
    qk_norm_eps: float = 1e-6
    head_gates: bool = False
    """Whether each token that asks also says, between 0 and 2, how much of each head it takes (Qiu et al. 2025, gated
    attention; LTX-2.3). With text=cross.
    """
    rope: Rope = Rope.axes
    rope_axes: list[int] = field(default_factory=lambda: [12, 10, 10])
    """Channels of a head that turn with time, height and width; even, and with `rope_still` they are the head."""
    rope_still: int = 0
    """Channels at the end of a head that do not turn, with rope=axes or packed."""
    rope_spans: list[float] = field(default_factory=lambda: [1.0])
    """Steps of the clock that frames of tokens take, over and over, with rope=packed."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of both position embeddings: they lie between 2 pi and 2 pi * theta tokens. Those of
    rope=learned begin there.
    """
    rope_side: float = 192.0
    """Rows and columns of the square whose area every frame is brought to, with rope=learned or packed."""
    rope_scale: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """How many times longer in time, height and width the slowest waves of rope=axes become, where the fastest stay:
    theta grows for that axis (NTK-aware scaling; bloc97 2023, Peng et al. 2023, YaRN, section 3.1).
    """
    rope_fps: float = 0.0
    """Frames a second whose tokens are one step of time apart, for clips whose rate `extras.fps` tells (Cosmos-Predict
    2); where it is not told, tokens are. 0 where the model knows no rates.
    """
    rope_extent: list[float] = field(default_factory=lambda: [20.0, 2048.0, 2048.0])
    """Seconds, rows and columns of pixels of the largest clip, with rope=fractional."""
    rope_units: list[float] = field(default_factory=lambda: [8 / 25, 32.0, 32.0])
    """Seconds of a latent frame, and rows and columns of pixels of a latent, with rope=fractional."""
    position_embedding: PositionEmbedding = PositionEmbedding.none
    position_scale: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """What a token's frame, row and column are divided by before the position embedding."""
    position_extent: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Frames, rows and columns of tokens that every clip is stretched to for the position embedding, whatever its size
    (PixArt-alpha, Latte); 0 leaves them as they are.
    """
    position_grid: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Frames, rows and columns of tokens of the largest clip, with position_embedding=learned_axes or learned."""
    position_words: int = 0
    """Words of the longest caption, with position_embedding=learned."""
    timestep_channels: int = 256
    """Sines and cosines of a timestep."""
    timestep_width: int = 0
    """Channels of a timestep's embedding; 0 for the model's width."""
    timestep_hidden_width: int = 0
    """Channels between the two layers of the timestep's embedding; 0 for as many as it has."""
    timestep_scale: float = 1000.0
    """What timesteps from 0 to 1 are multiplied by before their sines: DDPM counts a thousand (Ho et al. 2020)."""
    timestep_norm: bool = False
    """The sines themselves, normalised, are the embedding, and layers of their own make of them what all sublayers
    share (Cosmos). With modulation=lora.
    """
    ofs_channels: int = 0
    """Sines and cosines of `extras.ofs`, a number for each clip (CogVideoX 1.5 I2V); 0 for none."""
    guidance: bool = False
    """Embed the strength of guidance like a timestep: for models distilled to need no second pass."""
    pooled_width: int = 0
    """Channels of one vector for each caption (of CLIP, say) that is added to the timestep's embedding; 0 for none."""
    pooled_norm: bool = False
    """One layer and a norm bring that vector to the timestep's width, instead of two layers (Kandinsky 5)."""
    text_embedding: TextEmbedding = TextEmbedding.mlp
    refiner_depth: int = 2
    """Blocks of text_embedding=refiner or tower; MLPs of a refiner are 4 times the width, whatever mlp_ratio is."""
    text_activation: Activation = Activation.gelu
    """Between the two layers that bring captions to the model's width, or after the only one."""
    text_channels: int = 0
    """Channels of a caption's tokens in the blocks; 0 for the model's width. With text=cross or joint, where attention
    brings both to the model's width and back (Genmo 2024, Mochi 1).
    """
    pooled_text: bool = False
    """Add the mean of the text embeddings to the timestep's: the caption also modulates every block."""
    pooled_text_heads: int = 0
    """Heads of an attention that pools them, asked by their mean (Radford et al. 2021, CLIP); 0 for the mean itself."""
    reversed_time: bool = False
    """Inside, time runs from noise to data: blocks are told 1 - t, and the head says latents - noise (Mochi). Outside
    nothing changes.
    """
    first_frame_given: bool = False
    """The first frame of tokens holds a given image: blocks read it with timestep 0 and without guidance, the caption
    and the head with the clip's own timestep (HunyuanVideo I2V, token replacement).
    """
    image_width: int = 0
    """Channels of image tokens; 0 for none. With text=cross blocks read them as they read the caption, in a softmax of
    their own; otherwise they join the caption.
    """
    image_positions: int = 0
    """Image tokens that each have a learned position, where their order matters (a first and a last frame); 0 for none.
    """
    expert_boundary: float = 0.0
    """Timestep from which on clips go to a second set of weights, made for high noise (Balaji et al. 2022, eDiff-I; Wan
    2.2, with 0.875 for text and 0.9 for images); 0 for one model.
    """
    expert: Expert = Expert.both
    """Which of the two a training moves, with timesteps of its range alone; the other stays, and sampling uses both."""
    learned_variance: bool = False
    """The head also says, in as many channels again, where between its bounds the variance of a step lies (Nichol and
    Dhariwal 2021). `DiT.predict` returns it; `forward`, and so training and sampling here, leave it out: it keeps the
    numbers that it has.
    """
    glyph_width: int = 0
    """Channels of a second encoding of words, letter by letter, that joins the caption (Glyph-ByT5, Liu et al. 2024;
    HunyuanVideo-1.5); 0 for none. What joins it goes through the caption's weights, told apart by a learned vector.
    """
    glyph_hidden_width: int = 2048
    """Channels inside the MLP that brings it to the model's width."""
    audio: StreamConfig | None = None
    """A second stream, which looks at the video and is looked at in every block before the MLP (LTX-2)."""
    audio_channels: int = 0
    """Channels of the latents of sound that shares the video's softmax and weights (MiniMax-H3); 0 for none. A clip may
    come without. With rope=packed.
    """
    control_layers: list[int] = field(default_factory=list)
    """Blocks to whose video a second tower adds what it makes of `control_channels`, one block of its own for each
    (Zhang et al. 2023, ControlNet; Jiang et al. 2025, VACE). Its ways back start at zero. With text=cross.
    """
    control_channels: int = 0
    """Channels of the given latents (depth, poses, a masked clip) that the second tower reads."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together, and choices that exclude one another."""
        check(self)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.head_channels or self.width // self.num_heads

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Timesteps that a training draws: those of the expert that it moves."""
        low = self.expert_boundary if self.expert is Expert.high else 0.0
        return low, self.expert_boundary if self.expert is Expert.low else 1.0

    @property
    def condition_width(self) -> int:
        """Channels of the timestep's embedding."""
        return self.timestep_channels if self.timestep_norm else self.timestep_width or self.width

    @property
    def caption_width(self) -> int:
        """Channels of a caption's tokens in the blocks."""
        return self.text_channels or self.width

    def segment_width(self, segment: str) -> int:
        """Channels of a segment's tokens in the blocks."""
        return self.caption_width if segment == "text" and self.text is TextEdge.joint else self.width

    @property
    def hidden_width(self) -> int:
        """Channels inside the MLP."""
        return self.hidden_of(self.width)

    def hidden_of(self, width: int) -> int:
        """The same for tokens of another width."""
        return round(width * self.mlp_ratio)

    @property
    def exchange_clock(self) -> tuple[int, int, float]:
        """Width and heads of the exchange, and the seconds that a turn of its clock takes."""
        assert self.audio is not None
        return self.audio.width, self.audio.num_heads, max(self.rope_extent[0], self.audio.extent)

    @property
    def audio_tower(self) -> "DiTConfig":
        """The second stream as a DiT of its own: clips of one row and one column."""
        assert self.audio is not None
        return replace(
            self,
            audio=None,
            width=self.audio.width,
            num_heads=self.audio.num_heads,
            patch_size=[1, 1, 1],
            rope_extent=[self.audio.extent, 0.0, 0.0],
            rope_units=[float(self.audio.stride), 1.0, 1.0],
            rope_fps=self.audio.fps,
            condition_channels=0,
            image_width=0,
            image_positions=0,
            glyph_width=0,
            pooled_width=0,
            guidance=False,
            first_frame_given=False,
            learned_variance=False,
        )

    @property
    def caption_sources(self) -> list[str]:
        """What the segment of captions is made of."""
        image = self.image_width and self.text is not TextEdge.cross
        return ["text", *(["glyph"] if self.glyph_width else []), *(["image"] if image else [])]

    def spans(self, block: int) -> list[Span]:
        """The self-attentions of a block, in order."""
        if self.attention is AttentionPattern.full:
            return [Span.clip]
        if self.attention is AttentionPattern.windowed:
            return [[Span.window, Span.shifted][block % 2]]
        both = [Span.frame, Span.place]
        return both if self.attention is AttentionPattern.factorised else [both[block % 2]]

    @property
    def all_spans(self) -> set[Span]:
        """Those of all blocks; cross-attention asks with whole clips."""
        return {Span.clip, *(span for block in range(self.depth) for span in self.spans(block))}
