"""How a release encodes captions with an encoder of `transformers`: the choices, without the encoder."""

from dataclasses import dataclass
from enum import Enum

from kinema.conditioning.text.cleaning import TextCleaning
from kinema.conditioning.text.encoder import TextConfig


class TextFamily(Enum):
    """Which class of `transformers` reads the weights."""

    t5 = "t5"
    """Also ByT5 and T5-11B."""
    umt5 = "umt5"
    clip = "clip"
    llama = "llama"
    qwen = "qwen"
    """The language part of Qwen2.5-VL."""
    auto = "auto"
    """Any encoder that `AutoModel` knows, such as BERT."""


class TextPadding(Enum):
    """What becomes of captions shorter than `max_tokens`; published models differ, and it shows."""

    none = "none"
    """Masked in the encoder; only the real tokens come out."""

    zeros = "zeros"
    """Masked in the encoder; then zeros up to max_tokens."""

    encoded = "encoded"
    """Padding tokens are encoded like words, without any mask, and max_tokens embeddings come out."""

    overheard = "overheard"
    """Padding tokens up to max_tokens are encoded like words, without any mask, but only the real tokens come out."""


class TextDtype(Enum):
    """What a pretrained encoder computes in; the embeddings are float32 either way."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class PretrainedText(TextConfig):
    """A frozen encoder from `transformers`, read from safetensors weights only."""

    path: str = ""
    """A local folder with config, safetensors weights and tokenizer, or a name on the hub."""

    family: TextFamily = TextFamily.t5
    """t5, umt5, clip, llama, qwen or auto."""

    max_tokens: int = 256
    """Longer captions are cut here, counted and logged."""

    padding: TextPadding = TextPadding.none
    """none, zeros, encoded or overheard."""

    cleaning: TextCleaning = TextCleaning.none
    """none, web or lower: what is done to a caption before anything else."""

    blank: str = ""
    """What stands for a caption of no characters, the null caption among them."""

    template: str = "{}"
    """What the encoder reads; {} stands for the caption. The null caption passes through it too."""

    crop: int = 0
    """Tokens at the front, of the template, that the encoder reads but nobody else; max_tokens counts without them."""

    layer: int = -1
    """Which hidden layer to take: -1 is the output with its final norm, -2 the layer before, without it."""

    dtype: TextDtype = TextDtype.float32
    """float32 or bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("text.path is empty: type the folder of a text encoder, or its name on the hub.")
        if self.template.count("{}") != 1:
            raise ValueError(f"text.template={self.template!r} must hold {{}} exactly once, where the caption goes.")
        if self.layer >= 0:
            raise ValueError(f"text.layer={self.layer} counts from the end: -1 is the output, -2 the layer before.")
        if self.crop < 0:
            raise ValueError(f"text.crop={self.crop} must be 0 or the number of the template's tokens at the front.")

    @property
    def read_tokens(self) -> int:
        """Tokens that the encoder reads at most."""
        return self.crop + self.max_tokens
