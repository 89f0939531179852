"""What a DiT can be: its sizes and the axes along which published models differ."""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from kinema.models.attention import AttentionKernel
from kinema.models.dit.segments import Span
from kinema.models.position import check_rope_axes


class AttentionPattern(Enum):
    """Which tokens of a clip see each other in self-attention."""

    full = "full"
    """Every token sees every other: one attention over the clip."""
    factorised = "factorised"
    """First within each frame, then over time at each place: cheaper for long clips (Bertasius et al. 2021,
    TimeSformer). With text=joint or shared, a frame shares its softmax with the caption, the caption asks all frames,
    and over time the video looks alone.
    """
    alternating = "alternating"
    """The same in whole blocks that take turns: the even ones look within each frame and at the caption, the odd ones
    over time at each place and at nothing else (Ma et al. 2024, Latte, variant 1).
    """
    windowed = "windowed"
    """Within boxes of `window` tokens, which every other block moves by half their sides so that boxes talk (Liu et al.
    2021, Swin; 2022, Video Swin).
    """


class PositionEmbedding(Enum):
    """What a token is told of its place beside the rotary embedding, which only shows distances."""

    none = "none"
    sincos = "sincos"
    """Sines and cosines added to it (Vaswani et al. 2017): it knows the frame's edges. Small models learn
    the faster for it.
    """
    sincos_quarters = "sincos_quarters"
    """The same with a quarter of the channels for time and the rest for columns and rows (CogVideoX)."""
    sincos_space = "sincos_space"
    """Half of the channels for columns and half for rows, none for time (PixArt-alpha)."""
    sincos_apart = "sincos_apart"
    """Half of the channels for columns and half for rows, and all of them again for time, added where a block first
    looks over time (Latte). A single frame has no time.
    """
    learned_axes = "learned_axes"
    """A learned vector for each frame, row and column of tokens up to `position_grid`; their sum, brought to unit size,
    is added again in every block (NVIDIA 2025, Cosmos 1).
    """
    learned = "learned"
    """A learned vector for each token of a clip, of exactly `position_grid`, and each word of a caption, of at most
    `position_words` (Dosovitskiy et al. 2020, ViT; CogVideoX 5B I2V). With text=shared.
    """


class Rope(Enum):
    """How the rotary embedding turns queries and keys in self-attention."""

    none = "none"
    axes = "axes"
    """Channels of each head belong to one axis and turn with the token's index along it."""
    fractional = "fractional"
    """All channels turn with the place as a fraction of `rope_extent` in seconds and pixels (LTX-Video)."""
    learned = "learned"
    """Every pair of channels of every head has learned frequencies along all axes (Heo et al. 2024, RoPE-Mixed), from
    the middle of a frame whose area is brought to that of `rope_side` squared (Genmo 2024, Mochi 1).
    """
    seconds = "seconds"
    """The same, at the middle of what a token covers and at the clip's own frame rate: a clock that sound can share
    (LTX-2). `rope_units` are then frames, rows and columns of pixels of a latent; an extent of 0 does not turn.
    """
    packed = "packed"
    """As axes, on one clock for all that shares a softmax: captions turn with their words, the clip begins behind the
    last of them, sound runs beside it (MiniMax-H3). With text=shared.
    """


class TextEdge(Enum):
    """How captions reach the video."""

    cross = "cross"
    """By an attention of their own in every block; blocks leave them as they are (PixArt-alpha)."""
    joint = "joint"
    """In one softmax with the video and changed by every block, with weights of their own (Esser et al. 2024)."""
    shared = "shared"
    """In one softmax with the video and through the same weights, modulated apart (CogVideoX)."""


class TextEmbedding(Enum):
    """What brings captions to the model's width."""

    mlp = "mlp"
    linear = "linear"
    refiner = "refiner"
    """A small transformer that knows the timestep (HunyuanVideo)."""
    tower = "tower"
    """A norm and `refiner_depth` blocks like the model's own, with rotary positions along the words (Kandinsky 5)."""
    encoder = "encoder"
    """`refiner_depth` blocks like the model's own without timestep and positions, and a norm (MiniMax-H3)."""
    activated = "activated"
    """One layer and `text_activation` (Cosmos-Predict 2.5)."""
    none = "none"
    """As they are; keys and values alone bring them to the model's width (Cosmos)."""


class ModulationSource(Enum):
    """Where the shift, scale and gate of a block come from."""

    table = "table"
    """One linear layer for all blocks and a learned table in each (adaLN-single)."""
    linear = "linear"
    """A linear layer in each block (adaLN-Zero): about a third more weights, hardly more time."""
    lora = "lora"
    """One linear layer for all sublayers, and in each the product of two thin ones (adaLN-LoRA; W.A.L.T., Gupta et al.
    2023; Cosmos, NVIDIA 2025).
    """


class HeadModulation(Enum):
    """Where the shift and scale before the last layer come from."""

    linear = "linear"
    """A linear layer of the timestep's embedding (Peebles and Xie 2023)."""
    table = "table"
    """A learned table added to the embedding itself (Chen et al. 2023, PixArt-alpha)."""
    lora = "lora"
    """As in the blocks, with modulation=lora."""


class Expert(Enum):
    """Which of two experts a training moves."""

    both = "both"
    """Neither is set apart: for import, sampling and export. It cannot be trained so."""
    high = "high"
    """That for high noise, on timesteps from the boundary on."""
    low = "low"
    """That for low noise, on timesteps below it."""


class NormKind(Enum):
    """What a block normalises its tokens with."""

    layer = "layer"
    """Mean and variance (Ba et al. 2016)."""
    rms = "rms"
    """Root mean square only (Zhang and Sennrich 2019)."""


class CrossNorm(Enum):
    """What stands before and after the attention to the caption; says nothing with text=joint or shared."""

    modulated = "modulated"
    """The same as for every other sublayer: norm, shift and scale, and a gate."""
    affine = "affine"
    """A layer norm with learned weights and no gate (Wan)."""
    plain = "plain"
    """The block's norm, neither modulated nor with a gate (LTX-2)."""
    none = "none"
    """Neither norm nor gate (PixArt-alpha, LTX-Video)."""


class QKNorm(Enum):
    """How queries and keys are normalised: it keeps logits from growing until bfloat16 training diverges."""

    none = "none"
    rms_head = "rms_head"
    """Root mean square of each head (Esser et al. 2024, Stable Diffusion 3)."""
    rms_all = "rms_all"
    """Root mean square over all heads together (Wan, LTX-Video)."""
    layer_head = "layer_head"
    """Layer norm of each head (Dehghani et al. 2023, ViT-22B; CogVideoX)."""


class Activation(Enum):
    """The non-linearity of an MLP."""

    gelu = "gelu"
    """Exact; three times as fast as gelu_tanh on a CPU."""
    gelu_tanh = "gelu_tanh"
    """The approximation which most published video models use."""
    silu = "silu"
    """x * sigmoid(x)."""
    swiglu = "swiglu"
    """SiLU of one linear layer times another (Shazeer 2020): half as many weights again at the same mlp_ratio."""


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
        above_zero = ["width", "depth", "num_heads", "mlp_ratio", "rope_theta", "norm_eps", "qk_norm_eps"]
        above_zero += ["modulation_rank", "timestep_scale", "glyph_hidden_width", "rope_side"]
        for name in (*above_zero, "timestep_channels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be above zero.")
        for name in (
            "condition_channels",
            "image_width",
            "timestep_width",
            "text_channels",
            "ofs_channels",
            "position_words",
            "rope_fps",
            "pooled_width",
            "single_depth",
            "image_positions",
            "control_channels",
            "glyph_width",
            "head_channels",
            "rope_still",
            "timestep_hidden_width",
            "audio_channels",
            "pooled_text_heads",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be zero or more.")
        if not self.head_channels and self.width % (2 * self.num_heads):
            usable = [heads for heads in range(1, self.width + 1) if self.width % (2 * heads) == 0]
            raise ValueError(
                f"model.num_heads={self.num_heads} must divide model.width={self.width} into heads of an "
                f"even width: rotary positions turn channel pairs. Usable: {usable or 'an even width'}."
            )
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(
                f"model.patch_size={self.patch_size} must be three numbers from 1 up (frames, rows, columns)."
                " Type for example model.patch_size=[1,2,2]."
            )
        for name in ("timestep_channels", "ofs_channels", "head_channels", "rope_still"):
            if getattr(self, name) % 2:
                raise ValueError(f"model.{name}={getattr(self, name)} must be even: waves and turns take pairs.")
        if self.text_activation is Activation.swiglu:
            raise ValueError("model.text_activation=swiglu needs a third layer. Type gelu, gelu_tanh or silu.")
        for name in ("rope_extent", "rope_units", "rope_scale", "position_scale"):
            value = getattr(self, name)
            flat = name == "rope_extent" and self.rope is Rope.seconds  # rows and columns need not turn
            if len(value) != 3 or min(value[:1] if flat else value) <= 0 or min(value) < 0:
                raise ValueError(f"model.{name}={value} must be three numbers above zero.")
        self._check_heads()
        self._check_packed()
        self._check_scaling()
        self._check_positions()
        self._check_experts()
        self._check_attention()
        self._check_text()
        self._check_pooled()
        self._check_modulation()
        self._check_control()
        self._check_audio()

    def _check_heads(self) -> None:
        if self.rope in (Rope.axes, Rope.packed):
            check_rope_axes(self.rope_axes, self.head_dim, self.rope_still)
        elif self.rope_still or self.head_channels:
            raise ValueError(
                f"model.rope_still={self.rope_still} and model.head_channels={self.head_channels} need heads whose "
                f"channels belong to axes: those of model.rope={self.rope.name} do not. Type model.rope=axes, or "
                "model.rope_still=0 model.head_channels=0."
            )

    def _check_packed(self) -> None:
        if self.rope is not Rope.packed:
            for name, plain in {"rope_spans": [1.0], "audio_channels": 0}.items():
                if getattr(self, name) != plain:
                    raise ValueError(
                        f"model.{name}={getattr(self, name)} needs model.rope=packed (it is {self.rope.name}). Type "
                        f"model.rope=packed or model.{name}={plain}."
                    )
            return
        if not self.rope_spans or min(self.rope_spans) <= 0:
            raise ValueError(
                f"model.rope_spans={self.rope_spans} must be one or more numbers above zero. Type model.rope_spans=[1]."
            )
        self._check_needed("rope=packed", {"text": TextEdge.shared, "attention": AttentionPattern.full})
        if self.audio_channels:
            self._check_needed(f"audio_channels={self.audio_channels}", ALONE_WITH_SOUND)

    def _check_needed(self, what: str, needed: dict[str, Any]) -> None:
        for key, value in needed.items():
            if getattr(self, key) != value:
                raise ValueError(f"model.{what} needs model.{key}={_typed(value)}. Type model.{key}={_typed(value)}.")

    def _check_scaling(self) -> None:
        scaled = [size for size, scale in zip(self.rope_axes, self.rope_scale, strict=True) if scale != 1]
        if scaled and (self.rope not in (Rope.axes, Rope.packed) or min(scaled) <= 2):
            raise ValueError(
                f"model.rope_scale={self.rope_scale} stretches waves of model.rope_axes={self.rope_axes} with "
                f"model.rope={self.rope.name}: it needs rope=axes or packed and, for a scale, more "
                "than one wave (two channels). Type model.rope_scale=[1,1,1]."
            )
        if self.rope_fps and self.rope not in (Rope.axes, Rope.seconds):
            raise ValueError(f"model.rope_fps={self.rope_fps} needs model.rope=axes or seconds. Type model.rope_fps=0.")
        if self.rope is Rope.seconds and not self.rope_fps:
            raise ValueError("model.rope=seconds needs a frame rate for clips that name none. Type model.rope_fps=24.")

    def _check_positions(self) -> None:
        is_learned = self.position_embedding in (PositionEmbedding.learned_axes, PositionEmbedding.learned)
        if len(self.position_grid) != 3 or min(self.position_grid) < 0 or is_learned is not all(self.position_grid):
            raise ValueError(
                f"model.position_grid={self.position_grid} must be frames, rows and columns of tokens of the "
                "largest clip with model.position_embedding=learned_axes or learned, and [0,0,0] with any other."
            )
        of_words = self.position_embedding is PositionEmbedding.learned
        if of_words is not bool(self.position_words) or (of_words and self.text is not TextEdge.shared):
            raise ValueError(
                f"model.position_words={self.position_words} must be the words of the longest caption with "
                f"model.position_embedding=learned and model.text=shared (it is {self.text.name}), and 0 otherwise."
            )
        if is_learned and (any(self.position_extent) or any(scale != 1 for scale in self.position_scale)):
            raise ValueError(
                f"model.position_extent={self.position_extent} and model.position_scale={self.position_scale} move "
                f"tokens between places; model.position_embedding={self.position_embedding.name} knows none. Type "
                "model.position_extent=[0,0,0] model.position_scale=[1,1,1]."
            )
        if self.position_embedding is PositionEmbedding.sincos_quarters and self.width % 16:
            raise ValueError(
                f"model.position_embedding=sincos_quarters cuts model.width={self.width} into quarters and eighths "
                "of whole pairs: it must be a multiple of 16."
            )
        halves = (PositionEmbedding.sincos_apart, PositionEmbedding.sincos_space)
        if self.position_embedding in halves and self.width % 4:
            raise ValueError(
                f"model.position_embedding={self.position_embedding.name} cuts model.width={self.width} into sines and "
                "cosines of columns and of rows: it must be a multiple of 4."
            )
        if len(self.position_extent) != 3 or min(self.position_extent) < 0:
            raise ValueError(f"model.position_extent={self.position_extent} must be three numbers from 0 up.")
        if self.position_embedding is PositionEmbedding.none and any(self.position_extent):
            raise ValueError(
                f"model.position_extent={self.position_extent} changes nothing with model.position_embedding=none. "
                "Type model.position_extent=[0,0,0]."
            )
        if self.position_embedding is PositionEmbedding.none and any(scale != 1 for scale in self.position_scale):
            raise ValueError(
                f"model.position_scale={self.position_scale} changes nothing with model.position_embedding=none. Type "
                "model.position_scale=[1,1,1]."
            )
        if self.rope is Rope.none and self.position_embedding is PositionEmbedding.none:
            raise ValueError(
                "model.rope=none with model.position_embedding=none: no token would know its place. Type "
                "model.position_embedding=sincos or model.rope=axes."
            )

    def _check_text(self) -> None:
        if self.text_embedding is TextEmbedding.refiner and self.head_channels:
            raise ValueError(
                f"model.text_embedding=refiner has heads of its own: model.head_channels={self.head_channels} does not "
                "reach them. Type model.text_embedding=linear or model.head_channels=0."
            )
        for name in ("head_gates", "modulated_captions"):
            if getattr(self, name) and self.text is not TextEdge.cross:
                raise ValueError(
                    f"model.{name}=true needs model.text=cross (it is {self.text.name}): one softmax for captions and "
                    f"video has neither. Type model.{name}=false."
                )
        own_width = self.text_embedding in (TextEmbedding.refiner, TextEmbedding.tower, TextEmbedding.encoder)
        if self.text_channels and (self.text is TextEdge.shared or own_width):
            raise ValueError(
                f"model.text_channels={self.text_channels}: only model.text=cross or joint without refiner, tower "
                "or encoder reads captions of another width than the model's. Type model.text_channels=0."
            )
        if self.text_channels and self.text is TextEdge.joint:
            self._check_two_widths()
        if self.glyph_width and (self.text_channels or self.text_embedding is TextEmbedding.none):
            raise ValueError(
                f"model.glyph_width={self.glyph_width} joins captions of the model's width, which those with "
                f"model.text_channels={self.text_channels} and model.text_embedding={self.text_embedding.name} do not "
                "have. Type model.glyph_width=0."
            )
        if self.image_positions and not self.image_width:
            raise ValueError(
                f"model.image_positions={self.image_positions} places image tokens, which model.image_width=0 refuses. "
                "Type their width, or model.image_positions=0."
            )
        whole = self.attention in (AttentionPattern.full, AttentionPattern.factorised)
        if self.text is not TextEdge.cross and not whole:
            raise ValueError(
                f"model.text={self.text.name} puts captions into the softmax of a clip or of its frames, which "
                f"model.attention={self.attention.name} does not have. Type model.attention=factorised, "
                "model.attention=full or model.text=cross."
            )
        if self.single_depth and (self.text is not TextEdge.joint or self.single_depth >= self.depth):
            raise ValueError(
                f"model.single_depth={self.single_depth} needs model.text=joint and to be below model.depth="
                f"{self.depth}: single streams follow blocks in which captions have weights of their own. Type "
                "model.single_depth=0 or model.text=joint."
            )
        for name in ("text_to_the_end", "text_queries_to_the_end"):
            if getattr(self, name) and (self.text is not TextEdge.joint or self.single_depth):
                raise ValueError(
                    f"model.{name}=true says something only of model.text=joint without single_depth: elsewhere "
                    "the last block has no weights for captions alone."
                )
        if self.text_to_the_end and self.text_queries_to_the_end:
            raise ValueError(
                "model.text_to_the_end=true has the queries of model.text_queries_to_the_end=true and all else. Type "
                "model.text_queries_to_the_end=false."
            )

    def _check_pooled(self) -> None:
        if self.pooled_norm and not self.pooled_width:
            raise ValueError("model.pooled_norm=true needs a vector to norm: type model.pooled_width, or leave it out.")
        if self.pooled_text_heads and not self.pooled_text:
            raise ValueError(
                f"model.pooled_text_heads={self.pooled_text_heads} pool what model.pooled_text=false leaves out. Type "
                "model.pooled_text=true, or model.pooled_text_heads=0."
            )

    def _check_two_widths(self) -> None:
        """What blocks share between captions and video has one width."""
        needed = {
            "modulation": ModulationSource.linear,
            "norm_affine": False,
            "single_depth": 0,
            "image_width": 0,
        }
        for key, value in needed.items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"model.text_channels={self.text_channels} with model.text=joint needs model.{key}="
                    f"{_typed(value)}: what captions and video share there has one width."
                )

    def _check_experts(self) -> None:
        if not 0 <= self.expert_boundary < 1:
            raise ValueError(f"model.expert_boundary={self.expert_boundary} must be in [0, 1), for example 0.875.")
        if self.expert is not Expert.both and not self.expert_boundary:
            raise ValueError(
                f"model.expert={self.expert.name} needs two experts: type model.expert_boundary=0.875, or leave it out."
            )

    def _check_attention(self) -> None:
        if len(self.window) != 3 or min(self.window) < 1:
            raise ValueError(
                f"model.window={self.window} must be three numbers from 1 up (frames, rows and columns of tokens). "
                "Type for example model.window=[4,8,8]."
            )
        if self.attention is not AttentionPattern.alternating:
            return
        if self.depth % 2:
            raise ValueError(
                f"model.attention=alternating pairs a block within frames with one over time: model.depth={self.depth} "
                "must be even."
            )
        if self.modulation is ModulationSource.table and self.cross_norm is CrossNorm.modulated:
            raise ValueError(
                "model.modulation=table is shared by all blocks, but with model.attention=alternating only every other "
                "one has a caption to modulate. Type model.cross_norm=none or model.modulation=linear."
            )

    def _check_modulation(self) -> None:
        is_lora = self.modulation is ModulationSource.lora
        if self.head_modulation is HeadModulation.lora and not is_lora:
            raise ValueError(
                "model.head_modulation=lora adds to what model.modulation=lora shares; model.modulation="
                f"{self.modulation.name} shares no such thing. Type model.head_modulation=linear."
            )
        if self.timestep_norm and (not is_lora or self.timestep_width):
            raise ValueError(
                f"model.timestep_norm=true needs model.modulation=lora (it is {self.modulation.name}), "
                f"and has model.timestep_channels itself: type model.timestep_width=0 (it is {self.timestep_width})."
            )
        if self.timestep_norm and self.timestep_hidden_width:
            raise ValueError(
                f"model.timestep_hidden_width={self.timestep_hidden_width} lies between two layers, which "
                "model.timestep_norm=true does not have. Type model.timestep_hidden_width=0."
            )
        if self.modulation is ModulationSource.table and self.single_depth:
            raise ValueError(
                "model.modulation=table is shared by all blocks, but those of model.single_depth="
                f"{self.single_depth} have other sublayers. Type model.modulation=linear or model.single_depth=0."
            )
        if self.head_modulation is HeadModulation.table and self.condition_width != self.width:
            raise ValueError(
                f"model.head_modulation=table adds the timestep's embedding to rows of model.width={self.width}, but "
                f"it has {self.condition_width} channels (model.timestep_width={self.timestep_width}). Type "
                "model.head_modulation=linear."
            )

        if is_lora and not self.modulation_shift:
            raise ValueError(
                "model.modulation_shift=false with model.modulation=lora: what it shares begins with a shift. Type "
                "model.modulation=linear or table."
            )
        if self.sandwich_norm and self.text is TextEdge.cross and self.cross_norm is not CrossNorm.modulated:
            raise ValueError(
                "model.sandwich_norm=true needs a gate behind every norm, which model.cross_norm="
                f"{self.cross_norm.name} does not have: a new block could not begin as the identity. Type "
                "model.cross_norm=modulated."
            )
        if self.reversed_time and self.learned_variance:
            raise ValueError(
                "model.reversed_time=true turns the sign of what the head says, and model.learned_variance=true has "
                "variances there. Type model.learned_variance=false."
            )

    def _check_audio(self) -> None:
        if self.audio is None:
            return
        needed = {
            "text": TextEdge.cross,
            "attention": AttentionPattern.full,
            "rope": Rope.seconds,
            "position_embedding": PositionEmbedding.none,
            "control_layers": [],
            "norm_affine": False,
            "reversed_time": False,
        }
        for key, value in needed.items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"model.audio needs model.{key}={_typed(value)}: two towers of blocks on a common clock."
                )
        if self.audio.text_width < 0:
            raise ValueError(f"model.audio.text_width={self.audio.text_width} must be zero or more.")
        if self.audio.width % (2 * self.audio.num_heads):
            raise ValueError(
                f"model.audio.num_heads={self.audio.num_heads} must divide model.audio.width={self.audio.width} into "
                "heads of an even width."
            )

    def _check_control(self) -> None:
        layers = self.control_layers
        if bool(layers) != bool(self.control_channels):
            raise ValueError(
                f"model.control_layers={layers} with model.control_channels={self.control_channels}: a control tower "
                "needs both, the blocks it adds to and the channels it reads. Type both, or neither."
            )
        if layers != sorted(set(layers) & set(range(self.depth))):
            raise ValueError(
                f"model.control_layers={layers} must be blocks from 0 to {self.depth - 1} in rising order, each once."
            )
        if layers and self.text is not TextEdge.cross:
            raise ValueError(
                f"model.control_layers={layers} needs model.text=cross: with model.text={self.text.name} the tower "
                "would change captions that nobody reads."
            )

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


ALONE_WITH_SOUND: dict[str, Any] = {
    "modulation": ModulationSource.linear,
    "head_modulation": HeadModulation.linear,
    "first_frame_given": False,
    "guidance": False,
    "pooled_text": False,
    "pooled_width": 0,
    "ofs_channels": 0,
    "audio": None,
}
"""What sound in the video's softmax demands of the rest: nothing but timesteps modulates."""


def _typed(value: object) -> str:
    """As one types it on the command line."""
    return value.name if isinstance(value, Enum) else str(value).lower()
