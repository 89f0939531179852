"""Captions from a vision-language model of `transformers`."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_prep.clip_frames import spread_frames
from kinema.identity import digest

WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


class VisionLanguageCaptioner:
    """Shows the frames of a clip and a prompt, in the model's own chat template, and takes the likeliest answer.

    Nothing is drawn: equal frames give equal captions, as far as the arithmetic of the device does.
    """

    def __init__(
        self,
        model: str,
        prompt: str,
        frames: int,
        *,
        revision: str | None = None,
        max_new_tokens: int = 128,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        if not model:
            raise ValueError("caption.model is empty: give the folder of a vision-language model, or its name.")
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.prompt, self.frames, self.max_new_tokens = prompt, frames, max_new_tokens
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self.processor: Any = AutoProcessor.from_pretrained(model, revision=revision)
            loaded = AutoModelForImageTextToText.from_pretrained(model, revision=revision, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"caption.model={model} cannot be loaded: {error}") from error
        if not self.processor.chat_template:
            raise ValueError(f"caption.model={model} has no chat template; choose a model that was tuned to answer.")
        self.model: Any = loaded.to(self.device).eval()
        settings = {"prompt": prompt, "frames": frames, "max_new_tokens": max_new_tokens, "dtype": dtype}
        self.identity = digest({"model": model_identity(model, loaded), **settings})

    @torch.no_grad()
    def caption(self, clip: Path, num_frames: int) -> str:
        """The answer, without the prompt and without special tokens."""
        pictures = [Image.fromarray(frame) for frame in spread_frames(clip, num_frames, self.frames)]
        content = [{"type": "image", "image": picture} for picture in pictures]
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": self.prompt}]}]
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(answer, skip_special_tokens=True))


def model_identity(name: str, model: Any) -> dict[str, Any]:
    """Of a folder the hashes of its files, of a model from the hub the commit that was loaded."""
    folder = Path(name)
    if not folder.is_dir():
        return {"name": name, "commit": model.config._commit_hash}
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    return {path.name: sha256_of(path) for path in files}


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
