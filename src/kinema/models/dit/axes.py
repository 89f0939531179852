"""The axes along which published models differ: what each can be, and whose it is."""

from enum import Enum


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


def typed(value: object) -> str:
    """As one types it on the command line."""
    return value.name if isinstance(value, Enum) else str(value).lower()
