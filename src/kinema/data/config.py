"""What a config says about the data, and how a step is filled with them."""

import math
from dataclasses import dataclass, field
from enum import Enum

from kinema.data.account.rights import RightsConfig
from kinema.data.dataset.foreign import ForeignOptions
from kinema.data.dataset.mixture import SourceConfig, StageConfig
from kinema.data.decode.clip_decoder import DecodingRules
from kinema.data.decode.decoders.video import Decoder
from kinema.data.geometry import ClipShape
from kinema.data.steps.cost import CostConfig
from kinema.data.steps.dealing import Packing
from kinema.data.storage.address import Address, redacted
from kinema.data.storage.remote import StorageConfig


class Window(Enum):
    """Which part of a longer clip is shown: its start, or a random one each time."""

    start = "start"
    random = "random"


class Crop(Enum):
    """Which part of a wider or higher clip is shown: the centre, or a random one each time."""

    center = "center"
    random = "random"


@dataclass
class DataConfig:
    """The data set, the sizes that clips are brought to, and how a step's clips are dealt out."""

    path: str = "data/toy"
    """Folder of shards (see data_prep), or an address (file, http, https, s3, gs, hf) that is read by ranges."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    foreign: ForeignOptions = field(default_factory=ForeignOptions)
    """How tars that have no index, at the address or in the folder, are indexed before the first step."""
    mixture: dict[str, SourceConfig] = field(default_factory=dict)
    """Several data sets by name, in place of `path`: each has its share of every step, and epochs of its own."""
    stages: list[StageConfig] = field(default_factory=list)
    """What is different in the first steps of the run, stage after stage; then all is as said here."""
    cache_folder: str = "~/.cache/kinema/data"
    """Where manifests, indexes and members of remote data sets are kept on this machine."""
    train_split: str = "train"
    heldout_split: str = "heldout"
    fps: float = 8.0
    """Clips are sampled by time at this rate, whatever the rate of the file."""
    shapes: list[list[int]] = field(default_factory=lambda: [[17, 64, 64]])
    """Sizes [frames, height, width] in use; each clip takes the nearest aspect ratio, then the longest that
    fits.
    """
    window: Window = Window.random
    crop: Crop = Crop.center
    decoder: Decoder = Decoder.decord
    decoder_fallback: list[Decoder] = field(default_factory=list)
    """Decoders that are tried, in this order, on a clip that `decoder` cannot read; counted and limited."""
    decode_timeout_seconds: float = 30.0
    """Longest time for one clip with one decoder: its process is then killed, and the clip has failed."""
    max_decoded_mib: float = 4096.0
    """Most memory that the frames of one clip may take at the size of the file, before they are resized."""
    clips_per_step: int = 16
    """Global batch: clips in one optimizer step, all ranks together."""
    tokens_per_step: int | None = None
    """Instead of so many clips, as many as make up so many tokens, give or take one clip of each data set."""
    lanes: int = 4
    """Packs in one step; the number of data ranks must divide it, and each serves its share one after the
    other.
    """
    max_pack_tokens: int = 8192
    """Most tokens in one pack: what bounds memory."""
    packing: Packing = Packing.packs
    """packs: clips of any shape in a pack; buckets: of one shape only, so that few distinct shapes are compiled."""
    balanced_lanes: int = 1
    """Costs are made equal over so many neighbouring lanes together. 1 makes each pack cost the same; lanes / data
    ranks makes each rank's sum the same, which needs less room under max_pack_tokens.
    """
    cost: CostConfig = field(default_factory=CostConfig)
    """What a clip costs, for packs of equal cost."""
    shuffle_block_shards: int = 4
    """Clips are shuffled inside blocks of so many shards; more mixes better and reads less locally."""
    num_workers: int = 2
    """Reading processes of each rank; 0 reads in the training process. The data do not depend on it."""
    prefetch: int = 2
    """Packs that each worker keeps ready."""
    timeout_seconds: float = 300.0
    """Longest wait for one pack before the run stops and names the clips in work."""
    max_failed_fraction: float = 0.01
    """More damaged clips than this share, and more than min_failed_clips, stop the run."""
    min_failed_clips: int = 3
    max_fallback_fraction: float = 0.05
    """More clips than this share read by a fallback, and more than min_failed_clips, stop the run."""
    rights: RightsConfig = field(default_factory=RightsConfig)
    """What may be used, by licence, consent, generation, source and key."""
    require_captions: bool = True
    """Leave out clips without a caption, counted; otherwise they train as the empty caption."""
    max_clips: int | None = None
    """Use only the first clips of the split, for example 1 to overfit; null uses all."""
    latents: str | None = None
    """Folder of cached VAE latents to read in place of the videos."""
    text: str | None = None
    """Folder of cached embeddings to read in place of loading the text encoder (`kinema data encode-text`)."""

    def __post_init__(self) -> None:
        for name in ("fps", "timeout_seconds", "decode_timeout_seconds", "max_decoded_mib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must be above 0.")
        for name in ("clips_per_step", "lanes", "max_pack_tokens", "shuffle_block_shards", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1.")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"data.tokens_per_step={self.tokens_per_step} must be at least 1, or null.")
        for name in ("num_workers", "min_failed_clips"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 0.")
        paths = {f"data.mixture.{name}.path": source.path for name, source in self.mixture.items()}
        addresses = [Address.parse(path, key) for key, path in (paths or {"data.path": self.path}).items()]
        if any(addresses) and self.storage.patience_seconds > self.timeout_seconds / 2:
            raise ValueError(
                f"data.timeout_seconds={self.timeout_seconds:g} must be at least "
                f"{math.ceil(2 * self.storage.patience_seconds)}, twice as long as data.storage may wait for a store "
                "(retries, time-outs, pauses): otherwise a clip would be blamed for it."
            )
        for name in ("max_failed_fraction", "max_fallback_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must lie in 0 to 1.")
        self._check_decoders()
        self._check_mixture()
        if not self.shapes or any(len(shape) != 3 for shape in self.shapes):
            raise ValueError(f"data.shapes={self.shapes} must list [frames, height, width], e.g. [[17,64,64]].")

    def _check_decoders(self) -> None:
        names = [decoder.name for decoder in self.decoding.decoders]
        if len(set(names)) < len(names):
            raise ValueError(
                f"data.decoder_fallback={names[1:]} must name other decoders than data.decoder={names[0]}, each once. "
                "Type for example data.decoder_fallback=[pyav]."
            )
        longest = len(names) * self.decode_timeout_seconds
        if longest >= self.timeout_seconds:
            raise ValueError(
                f"data.timeout_seconds={self.timeout_seconds:g} must be above the {longest:g} s that one clip may take "
                f"(data.decode_timeout_seconds={self.decode_timeout_seconds:g} with each of {len(names)} decoders)."
            )

    @property
    def decoding(self) -> DecodingRules:
        """The decoders, their order and what they may take."""
        return DecodingRules(self.decoder, self.decoder_fallback, self.decode_timeout_seconds, self.max_decoded_mib)

    @property
    def clip_shapes(self) -> list[ClipShape]:
        """`shapes` as ClipShape."""
        return [ClipShape(*shape) for shape in self.shapes]

    @property
    def all_shapes(self) -> list[ClipShape]:
        """`shapes` and those of all stages, each once."""
        staged = [ClipShape(*shape) for stage in self.stages for shape in stage.shapes or []]
        return list(dict.fromkeys([*self.clip_shapes, *staged]))

    @property
    def latent_folders(self) -> dict[str, str]:
        """Where the cached latents lie, by the key of the config that says so; empty where videos are read."""
        if not self.mixture:
            return {} if self.latents is None else {"data.latents": self.latents}
        folders = {f"data.mixture.{name}.latents": source.latents for name, source in self.mixture.items()}
        return {key: folder for key, folder in folders.items() if folder is not None}

    def _check_latents(self) -> None:
        if self.mixture and self.latents is not None:
            keys = " ".join(f"data.mixture.{name}.latents=FOLDER" for name in self.mixture)
            raise ValueError(
                f"data.latents={redacted(self.latents)} belongs to one data set, and data.mixture names "
                f"{len(self.mixture)}: type data.latents=null, and {keys}, each made of its own data set."
            )
        lacking = [name for name, source in self.mixture.items() if source.latents is None]
        if 0 < len(lacking) < len(self.mixture):
            raise ValueError(
                f"data.mixture.{lacking[0]}.latents=null, but other data sets of data.mixture have cached latents, and "
                "a pack holds either latents or frames. Encode this one too (kinema data encode), or type null for all."
            )

    def _check_mixture(self) -> None:
        for name, source in self.mixture.items():
            if not source.path:
                raise ValueError(f"data.mixture.{name}.path is missing: type the folder or address of the data set.")
        if self.mixture and self.path != DataConfig.path:
            raise ValueError(
                f"data.path={redacted(self.path)} and data.mixture are given, and each says where the data lie. "
                f"Leave data.path out, or name its data set in data.mixture, or type data.mixture={{}}."
            )
        self._check_latents()
        last = 0
        for number, stage in enumerate(self.stages):
            if stage.until_step <= last:
                raise ValueError(
                    f"data.stages[{number}].until_step={stage.until_step} must be above {last}, where it begins."
                )
            last = stage.until_step
            if unknown := set(stage.weights or {}) ^ set(self.mixture if stage.weights is not None else {}):
                raise ValueError(
                    f"data.stages[{number}].weights must give each data set of data.mixture a weight; "
                    f"{', '.join(sorted(unknown))} is in one of them only."
                )
