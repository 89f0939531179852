"""Checks of one job: its configuration, its data, the models that it reads, and the memory that its state takes."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from kinema.conditioning.text import CombinedText, PretrainedText, TextCache
from kinema.config import Config, compose_training
from kinema.data.steps.planning import open_index
from kinema.distributed.footprint import GIB
from kinema.doctor.finding import Check, Finding, Level, graded
from kinema.given import given_by, lanes_of_rank
from kinema.plan import job_of, kinds, made, states_of
from kinema.training.dit_task import DiTTaskConfig
from kinema.training.run_folder import checkpoint_of, load_vae

CROWDED = 0.9
"""Share of a device's memory above which little is left for allocators, libraries, a frozen VAE and a text encoder."""


def job_checks(words: list[str], world_size: int) -> Finding | tuple[str, list[Check]]:
    """The folder of the runs and the checks of the job that these words of `train.py` start, or why there is none."""
    try:
        config = compose_training(words)
    except ValueError as error:
        return Finding("config", Level.FAIL, " ".join(words), str(error))
    checks: list[Check] = [
        ("ranks", lambda: check_ranks(config, world_size)),
        ("data set", lambda: check_data(config)),
    ]
    if isinstance(config.task, DiTTaskConfig):
        checks += [("VAE", lambda: check_vae(config)), ("text encoder", lambda: check_text(config))]
    return config.run_root, [*checks, ("memory", lambda: check_memory(config, world_size))]


def check_ranks(config: Config, world_size: int) -> Finding:
    """Sequence groups and lanes, as the run itself deals them."""
    lanes, degree = lanes_of_rank(config, world_size), config.parallel.sequence_degree
    dealt = f"{degree} to a pack, each serves {lanes} of data.lanes={config.data.lanes}"
    return graded("ranks", f"{world_size} in all (--world-size), {dealt}")


def check_data(config: Config) -> Finding:
    """Manifest, indexes and shards, as the run itself opens them."""
    index = open_index(config.data, config.data.train_split)
    found = f"{len(index.entries):,} training clips in {index.folder}, hash {index.hash[:12]}"
    return graded("data set", found, fail="" if len(index.entries) else "There is no training clip: data.train_split.")


def check_vae(config: Config) -> Finding:
    """The VAE's checkpoint, whole and of the weights that its manifest names."""
    _, identity = load_vae(checkpoint_of(config.vae.path, "vae.path"), config.vae.weights)
    return graded("VAE", f"{config.vae.path}, hash {identity['hash'][:12]}")


def check_text(config: Config) -> Finding:
    """The cache of embeddings, or the encoder's files with the headers of its weights."""
    if config.data.text is not None:
        TextCache(config.data.text).check(config.text)
        return graded("text encoder", f"embeddings in {config.data.text}")
    parts = list(config.text.parts().values()) if isinstance(config.text, CombinedText) else [config.text]
    told = [_encoder_files(part) for part in parts if isinstance(part, PretrainedText)]
    missing = " ".join(advice for _, advice in told if advice)
    return graded("text encoder", "; ".join(found for found, _ in told) or "hash, needs no files", warn=missing)


def _encoder_files(config: PretrainedText) -> tuple[str, str]:
    """What was found of an encoder, and advice if it is not on this disk; raises ValueError for damaged weights."""
    folder = Path(config.path)
    if not folder.is_dir():
        return config.path, f"text.path={config.path} is no folder: it will be asked for on the hub."
    weights = sorted(folder.glob("**/*.safetensors"))
    if not weights:
        raise ValueError(f"text.path={folder} holds no safetensors weights.")
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except Exception as error:
            raise ValueError(f"text.path: {path} is damaged ({error}). Copy it again.") from error
    return f"{folder}, {sum(path.stat().st_size for path in weights) / GIB:.2f} GiB of weights", ""


def check_memory(config: Config, world_size: int) -> Finding:
    """Weights, gradients, the optimiser, the EMA and the activations of one pack on a rank, against what there is."""
    if isinstance(config.task, DiTTaskConfig) and isinstance(config.text, CombinedText):
        untold = "unknown before its text encoders are loaded"
        return graded("memory", untold, warn="Type kinema plan, with --text-width.")
    job, kind = job_of(config, given_by(config)), config.parallel.activation_checkpointing
    with FakeTensorMode():
        model = made(config, job)
    count = sum(parameter.numel() for parameter in model.parameters())
    state = states_of(config, model, world_size).total / GIB
    peak = kinds(config, job, [kind])[kind].peak / config.parallel.sequence_degree / GIB
    room, where = _room()
    told = f"{count / 1e6:,.1f} M parameters, state {state:.2f} and {peak:.2f} for {job.pack}, of {room:.0f} GiB a rank"
    advice = (
        "Type parallel.activation_checkpointing=full, a lower data.max_pack_tokens, parallel.zero_stage=3 with more "
        "ranks, or parallel.offload.optimizer=cpu; kinema plan shows what each takes."
    )
    needed = state + peak
    said = advice if needed > CROWDED * room else ""
    return graded("memory", f"{told} on {where}", fail=said if needed > room else "", warn=said)


def _room() -> tuple[float, str]:
    """GiB of the device of a rank."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB, "the GPU"
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return available * 1024 / GIB, "this machine"
