"""Reading an encoder and its tokenizer: safetensors only, nothing missing, nothing guessed."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kinema.conditioning.text.policy import PretrainedText, TextDtype, TextFamily


def load_tokenizer(config: PretrainedText) -> Any:
    """The tokenizer beside the weights, with a padding token."""
    from transformers import AutoTokenizer

    tokenizer = read_pretrained(AutoTokenizer, config)
    if tokenizer.pad_token_id is None:
        raise ValueError(f"text.path={config.path}: this tokenizer has no padding token; add one to its config.")
    return tokenizer


def load_model(config: PretrainedText) -> nn.Module:
    """The frozen encoder, from safetensors weights; never from a pickle, and never with a weight missing."""
    import transformers

    check_fits(config, read_pretrained(transformers.AutoConfig, config))
    classes = {
        TextFamily.t5: transformers.T5EncoderModel,
        TextFamily.umt5: transformers.UMT5EncoderModel,
        TextFamily.clip: transformers.CLIPTextModel,
        TextFamily.llama: transformers.LlamaModel,
        TextFamily.qwen: transformers.Qwen2_5_VLTextModel,
        TextFamily.auto: transformers.AutoModel,
    }
    dtype = torch.float32 if config.dtype is TextDtype.float32 else torch.bfloat16
    options = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    model, loading = read_pretrained(classes[config.family], config, **options)
    if loading["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"text.path={config.path} lacks {len(missing)} weights of text.family={config.family.value}, "
            f"for example {missing[0]}."
        )
    return model.eval().requires_grad_(False)


def read_pretrained(kind: Any, config: PretrainedText, **options: Any) -> Any:
    """`kind.from_pretrained`, with an error that names the config key; a hub that does not answer is asked once."""
    is_folder = Path(config.path).is_dir()
    silent = None if is_folder else hub_problem(config.path)
    try:
        return kind.from_pretrained(config.path, local_files_only=is_folder or silent is not None, **options)
    except (OSError, ValueError) as error:
        where = "the folder lacks a file"
        if not is_folder:
            where = "no such folder, and the hub did not give it"
        if silent:
            where = (
                f"no such folder, not among the files downloaded before, and the hub does not answer: {silent}. "
                "Download it where there is a network (hf download NAME --local-dir FOLDER), and type the folder"
            )
        raise ValueError(
            f"text.path={config.path} cannot be read by {kind.__name__} ({where}): it must hold config.json, "
            f"tokenizer files and *.safetensors weights. {error}"
        ) from error


@cache
def hub_problem(name: str, timeout_seconds: float = 10.0) -> str | None:
    """Why the hub cannot be asked for a model; None where it answers. One request: libraries retry for a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=timeout_seconds)
    except HfHubHTTPError:
        return None  # an answer, which the reading will explain
    except Exception as error:  # of whichever HTTP library it uses; offline mode too
        return f"{type(error).__name__}: {error}"
    return None


def check_fits(config: PretrainedText, model_config: Any) -> None:
    """Refuse a family, a length or a layer that this encoder does not have, before its weights are read."""
    families = {
        TextFamily.t5: ["t5"],
        TextFamily.umt5: ["umt5"],
        TextFamily.clip: ["clip", "clip_text_model"],
        TextFamily.llama: ["llama"],
        TextFamily.qwen: ["qwen2_5_vl_text"],
    }
    found = model_config.model_type
    if found not in families.get(config.family, [found]):
        raise ValueError(
            f"text.family={config.family.value} does not fit text.path={config.path}, whose type is {found}."
        )
    model_config = getattr(model_config, "text_config", model_config)  # a whole CLIP holds two
    longest = getattr(model_config, "max_position_embeddings", config.read_tokens)
    if config.read_tokens > longest:
        raise ValueError(
            f"text.max_tokens={config.max_tokens} is more than the {longest} tokens that text.path={config.path} was "
            f"built for{', with text.crop in front' if config.crop else ''}. Type {longest - config.crop} or less."
        )
    num_layers = model_config.num_hidden_layers
    if -config.layer > num_layers + 1:
        raise ValueError(f"text.layer={config.layer} does not exist: text.path={config.path} has {num_layers} layers.")


def hash_weights(model: nn.Module, max_values: int = 4096) -> str:
    """A fingerprint: names, shapes and up to twice `max_values` evenly spaced values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(_sampled(name, tensor.detach(), max_values))
    return digest.hexdigest()


def hash_stored(config: PretrainedText, max_values: int = 64) -> str:
    """As `hash_weights`, of the tensors as they lie on disk: only a few pages of each are read."""
    parts = {}
    for path in weight_files(config):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no dictionary
                    parts[name] = _sampled(name, file.get_tensor(name), max_values)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"text.path={config.path}: {path} cannot be read ({error}). Copy it again.") from error
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()


def weight_files(config: PretrainedText) -> list[Path]:
    """The files that `transformers` reads an encoder from, which must lie on this machine."""
    from transformers.utils import cached_file

    found = cached_file(config.path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    if found is not None:
        single, index = (Path(found).with_name(name) for name in ("model.safetensors", "model.safetensors.index.json"))
        if single.exists():
            return [single]
        if index.exists():
            return [index.with_name(name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise ValueError(
        f"text.path={config.path}: no *.safetensors weights are on this machine. They are not loaded, but they "
        "tell cached embeddings apart: download them (hf download NAME --local-dir FOLDER), and type the folder."
    )


def _sampled(name: str, tensor: Tensor, max_values: int) -> bytes:
    values = tensor.flatten()
    values = values[:: max(1, values.numel() // max_values)]
    return f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.float().cpu().numpy().tobytes()


def hash_tokenizer(tokenizer: Any) -> str:
    """A fingerprint of a vocabulary and of what is put around a caption."""
    digest = hashlib.sha256()
    for word, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{word!r} {number}\n".encode(errors="backslashreplace"))
    digest.update(repr(tokenizer("A caption, 2 words.")["input_ids"]).encode())
    return digest.hexdigest()[:16]
