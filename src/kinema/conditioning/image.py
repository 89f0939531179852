"""A frozen image encoder: given images to tokens, which blocks read as they read captions."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from kinema.conditioning.text import TextDtype
from kinema.conditioning.text.reading import hash_weights


class ImageFamily(Enum):
    """Which class of `transformers` reads the weights."""

    clip = "clip"
    siglip = "siglip"


@dataclass
class ImageTokens:
    """Tokens of the given images, from an encoder of `transformers`."""

    path: str = ""
    """A local folder with config, safetensors weights and preprocessor_config.json, or a name on the hub."""

    family: ImageFamily = ImageFamily.clip
    """clip or siglip."""

    layer: int = -2
    """Which hidden layer to take: -2 is the last but one (Wan 2.1), -1 the output with its norm (HunyuanVideo-1.5)."""

    dtype: TextDtype = TextDtype.float32
    """float32 or bfloat16; the tokens are float32 either way."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                "condition.image.path is empty: type the folder of an image encoder, or its name on the hub."
            )
        if self.layer >= 0:
            raise ValueError(f"condition.image.layer={self.layer} counts from the end: -1 is the output.")


class ImageEncoder:
    """Images to tokens. Frozen."""

    def __init__(self, config: ImageTokens) -> None:
        import transformers

        classes = {ImageFamily.clip: transformers.CLIPVisionModel, ImageFamily.siglip: transformers.SiglipVisionModel}
        dtype = torch.float32 if config.dtype is TextDtype.float32 else torch.bfloat16
        self.config = config
        self.processor = read(transformers.AutoImageProcessor, config, backend="pil")
        options = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
        self.model, loading = read(classes[config.family], config, **options)
        if loading["missing_keys"]:  # transformers would go on with random numbers
            raise ValueError(
                f"condition.image.path={config.path} lacks weights of condition.image.family={config.family.value}, "
                f"for example {min(loading['missing_keys'])}."
            )
        self.model.eval().requires_grad_(False)
        self.width: int = self.model.config.hidden_size
        patches = (self.model.config.image_size // self.model.config.patch_size) ** 2
        self.num_tokens = patches + (config.family is ImageFamily.clip)  # CLIP's class token
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> "ImageEncoder":
        """Move the weights, and what comes out."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) of one clip -> float32 (n * num_tokens, width), image after image."""
        from PIL import Image

        pictures = [Image.fromarray(image.numpy()) for image in images.cpu()]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        output = self.model(pixels.to(self.device, self.model.dtype), output_hidden_states=self.config.layer != -1)
        hidden = output.last_hidden_state if self.config.layer == -1 else output.hidden_states[self.config.layer]
        return hidden.float().flatten(0, 1)

    def nothing(self, images: int) -> Tensor:
        """The tokens of a clip that goes without its images: zeros."""
        return torch.zeros(images * self.num_tokens, self.width, device=self.device)

    def policy(self) -> dict[str, Any]:
        """Everything that decides a token, except where the weights lie: what the manifest carries."""
        steps = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        return {
            "encoder": self.config.family.value,
            "weights": hash_weights(self.model),
            "layer": self.config.layer,
            "dtype": self.config.dtype.value,
            "preprocessing": hashlib.sha256(steps.encode()).hexdigest()[:16],
        }


def check_image_policy(encoder: ImageEncoder, manifest: Mapping[str, Any]) -> None:
    """Refuse an encoder whose policy contradicts the manifest's, naming each field."""
    policy = encoder.policy()
    if different := [key for key in policy if policy[key] != manifest.get(key)]:
        fields = ", ".join(f"{key}={policy[key]!r} (trained with {manifest.get(key)!r})" for key in different)
        raise ValueError(f"condition.image: this is not the image encoder of the training: {fields}.")


def read(kind: Any, config: ImageTokens, **options: Any) -> Any:
    """`kind.from_pretrained`, with an error that names the config key."""
    try:
        return kind.from_pretrained(config.path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"condition.image.path={config.path} cannot be read by {kind.__name__}: it must hold config.json, "
            f"preprocessor_config.json and *.safetensors weights. {error}"
        ) from None
