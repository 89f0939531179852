"""The root configuration: Hydra's groups over typed dataclasses, and the checks that no single room can make."""

import dataclasses
import difflib
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kinema.conditioning.frames import FRAME_CONDITIONS
from kinema.conditioning.text import CombinedText, HashText, PretrainedText
from kinema.console import first_cause, missing_key
from kinema.data.config import DataConfig
from kinema.data.storage.address import redacted
from kinema.diffusion.objective import DDPM, RectifiedFlow
from kinema.distributed.compiling import Compile
from kinema.distributed.engine import ParallelConfig
from kinema.identity import digest
from kinema.models.dit import DiTConfig
from kinema.models.vae import VAEConfig
from kinema.sampling.sample import SampleConfig
from kinema.training.alive.guard import GuardConfig
from kinema.training.alive.signals import SignalsConfig
from kinema.training.alive.watchdog import WatchdogConfig
from kinema.training.checkpoints.store import CheckpointConfig
from kinema.training.dit_task import DiTTaskConfig
from kinema.training.ema import EMAConfig
from kinema.training.finetune import Full, LoRA, Parts
from kinema.training.loop import ValidationConfig
from kinema.training.optimizers.optim import AdamW, AdamW8bit, MuonAdamW
from kinema.training.optimizers.schedule import Constant, Cosine
from kinema.training.preflight import PreflightConfig
from kinema.training.records.metrics import LoggingConfig
from kinema.training.run_folder import VAECheckpoint
from kinema.training.vae_task import VAETaskConfig


@dataclass
class Config:
    """Everything a training run depends on. Each group is one choice in `configs/<group>/`."""

    name: str = "default"
    """Name of the run; its folder is `run_root/name`, and the same name continues the same run."""
    run_root: str = "runs"
    """Where run folders lie."""
    seed: int = 0
    """Seed of data order, noise, timesteps, dropout and initial weights."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    init_from: str | None = None
    """A run or checkpoint folder whose EMA weights are the start; null starts from fresh weights."""
    allow_other_vae: bool = False
    """Start from `init_from` although it was trained with another VAE than `vae.path`: in other latents."""
    allow_config_change: bool = False
    """Continue a run although keys that shape its numbers have changed since it began."""
    task: Any = None
    """What is trained: dit or vae."""
    model: Any = None
    """The denoiser (task=dit)."""
    vae: Any = None
    """The VAE to train (task=vae), or the trained one to use (task=dit, vae=from_run)."""
    objective: Any = None
    """Diffusion objective (task=dit)."""
    text: Any = None
    """Text encoder (task=dit)."""
    condition: Any = None
    """Frames of its own that a clip is given (task=dit)."""
    data: Any = None
    """Clips: where they lie, their shapes, and how a step is filled."""
    finetune: Any = None
    """What of the model is trained."""
    optim: Any = None
    """Optimiser."""
    schedule: Any = None
    """Learning rate by step."""
    parallel: Any = None
    """How a step is spread over ranks."""
    checkpoint: Any = None
    """When the run is saved."""
    logging: Any = None
    """Metrics and trackers."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Average of the weights."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out loss."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    """Checks of the first steps."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What is done about numbers that are not sound."""
    signals: SignalsConfig = field(default_factory=SignalsConfig)
    """How the run meets the end of its time."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """How long a rank may stay in one phase of a step."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name={self.name!r} must be a folder name without '/' and not start with '.'.")


SCHEMAS: dict[str, dict[str, type]] = {
    "task": {"dit": DiTTaskConfig, "vae": VAETaskConfig},
    "model": {"dit": DiTConfig},
    "vae": {"causal": VAEConfig, "from_run": VAECheckpoint},
    "objective": {"rectified_flow": RectifiedFlow, "ddpm": DDPM},
    "text": {"hash": HashText, "pretrained": PretrainedText, "combined": CombinedText},
    "condition": {**FRAME_CONDITIONS},
    "data": {"clips": DataConfig},
    "finetune": {"full": Full, "parts": Parts, "lora": LoRA},
    "optim": {"adamw": AdamW, "adamw_8bit": AdamW8bit, "muon": MuonAdamW},
    "schedule": {"cosine": Cosine, "constant": Constant},
    "parallel": {"deepspeed": ParallelConfig},
    "checkpoint": {"local": CheckpointConfig},
    "logging": {"file": LoggingConfig},
}
"""The classes of each group. `configs/GROUP/*.yaml` starts from `schema_NAME` and says what differs."""

DIT_GROUPS = ("model", "vae", "objective", "text", "condition")
"""Groups that task=dit needs; task=vae reads no other of them than `vae`."""

FREE_TO_CHANGE = (
    "parallel.zero_stage", "parallel.sequence_degree", "parallel.vae_axis", "parallel.timeout_seconds",
    "parallel.offload.", "parallel.traffic.",
    "parallel.activation_checkpointing", "parallel.checkpointed_every", "parallel.compile",
    "logging.", "checkpoint.", "validation.", "preflight.", "guard.", "signals.", "watchdog.", "task.samples.",
    "data.num_workers", "data.prefetch", "data.timeout_seconds", "data.storage.", "data.cache_folder", "data.text",
    "run_root", "allow_config_change",
)  # fmt: skip
"""Keys that may differ when a run continues: none of them changes what is computed."""


def register_schemas() -> None:
    """Make the dataclasses known to Hydra; call before composing."""
    OmegaConf.register_new_resolver("digest", _digest, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema_config", node=Config)
    store.store(name="schema_sample", node=SampleConfig)
    for group, choices in SCHEMAS.items():
        for name, schema in choices.items():
            store.store(group=group, name=f"schema_{name}", node=schema)


def _digest(*groups: Any) -> str:
    """`${digest:${model},${optim}}` in a YAML file: six letters that change when any of these groups does."""
    return digest([OmegaConf.to_yaml(group, resolve=True) for group in groups])[:6]


def to_dataclass(composed: DictConfig) -> Any:
    """The composed configuration as its dataclass; ValueError for keys that it has no field for (after a `+`)."""
    whole = OmegaConf.to_object(composed)  # which would keep them, read by nobody
    if added := _added_keys(whole):
        known = OmegaConf.structured(whole)
        near = [suggestion(key, known) for key in added]
        raise ValueError(" ".join(filter(None, [f"{', '.join(added)}: there is no such key.", *near])))
    return whole


def _added_keys(node: Any, prefix: str = "") -> list[str]:
    fields = {f.name for f in dataclasses.fields(node)}
    added = [f"{prefix}{name}" for name in vars(node) if name not in fields]
    inner = {name: vars(node)[name] for name in fields if dataclasses.is_dataclass(vars(node)[name])}
    return added + [key for name, value in sorted(inner.items()) for key in _added_keys(value, f"{prefix}{name}.")]


def to_config(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses, checked as a whole, and watched for keys that nothing reads."""
    config = to_dataclass(composed)
    assert isinstance(config, Config)
    wanted = {DiTTaskConfig: DIT_GROUPS, VAETaskConfig: ("vae",)}
    if type(config.task) not in wanted:
        raise ValueError("task is missing; type task=dit or task=vae.")
    for group in DIT_GROUPS:
        needed, given = group in wanted[type(config.task)], getattr(config, group) is not None
        if needed and not given:
            raise ValueError(f"{group} is missing; this task needs one of {group}={_choices(group)}.")
        if given and not needed:
            raise ValueError(
                f"{group}={type(getattr(config, group)).__name__} is given, but task=vae reads none. "
                f"Leave it out, or type ~{group}."
            )
    if isinstance(config.finetune, LoRA):
        if not isinstance(config.task, DiTTaskConfig):
            raise ValueError("finetune=lora adapts a DiT, task=dit. Type finetune=full or finetune=parts for a VAE.")
        if config.init_from is None:
            raise ValueError("finetune=lora adapts trained weights. Type init_from=DIR, an imported model or a run.")
    if config.parallel.compile is Compile.blocks and not isinstance(config.task, DiTTaskConfig):
        raise ValueError("parallel.compile=blocks compiles blocks of a DiT, task=dit. Type parallel.compile=none.")
    vae_class = VAECheckpoint if isinstance(config.task, DiTTaskConfig) else VAEConfig
    if not isinstance(config.vae, vae_class):
        kind = "from_run, a trained VAE" if vae_class is VAECheckpoint else "an architecture such as vae=causal_tiny"
        raise ValueError(f"vae={type(config.vae).__name__} does not fit this task, which needs vae={kind}.")
    return config


def compose_training(words: list[str]) -> Config:
    """What `train.py WORDS` would run, from ./configs; raises ValueError that says what is wrong with the words."""
    configs = Path("configs").resolve()
    if not (configs / "train.yaml").is_file():
        raise ValueError("./configs is not here: type the command in the folder of train.py.")
    register_schemas()
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            return to_config(compose("train", words))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(missing_key(error) or first_cause(error)) from error


def resolved_yaml(composed: DictConfig) -> str:
    """The whole configuration as plain YAML, as it goes into the run folder and every checkpoint.

    Without what is secret in addresses: users, passwords and signed queries.
    """
    return redacted(OmegaConf.to_yaml(composed, resolve=True))


def changed_keys(before: str, now: str) -> list[str]:
    """Lines `key: old -> new` for keys that differ between two resolved configurations and are not free to."""
    old, new = (
        _leaves(OmegaConf.to_container(OmegaConf.create(before))),
        _leaves(OmegaConf.to_container(OmegaConf.create(now))),
    )
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if not key.startswith(FREE_TO_CHANGE)]


def suggestion(unknown: str, composed: DictConfig) -> str:
    """`did you mean optim.learning_rate?` for a mistyped key, or nothing when no key is near."""
    known = [*_leaves(OmegaConf.to_container(composed)), *SCHEMAS, "experiment"]
    near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near and unknown not in known else ""


class Reads:
    """Which leaves of a tree of dataclasses have been read since it was made.

    Leaves that have their class's default ask for nothing, and are not watched.
    """

    def __init__(self, root: Any) -> None:
        self._unread: set[str] = set()
        self._watch(root, "")

    def unread(self) -> list[str]:
        """Keys that nothing has read so far."""
        return sorted(self._unread)

    def problem(self) -> str | None:
        """Why the run must stop, when a key was set that nothing reads."""
        if not (unread := self.unread()):
            return None
        return (
            f"{', '.join(unread)}: nothing reads this configuration, so it would not do what it says. Remove it, "
            f"or choose the option that it belongs to."
        )

    def _watch(self, node: Any, prefix: str) -> None:
        unread, names = self._unread, {f.name for f in dataclasses.fields(node)}
        for field_ in dataclasses.fields(node):
            value = vars(node)[field_.name]
            if dataclasses.is_dataclass(value):
                self._watch(value, f"{prefix}{field_.name}.")
            elif value != _default(field_):
                unread.add(f"{prefix}{field_.name}")
        base: Any = type(node)

        def read(instance: Any, name: str) -> Any:
            if name in names:
                unread.discard(f"{prefix}{name}")
            return base.__getattribute__(instance, name)

        # A subclass of the same name and fields: everything else about the object stays as it was.
        node.__class__ = type(base.__name__, (base,), {"__getattribute__": read, "__module__": base.__module__})


def _default(of: dataclasses.Field[Any]) -> Any:
    return of.default if of.default_factory is dataclasses.MISSING else of.default_factory()


def _choices(group: str) -> str:
    return " | ".join(SCHEMAS[group])


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree.name if isinstance(tree, enum.Enum) else tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}{key}.")
    return flat
