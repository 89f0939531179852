"""What a DiT can be: its sizes and the axes along which published models differ."""

from dataclasses import dataclass, field
from enum import Enum

from kinema.models.attention import AttentionKernel
from kinema.models.dit.segments import Span
from kinema.models.position import check_rope_axes


class AttentionPattern(Enum):
    """Which tokens of a clip see each other in self-attention."""

    full = "full"
    """Every token sees every other: one attention over the clip."""
    factorised = "factorised"
    """First within each frame, then over time at each place: cheaper for long clips."""


class PositionEmbedding(Enum):
    """What a token is told of its place beside the rotary embedding, which only shows distances."""

    none = "none"
    sincos = "sincos"
    """Sines and cosines added to it (Vaswani et al. 2017): it knows the frame's edges. Small models learn
    the faster for it.
    """


class ModulationSource(Enum):
    """Where the shift, scale and gate of a block come from."""

    table = "table"
    """One linear layer for all blocks and a learned table in each (adaLN-single)."""
    linear = "linear"
    """A linear layer in each block (adaLN-Zero): about a third more weights, hardly more time."""


class HeadModulation(Enum):
    """Where the shift and scale before the last layer come from."""

    linear = "linear"
    """A linear layer of the timestep's embedding (Peebles and Xie 2023)."""
    table = "table"
    """A learned table added to the embedding itself (Chen et al. 2023, PixArt-alpha)."""


class NormKind(Enum):
    """What a block normalises its tokens with."""

    layer = "layer"
    """Mean and variance (Ba et al. 2016)."""
    rms = "rms"
    """Root mean square only (Zhang and Sennrich 2019)."""


class CrossNorm(Enum):
    """What stands before and after the attention to the caption."""

    modulated = "modulated"
    """The same as for every other sublayer: norm, shift and scale, and a gate."""
    affine = "affine"
    """A layer norm with learned weights and no gate (Wan)."""
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
class DiTConfig:
    """Size and shape of the diffusion transformer."""

    width: int = 192
    """Channels of a token."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int = 6
    """Attention heads; each is width / num_heads channels wide."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over width."""
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Latent frames, rows and columns that one token holds."""
    condition_channels: int = 0
    """Channels of given latents (a first frame, a mask) beside the noisy ones, in the same patches."""
    attention: AttentionPattern = AttentionPattern.full
    attention_kernel: AttentionKernel = AttentionKernel.sdpa
    activation: Activation = Activation.gelu
    bias: bool = True
    """Whether attention and MLP have biases."""
    norm: NormKind = NormKind.layer
    norm_eps: float = 1e-6
    """Added to the variance before the root."""
    cross_norm: CrossNorm = CrossNorm.modulated
    modulation: ModulationSource = ModulationSource.table
    head_modulation: HeadModulation = HeadModulation.linear
    qk_norm: QKNorm = QKNorm.rms_head
    qk_norm_eps: float = 1e-6
    rope_axes: list[int] = field(default_factory=lambda: [12, 10, 10])
    """Channels of a head that turn with time, height and width; even, and their sum is the head width."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of both position embeddings: they lie between 2 pi and 2 pi * theta tokens."""
    position_embedding: PositionEmbedding = PositionEmbedding.none
    timestep_channels: int = 256
    """Sines and cosines of a timestep."""
    text_activation: Activation = Activation.gelu
    """Between the two layers that bring captions to the model's width."""
    pooled_text: bool = False
    """Add the mean of the text embeddings to the timestep's: the caption also modulates every block."""
    image_width: int = 0
    """Channels of image tokens, which blocks read as they read the caption, in a softmax of their own; 0 for none."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together, and choices that exclude one another."""
        above_zero = ["width", "depth", "num_heads", "mlp_ratio", "rope_theta", "norm_eps", "qk_norm_eps"]
        for name in (*above_zero, "timestep_channels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be above zero.")
        for name in ("condition_channels", "image_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be zero or more.")
        if self.width % (2 * self.num_heads):
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
        if self.timestep_channels % 2:
            raise ValueError(f"model.timestep_channels={self.timestep_channels} must be even: half are cosines.")
        if self.text_activation is Activation.swiglu:
            raise ValueError("model.text_activation=swiglu needs a third layer. Type gelu, gelu_tanh or silu.")
        check_rope_axes(self.rope_axes, self.head_dim)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        """Channels inside the MLP."""
        return round(self.width * self.mlp_ratio)

    @property
    def spans(self) -> list[Span]:
        """The self-attentions of a block, in order."""
        return [Span.clip] if self.attention is AttentionPattern.full else [Span.frame, Span.place]
