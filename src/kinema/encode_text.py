"""`kinema data encode-text`: every caption's embedding, computed once, so that training does not hold the encoder."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from kinema.conditioning.condition import embed
from kinema.conditioning.text import (
    NULL_CAPTION,
    TEXT_CONFIGS,
    TextCache,
    TextCacheWriter,
    build_text_encoder,
    check_policy,
)
from kinema.config import compose_training
from kinema.data.dataset.shards import DatasetIndex
from kinema.identity import from_plain
from kinema.training.run_folder import checkpoint_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("data", help="folder of shards, for example data/toy; the captions of all its splits")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", help="run or checkpoint folder, trained or imported, whose text encoder is used")
    source.add_argument(
        "--config", nargs="+", metavar="KEY=VALUE", help="words of the training command, such as text=wan text.path=DIR"
    )
    parser.add_argument(
        "--out",
        required=True,
        help="folder to write, or a cache to continue or add to, with its own encoder; data.text names it in training",
    )
    parser.add_argument("--prompt", action="append", default=[], help="one more caption; repeat for several")


def run(arguments: argparse.Namespace) -> int:
    """Encode what is not there yet, with a progress bar; the verdict says how many captions there are."""
    config, policy, prompts = chosen_encoder(arguments)
    index = DatasetIndex.load(arguments.data)
    captions = [NULL_CAPTION, *index.table.texts("caption"), *prompts, *arguments.prompt]
    if TextCache.exists(arguments.out):
        TextCache(arguments.out).check(config)
    encode_captions(arguments.out, config, policy, list(dict.fromkeys(captions)))
    return 0


def encode_captions(folder: str, config: Any, policy: dict[str, Any] | None, captions: Sequence[str]) -> None:
    """Add the captions that a cache lacks; the encoder is read only if there are any."""
    lacking = TextCache(folder).lacking(captions) if TextCache.exists(folder) else list(captions)
    if lacking:
        encoder = build_text_encoder(config).to("cuda" if torch.cuda.is_available() else "cpu")
        if policy is not None:
            check_policy(encoder, policy)
        if not TextCache.exists(folder):
            TextCache.create(folder, config, encoder)
        bar = tqdm(lacking, desc="encoding", unit="caption", dynamic_ncols=True, total=len(captions))
        bar.update(len(captions) - len(lacking))
        with TextCacheWriter(folder) as writer:
            for caption in bar:
                writer.add(caption, embed(encoder, [caption])[0])
    print(f"{len(captions)} captions, {len(lacking)} of them new READY {folder}")


def chosen_encoder(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any] | None, list[str]]:
    """The text config, the policy it must have (where a run demands one), and prompts that come with it."""
    if arguments.run:
        manifest = checkpoint_of(arguments.run, "--run").document("manifest")
        if "text" not in manifest:
            raise ValueError(f"--run {arguments.run} has no text encoder: type --config text=NAME text.path=DIR.")
        negative = manifest.get("sampling", {}).get("negative_prompt")
        return read_config(manifest["text"]["config"]), manifest["text"]["policy"], [negative] if negative else []
    if arguments.config:
        return compose_text(arguments.config)
    if TextCache.exists(arguments.out):
        return read_config(TextCache(arguments.out).manifest["config"]), None, []
    raise ValueError("type --run RUN or --config text=NAME text.path=DIR: which encoder reads the captions.")


def read_config(plain: dict[str, Any]) -> Any:
    """The text config that a manifest holds."""
    return from_plain(plain, *TEXT_CONFIGS)


def compose_text(words: list[str]) -> tuple[Any, None, list[str]]:
    """As the training command with these words composes it: the encoder, and the captions of its samples."""
    try:
        config = compose_training(words)
    except ValueError as error:
        raise ValueError(f"--config {' '.join(words)}: {error}") from error
    if config.text is None:
        raise ValueError(f"--config {' '.join(words)} composes no text encoder: type text=NAME too.")
    return config.text, None, config.task.samples.captions()
