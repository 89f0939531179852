"""Samples of a published model and of its fine-tunes through diffusers' own pipeline, in one picture.

python -m benchmarks.finetuning out/wan out/brown_lora out/brown_full --to docs/pictures/finetuning.png
"""

import argparse
from pathlib import Path

import diffusers
import numpy as np
import torch

from kinema.conditioning.text import HashText, build_text_encoder
from kinema.data.verbs.contact_sheet import contact_sheet

PROMPTS = [
    "a large yellow triangle moves slowly down",
    "a large purple circle moves slowly right",
]


def sample(pipeline: diffusers.WanPipeline, prompt: str, seed: int) -> np.ndarray:
    """uint8 (T, H, W, 3)"""
    encoder = build_text_encoder(HashText())
    videos = pipeline(
        prompt_embeds=encoder.encode([prompt])[0][None],
        negative_prompt_embeds=encoder.null()[None],
        height=64,
        width=64,
        num_frames=13,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(seed),
    ).frames
    return (videos[0] * 255).round().astype(np.uint8)


def main() -> None:
    """Load with the reference's own functions, sample, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", help="a pipeline in diffusers' layout")
    parser.add_argument("adapters", help="kinema export --format lora-diffusers")
    parser.add_argument("full", help="kinema export of a full fine-tune")
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    pipeline = diffusers.WanPipeline.from_pretrained(arguments.published, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    rows = [(sample(pipeline, prompt, 0), f"published: {prompt}") for prompt in PROMPTS]
    pipeline.load_lora_weights(arguments.adapters)
    rows += [(sample(pipeline, prompt, 0), f"LoRA: {prompt}") for prompt in PROMPTS]
    pipeline = diffusers.WanPipeline.from_pretrained(arguments.full, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    rows += [(sample(pipeline, prompt, 0), f"full: {prompt}") for prompt in PROMPTS]
    contact_sheet(rows, arguments.to, columns=2)
    print(f"READY {arguments.to}")


if __name__ == "__main__":
    main()
