"""From a checkpoint to video files: loads what the manifest says, and refuses what contradicts it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from kinema.conditioning.frames import FRAME_CONDITIONS, FrameCondition, GivenFrames
from kinema.conditioning.image import ImageEncoder, check_image_policy
from kinema.conditioning.text import TEXT_CONFIGS, build_text_encoder, check_policy
from kinema.data.decode.encoding import write_video
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.verbs.contact_sheet import contact_sheet
from kinema.diffusion.objective import DDPM, RectifiedFlow
from kinema.diffusion.solvers import LIBRARY, Solver
from kinema.diffusion.timesteps import TimestepSpacing
from kinema.identity import from_plain, to_plain
from kinema.models.dit import DiTConfig, make_denoiser
from kinema.models.vae import CausalVAE
from kinema.sampling.denoiser import check_condition
from kinema.sampling.images import fit_images, nearest_shape, read_image
from kinema.sampling.pipeline import OtherVAE, Pipeline, SamplingConfig
from kinema.training.checkpoints.store import Checkpoint, CheckpointStore
from kinema.training.run_folder import Weights, checkpoint_of, load_vae, load_weights


@dataclass
class SampleConfig:
    """`python sample.py run=runs/NAME prompt="..."`; what is null is as the checkpoint's manifest says."""

    solver: Solver | None = None
    """euler, heun, ddim or dpmpp_2m; unipc or dpm_multistep by diffusers."""
    num_steps: int | None = None
    """Steps of the solver."""
    guidance_scale: float | None = None
    """Classifier-free guidance (Ho and Salimans 2022); 1 turns it off and halves the cost."""
    guidance_scale_low: float | None = None
    """Guidance of the expert for low noise, of two; where only guidance_scale is typed, it is of both."""
    dynamic_guidance: bool | None = None
    """Guidance that changes with the step, as CogVideoX's pipelines can."""
    embedded_guidance: float | None = None
    """Strength that a distilled model is told of."""
    timestep_shift: float | None = None
    """Shift of the sampler's timesteps."""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    timestep_spacing: TimestepSpacing | None = None
    """trailing or linspace."""
    timestep_terminal: float | None = None
    """Where the last step begins."""
    scheduler: dict[str, Any] | None = None
    """Options of the library's scheduler."""
    seed: int = 0
    """Seed of the first video; the next ones count up from it."""
    run: str = ""
    """A run folder (its newest checkpoint) or one checkpoint folder."""
    weights: Weights = Weights.ema
    """ema or raw."""
    prompt: str = ""
    """The caption of the video."""
    prompts_file: str | None = None
    """A text file with one caption a line, instead of `prompt`."""
    image: str | None = None
    """A picture: the first frame of every video, for weights that were trained with one."""
    last_image: str | None = None
    """A picture: the last frame, for weights that were trained with a first and a last one."""
    shape: list[int] = field(default_factory=list)
    """Frames, height, width; empty takes the first shape of the training, or the one that fits the image best."""
    fps: float | None = None
    """Only to state what is expected: another rate than the checkpoint's is refused."""
    allow_untrained_shape: bool = False
    """Sample a legal shape that the training never showed."""
    latents_only: bool = False
    """Write the latents (C, T, H, W) to `NNN.safetensors`, and make no frames."""
    batch_size: int = 16
    """Videos denoised together; does not change them beyond rounding."""
    out: str | None = None
    """Output folder; null makes a new one in `videos/` of the run folder."""

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is empty; type run=runs/NAME, a folder that train.py made.")
        if bool(self.prompt) == bool(self.prompts_file):
            raise ValueError('type exactly one of prompt="a caption" and prompts_file=captions.txt.')
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1.")

    def pictures(self) -> dict[str, str]:
        """The picture files by their keys."""
        if self.last_image and not self.image:
            raise ValueError(f"last_image={self.last_image} needs the first frame too: type image=picture.png.")
        named = {"image": self.image, "last_image": self.last_image}
        return {key: path for key, path in named.items() if path}

    def settings(self, of: SamplingConfig) -> SamplingConfig:
        """The checkpoint's settings with what was typed; another solver leaves behind what only the former one read."""
        typed = {each.name: getattr(self, each.name) for each in fields(SamplingConfig)}
        changes = {name: value for name, value in typed.items() if value is not None}
        if self.guidance_scale is not None:
            changes = {"guidance_scale_low": None} | changes
        if self.solver in LIBRARY:
            changes = {"timestep_spacing": TimestepSpacing.trailing, "timestep_terminal": None} | changes
        if self.solver not in (None, of.solver):
            changes = {"scheduler": {}} | changes
        return replace(of, **changes)

    def captions(self) -> list[str]:
        """The captions to sample."""
        if not self.prompts_file:
            return [self.prompt]
        lines = Path(self.prompts_file).read_text().splitlines()
        if not (captions := [line.strip() for line in lines if line.strip()]):
            raise ValueError(f"prompts_file={self.prompts_file} holds no caption.")
        return captions


@dataclass(frozen=True)
class Loaded:
    """A pipeline from a checkpoint, with the identity of what was loaded."""

    pipeline: Pipeline
    manifest: dict[str, Any]
    checkpoint: Checkpoint
    weights: Weights
    fingerprint: str

    def describe(self) -> str:
        """One line for people: which weights these are."""
        return f"{self.weights.value} weights of step {self.checkpoint.step}, fingerprint {self.fingerprint}"


def load_pipeline(checkpoint: Checkpoint, weights: Weights = Weights.ema, device: str = "cpu") -> Loaded:
    """Build the models that the manifest describes and give them the checkpoint's weights, verified by fingerprint."""
    manifest = checkpoint.document("manifest")
    if manifest["task"] != "dit":
        raise ValueError(f"run: {checkpoint.folder} holds a {manifest['task']}; sampling needs a task=dit run.")
    if missing := [key for key in ("text", "objective", "fps", "shapes") if key not in manifest]:
        raise ValueError(
            f"run: {checkpoint.folder} holds imported weights without {', '.join(missing)}: import the whole pipeline "
            "with its VAE, text encoder and scheduler, or train from it first (init_from)."
        )
    vae = carried_vae(checkpoint, manifest)
    text_encoder = build_text_encoder(from_plain(manifest["text"]["config"], *TEXT_CONFIGS))
    check_policy(text_encoder, manifest["text"]["policy"])
    model_config = from_plain(manifest["model"]["config"], DiTConfig)
    condition = condition_of(manifest)
    image_encoder = image_encoder_of(condition)
    if image_encoder is not None:
        check_image_policy(image_encoder, manifest["image"])
        image_encoder.to(device)
    channels = manifest["model"].get("latent_channels")
    if isinstance(vae, CausalVAE):
        check_condition(condition, model_config, vae.config, image_encoder)
        channels = vae.config.latent_channels
    denoiser = make_denoiser(model_config, channels, text_encoder.width)
    found = load_weights(denoiser, checkpoint, weights)
    if found != manifest["fingerprints"][weights.value]:
        raise ValueError(f"{checkpoint.folder}: the {weights.value} weights are not those that its manifest names.")
    pipeline = Pipeline(
        denoiser=denoiser.eval().to(device),
        vae=vae.to(device),
        text_encoder=text_encoder.to(device),
        objective=from_plain(manifest["objective"], RectifiedFlow, DDPM),
        geometry=geometry_of(vae.geometry_strides, model_config),
        fps=manifest["fps"],
        shapes=[ClipShape(*shape) for shape in manifest["shapes"]],
        guidance_dropout=manifest["guidance_dropout"],
        condition=condition,
        image_encoder=image_encoder,
        sampling=from_plain(manifest["sampling"], SamplingConfig) if "sampling" in manifest else SamplingConfig(),
    )
    return Loaded(pipeline, manifest, checkpoint, weights, found)


def carried_vae(checkpoint: Checkpoint, manifest: dict[str, Any]) -> CausalVAE | OtherVAE:
    """The VAE in the run's folder, which must be the one of the manifest; or what is known of a published one."""
    if "other_vae" in manifest:
        return OtherVAE(manifest["other_vae"]["class"], tuple(manifest["other_vae"]["strides"]))
    if "vae" not in manifest:
        raise ValueError(f"run: {checkpoint.folder} holds imported weights without a VAE: import the whole pipeline.")
    vae_checkpoint = CheckpointStore(checkpoint.folder.parent.parent / "vae").newest()
    if vae_checkpoint is None:
        raise ValueError(f"{checkpoint.folder.parent.parent}/vae is missing: the run folder is not complete.")
    vae, identity = load_vae(vae_checkpoint, Weights(manifest["vae"]["weights"]))
    if identity["hash"] != manifest["vae"]["hash"]:
        raise ValueError(
            f"the VAE in {vae_checkpoint.folder} (hash {identity['hash']}) is not the one of the training "
            f"(hash {manifest['vae']['hash']})."
        )
    return vae


def condition_of(manifest: dict[str, Any]) -> FrameCondition:
    """The frames that the training gave; runs from before there was a choice gave none."""
    plain = manifest.get("condition", to_plain(FrameCondition()))
    return from_plain(plain, *FRAME_CONDITIONS.values())


def image_encoder_of(condition: FrameCondition) -> ImageEncoder | None:
    """The encoder that the condition names, on the CPU; None where it names none."""
    if isinstance(condition, GivenFrames) and condition.image is not None:
        return ImageEncoder(condition.image)
    return None


def geometry_of(strides: tuple[int, int], model: DiTConfig) -> Geometry:
    """Which clip sizes a VAE and a DiT can take together."""
    patch_time, patch_height, patch_width = model.patch_size
    return Geometry(*strides, (patch_time, patch_height, patch_width))


def sample(config: SampleConfig, say: Callable[[str], object] = print) -> list[Path]:
    """Sample every caption into `NNN.mp4` and one `sheet.png`, both carrying seed, prompt and manifest."""
    loaded = load_pipeline(checkpoint_of(config.run, "run"), config.weights)
    pipeline, captions = loaded.pipeline, config.captions()
    pictures = [read_image(path, key) for key, path in config.pictures().items()]
    shape = chosen_shape(config.shape, pipeline.shapes, pictures)
    if config.allow_untrained_shape:
        pipeline.geometry.check(shape, key="shape")
        pipeline = replace(pipeline, shapes=[*pipeline.shapes, shape])
    settings = config.settings(pipeline.sampling)
    pipeline.check(settings, shape, config.fps, len(pictures))
    say(f"loaded {loaded.describe()}")
    if isinstance(pipeline.vae, OtherVAE) and not config.latents_only:
        raise pipeline.vae.no_frames()
    say(f"sampling: {settings.describe()}{changed(pipeline.sampling, settings)}")
    given = fit_images(pictures, shape, say) if pictures else None
    run_dir = loaded.checkpoint.folder.parent.parent
    name = f"step-{loaded.checkpoint.step:08d}-{config.weights.value}"
    out = Path(config.out) if config.out else unused_folder(run_dir / "videos", name)
    out.mkdir(parents=True, exist_ok=True)

    rows, paths = [], []
    bar = tqdm(total=len(captions) * settings.num_steps, desc="sampling", unit="step", dynamic_ncols=True)
    for start in range(0, len(captions), config.batch_size):
        batch = captions[start : start + config.batch_size]
        options = replace(settings, seed=settings.seed + start)
        images = [given] * len(batch) if given is not None else None
        make = pipeline.latents if config.latents_only else pipeline.videos
        made = make(batch, shape, options, advance(bar, len(batch)), images)
        for offset, (caption, clip) in enumerate(zip(batch, made, strict=True)):
            origin = metadata(loaded, settings, caption, start + offset, config.pictures())
            path = out / f"{start + offset:03d}.{'safetensors' if config.latents_only else 'mp4'}"
            if config.latents_only:
                save_file({"latents": clip.cpu().contiguous()}, path, metadata=origin)
            else:
                write_video(path, clip, pipeline.fps, metadata=origin)
                rows.append((clip.numpy(), caption))
            paths.append(path)
    bar.close()
    if config.latents_only:
        say(f"wrote the latents of {len(paths)} video(s) to {out}")
        return paths
    contact_sheet(rows, out / "sheet.png", columns=1 if len(rows) < 8 else 2)
    stamp_png(out / "sheet.png", metadata(loaded, settings, " | ".join(captions), 0, config.pictures()))
    say(f"wrote {len(paths)} video(s) and a contact sheet to {out}")
    return paths


def changed(of: SamplingConfig, settings: SamplingConfig) -> str:
    """What was set otherwise than the checkpoint says, for people; nothing where nothing was."""
    before, now = to_plain(of), to_plain(settings)
    lines = [f"{name}={now[name]} for {before[name]}" for name in now if name != "seed" and now[name] != before[name]]
    return f"; other than its manifest says: {', '.join(lines)}" if lines else ", as its manifest says"


def chosen_shape(wanted: Sequence[int], trained: Sequence[ClipShape], pictures: Sequence[Tensor]) -> ClipShape:
    """The wanted shape, or else a trained one: the first, or the first that a given picture fits best."""
    if wanted:
        return ClipShape(*wanted)
    return nearest_shape(pictures[0], trained) if pictures else trained[0]


def unused_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or `parent/name-2` and so on: samples of another prompt never replace the ones before."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(parent / each for each in names if not (parent / each).exists())


def metadata(
    loaded: Loaded, config: SamplingConfig, caption: str, index: int, pictures: dict[str, str]
) -> dict[str, str]:
    """What a file says of its origin: enough to make it again."""
    return {
        "title": caption,
        "comment": json.dumps(
            {
                "generator": "kinema",
                "digital_source_type": "trainedAlgorithmicMedia",
                "prompt": caption,
                "seed": config.seed + index,
                **{name: value for name, value in to_plain(config).items() if name not in ("type", "seed")},
                **pictures,
                "weights": loaded.weights.value,
                "fingerprint": loaded.fingerprint,
                "manifest": loaded.manifest,
            }
        ),
    }


def advance(bar: "tqdm[Any]", clips: int) -> Callable[[int, int], None]:
    """A solver's progress on a bar that counts one step of one clip at a time."""

    def step(done: int, total: int) -> None:
        bar.update(clips)

    return step


def stamp_png(path: Path, fields: dict[str, str]) -> None:
    """Put text fields into a PNG file."""
    text = PngInfo()
    for name, value in fields.items():
        text.add_itxt(name, value)
    with Image.open(path) as picture:
        picture.load()
        picture.save(path, pnginfo=text)
