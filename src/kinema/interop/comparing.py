"""Our module and the reference's on the same fixed noise: what an export must pass before it is published."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from kinema.interop.preset import Record
from kinema.models.dit import DiT, Extras, Sound
from kinema.models.dit.segments import Grid
from kinema.models.vae import CausalVAE

LIMIT = 1e-4
"""Largest relative difference that an export may have."""


@dataclass(frozen=True)
class Sample:
    """Fixed inputs of a denoiser: two clips with different timesteps; what a model does not read is None."""

    latents: Tensor
    """(2, C, T, H, W)"""
    timesteps: Tensor
    """(2,) in [0, 1]"""
    text: Tensor
    """(2, L, D)"""
    channels: Tensor | None = None
    """(2, condition_channels, T, H, W)"""
    image: Tensor | None = None
    """(2, L, image_width)"""
    pooled: Tensor | None = None
    """(2, pooled_width)"""
    guidance: Tensor | None = None
    """(2,)"""
    glyphs: Tensor | None = None
    """(2, L, glyph_width)"""
    ofs: Tensor | None = None
    """(2,)"""
    control: Tensor | None = None
    """(2, control_channels, T, H, W)"""
    audio: Sound | None = None

    @classmethod
    def of(cls, model: DiT, words: int, seed: int = 0, tokens: Grid = (3, 3, 5)) -> "Sample":
        """An odd grid of tokens, captions of `words` tokens, and all conditions that the model reads."""
        generator, config = torch.Generator().manual_seed(seed), model.config
        counts = config.position_grid if config.position_words else tokens
        grid = [patch * count for patch, count in zip(config.patch_size, counts, strict=True)]

        def draw(*shape: int) -> Tensor:
            return torch.randn(2, *shape, generator=generator)

        return cls(
            latents=draw(model.latent_channels, *grid),
            timesteps=torch.tensor([0.3, 0.9]),
            text=draw(words, model.text_width),
            channels=draw(config.condition_channels, *grid) if config.condition_channels else None,
            image=draw(6, config.image_width) if config.image_width else None,
            pooled=draw(config.pooled_width) if config.pooled_width else None,
            guidance=torch.tensor([6.0, 1.5]) if config.guidance else None,
            glyphs=draw(4, config.glyph_width) if config.glyph_width else None,
            ofs=torch.tensor([2.0, 1.0]) if config.ofs_channels else None,
            control=draw(config.control_channels, *grid) if config.control_channels else None,
            audio=_heard(model, words, draw),
        )

    def extras(self) -> Extras:
        """The conditions as our model takes them."""
        guidance = None if self.guidance is None else self.guidance.tolist()
        return Extras(
            channels=_rows(self.channels),
            image=_rows(self.image),
            pooled=_rows(self.pooled),
            guidance=guidance,
            glyphs=_rows(self.glyphs),
            control=_rows(self.control),
            audio=self.audio,
            ofs=None if self.ofs is None else self.ofs.tolist(),
        )

    def given(self) -> Tensor:
        """Noisy latents and given channels together, as references take them."""
        return self.latents if self.channels is None else torch.cat([self.latents, self.channels], dim=1)


def _heard(model: DiT, words: int, draw: Callable[..., Tensor]) -> Sound | None:
    """A little longer than the clip: of a tower with captions of its own, or of two ears in the clip's softmax."""
    times = torch.tensor([0.6, 0.2])
    if model.audio is not None:
        text = draw(words, model.audio.text_width)
        return Sound(list(draw(model.audio.latent_channels, 7)), times, list(text))
    return Sound(list(draw(model.config.audio_channels, 7, 2)), times) if model.config.audio_channels else None


def _rows(values: Tensor | None) -> list[Tensor] | None:
    return None if values is None else list(values)


Call = Callable[[Any, Record, Sample], Tensor]


def wan(reference: Any, config: Record, sample: Sample) -> Tensor:
    """Wan 2.1 and 2.2: timesteps count to 1000."""
    return reference(sample.given(), sample.timesteps * 1000, sample.text, sample.image).sample


def wan_vace(reference: Any, config: Record, sample: Sample) -> Tensor:
    """Wan VACE: as Wan, with the control tower's channels."""
    found = reference(sample.given(), sample.timesteps * 1000, sample.text, sample.image, sample.control)
    return found.sample


def ltx_video(reference: Any, config: Record, sample: Sample) -> Tensor:
    """LTX-Video: tokens in a row; positions in seconds at 25 frames a second and in pixels, 8 x 32 x 32 a latent."""
    _, _, frames, height, width = sample.latents.shape
    tokens = sample.latents.permute(0, 2, 3, 4, 1).flatten(1, 3)
    timesteps = (sample.timesteps * 1000)[:, None].expand(tokens.shape[:2])
    mask = torch.ones(sample.text.shape[:2])
    found = reference(tokens, sample.text, timesteps, mask, frames, height, width, (8 / 25, 32, 32)).sample
    return found.unflatten(1, (frames, height, width)).permute(0, 4, 1, 2, 3)


def ltx2(reference: Any, config: Record, sample: Sample) -> Tensor:
    """LTX-2: tokens of both streams in a row at the reference's own frame rate; in 2.3 each reads the other's time."""
    assert sample.audio is not None
    assert sample.audio.text is not None
    assert isinstance(sample.audio.timesteps, Tensor)
    heard = torch.stack(list(sample.audio.latents))
    shape = sample.latents.shape[2:]
    times, heard_times = sample.timesteps * 1000, sample.audio.timesteps * 1000
    video, played = reference(
        sample.latents.flatten(2).transpose(1, 2),
        heard.transpose(1, 2),
        sample.text,
        torch.stack(list(sample.audio.text)),
        times[:, None].expand(2, shape.numel()),
        heard_times[:, None].expand(2, heard.shape[2]),
        times,
        heard_times,
        num_frames=shape[0],
        height=shape[1],
        width=shape[2],
        audio_num_frames=heard.shape[2],
        use_cross_timestep=config["cross_attn_mod"],
        return_dict=False,
    )
    return together(video.transpose(1, 2), played.transpose(1, 2))


def minimax_h3(reference: Any, config: Record, sample: Sample) -> Tensor:
    """MiniMax-H3: one packed sequence a clip, laid out by the reference's own pipeline, at 1 - t and the other sign."""
    layout = import_module("diffusers.modular_pipelines.minimax_h3.before_denoise")
    patch, found = tuple(config["patch_size"]), []
    for clip, latents in enumerate(sample.latents):
        sound = sample.audio
        heard = latents.new_zeros(config["audio_in_channels"], 0, 2) if sound is None else sound.latents[clip]
        tags = torch.ones(len(sample.text[clip]), dtype=torch.long)
        places = (*latents.shape[1:], heard.shape[1], patch, 2, 2, 0)
        where, tags, video, audio, text, _, _ = layout.MiniMaxH3PrepareLayoutStep.build_packed_sequence(tags, *places)
        heard_at = (sample.timesteps if sound is None else torch.stack(list(sound.timesteps)))[clip]
        both = [1 - time.item() for time in (sample.timesteps[clip], heard_at)]
        times, rows = layout.MiniMaxH3SetTimestepsStep.build_row_timesteps(video, audio, 0, 0, len(text), *both, 1, 1)
        patches = layout.patchify_video_latents(latents[None], patch)[None]
        ears = heard.permute(2, 1, 0).reshape(1, -1, len(heard))
        seen, played = reference(
            patches, ears, sample.text[clip][None], times, rows, tags, where, video, audio, text, return_dict=False
        )
        grid = [side // size for side, size in zip(latents.shape[1:], patch, strict=True)]
        seen = seen[0].unflatten(1, (-1, *patch)).unflatten(0, grid).permute(3, 0, 4, 1, 5, 2, 6).reshape(latents.shape)
        found.append(-torch.cat([seen.flatten(), played[0].unflatten(0, (2, -1)).permute(2, 1, 0).flatten()]))
    return torch.stack(found) if sample.audio else torch.stack(found).view_as(sample.latents)


def hunyuan_video(reference: Any, config: Record, sample: Sample) -> Tensor:
    """HunyuanVideo: timesteps and guidance count to 1000."""
    mask = torch.ones(sample.text.shape[:2], dtype=torch.long)
    guidance = None if sample.guidance is None else sample.guidance * 1000
    return reference(sample.given(), sample.timesteps * 1000, sample.text, mask, sample.pooled, guidance).sample


def hunyuan_video_15(reference: Any, config: Record, sample: Sample) -> Tensor:
    """HunyuanVideo-1.5: a caption, glyphs and an image, each with a mask."""
    assert sample.glyphs is not None
    masks = [torch.ones(source.shape[:2], dtype=torch.long) for source in (sample.text, sample.glyphs)]
    told = {"encoder_hidden_states_2": sample.glyphs, "encoder_attention_mask_2": masks[1]}
    timesteps = sample.timesteps * 1000
    return reference(sample.given(), timesteps, sample.text, masks[0], image_embeds=sample.image, **told).sample


def cogvideox(reference: Any, config: Record, sample: Sample) -> Tensor:
    """CogVideoX: frames before channels, and rotary positions from outside."""
    rope = None
    if config["use_rotary_positional_embeddings"]:
        frames, height, width = (
            side // (patch or 1)
            for side, patch in zip(
                sample.latents.shape[2:],
                (config["patch_size_t"], config["patch_size"], config["patch_size"]),
                strict=True,
            )
        )
        angles = import_module("diffusers.models.embeddings").get_3d_rotary_pos_embed
        rope = angles(config["attention_head_dim"], ((0, 0), (height, width)), (height, width), frames)
    latents = sample.given().transpose(1, 2)
    found = reference(latents, sample.text, sample.timesteps * 1000, ofs=sample.ofs, image_rotary_emb=rope).sample
    return found.transpose(1, 2)


class NearestResize:
    """What Cosmos' class takes from torchvision, where that is not installed: a resize of its padding mask."""

    class InterpolationMode:
        """The one of the way below."""

        NEAREST = "nearest"

    class functional:
        """The one function."""

        @staticmethod
        def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
            """mask (B, 1, H, W) -> (B, 1, *size)"""
            return torch.nn.functional.interpolate(mask, size, mode=interpolation)


def cosmos(reference: Any, config: Record, sample: Sample) -> Tensor:
    """Cosmos-Predict: timesteps from 0 to 1, and nothing padded."""
    module = import_module(type(reference).__module__)
    if not hasattr(module, "transforms"):
        module.transforms = NearestResize  # type: ignore[attr-defined]  # what its own import found missing
    mask = torch.zeros(1, 1, *sample.latents.shape[-2:])
    return reference(sample.given(), sample.timesteps, sample.text, padding_mask=mask).sample


def latte(reference: Any, config: Record, sample: Sample) -> Tensor:
    """Latte: the reference adds a table in time that fits one number of frames; here it gets one that fits the clip."""
    table = reference.temp_pos_embed
    embed = import_module("diffusers.models.embeddings").get_1d_sincos_pos_embed_from_grid
    frames = torch.arange(sample.latents.shape[2]).unsqueeze(1)
    reference.temp_pos_embed = embed(table.shape[-1], frames, output_type="pt").to(table)[None]
    return reference(sample.latents, sample.timesteps * 1000, sample.text).sample


class WithoutRounding:
    """torch, but for one type: Kandinsky's class rounds queries and keys to bfloat16 whatever its own type is."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def kandinsky(reference: Any, config: Record, sample: Sample) -> Tensor:
    """Kandinsky 5: channels last, positions from outside, and its rounding to bfloat16 left out."""
    module: Any = import_module(type(reference).__module__)
    grid = [side // patch for side, patch in zip(sample.latents.shape[2:], config["patch_size"], strict=True)]
    places, words = [torch.arange(size) for size in grid], torch.arange(sample.text.shape[1])
    given = sample.given().movedim(1, -1)
    module.torch = WithoutRounding()
    try:
        found = reference(given, sample.text, sample.timesteps * 1000, sample.pooled, places, words).sample
    finally:
        module.torch = torch
    return found.movedim(-1, 1)


def mochi(reference: Any, config: Record, sample: Sample) -> Tensor:
    """Mochi: time from noise to data, and the velocity of that; a mask for the caption."""
    mask = torch.ones(sample.text.shape[:2], dtype=torch.bool)
    return -reference(sample.latents, sample.text, (1 - sample.timesteps) * 1000, mask).sample


def pixart(reference: Any, config: Record, sample: Sample) -> Tensor:
    """PixArt: one frame, and timesteps that count to 1000."""
    return reference(sample.latents[:, :, 0], sample.text, sample.timesteps * 1000).sample.unsqueeze(2)


CALLS: dict[str, Call] = {
    "Kandinsky5Transformer3DModel": kandinsky,
    "MochiTransformer3DModel": mochi,
    "PixArtTransformer2DModel": pixart,
    "CosmosTransformer3DModel": cosmos,
    "LatteTransformer3DModel": latte,
    "WanTransformer3DModel": wan,
    "WanVACETransformer3DModel": wan_vace,
    "LTXVideoTransformer3DModel": ltx_video,
    "LTX2VideoTransformer3DModel": ltx2,
    "MiniMaxH3Transformer3DModel": minimax_h3,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "HunyuanVideo15Transformer3DModel": hunyuan_video_15,
    "CogVideoXTransformer3DModel": cogvideox,
}
"""How the forward of each class of the reference takes a sample."""


IMAGES = ("PixArtTransformer2DModel",)
"""Classes of the reference that take one frame."""


def words_of(config: Record) -> int:
    """Tokens of a caption, where the reference demands a number: Wan finds an image's tokens behind 512 of text."""
    if config.get("image_dim") is not None:
        return 512
    return config.get("max_text_seq_length", 7)


@torch.no_grad()
def difference(ours: nn.Module, reference: Any, config: Record) -> float:
    """Largest difference of the two outputs, relative to the largest output; of encoder and decoder for a VAE."""
    reference.eval()
    ours.eval()
    if isinstance(ours, CausalVAE):
        return _vae_difference(ours, reference)
    assert isinstance(ours, DiT)
    name = type(reference).__name__
    if name not in CALLS:
        raise ValueError(f"{name}: Kinema cannot run this class for a comparison yet; it has calls for {list(CALLS)}.")
    sample = Sample.of(ours, words_of(config), tokens=(1, 5, 3) if name in IMAGES else (3, 3, 5))
    expected = CALLS[name](reference, config, sample)
    found = ours.predict_streams(list(sample.latents), sample.timesteps, list(sample.text), sample.extras())
    video = torch.stack(found.video)
    return relative(video if found.audio is None else together(video, torch.stack(found.audio)), expected)


def together(video: Tensor, audio: Tensor) -> Tensor:
    """Both streams in a row, (B, ...) each."""
    return torch.cat([video.flatten(1), audio.flatten(1)], dim=1)


def _vae_difference(ours: CausalVAE, reference: Any) -> float:
    generator = torch.Generator().manual_seed(0)
    time, space = ours.geometry_strides
    frames = 2 * max(time, 4) + 1  # Wan's class reads four frames at a time, whatever its stride, and drops a rest
    video = torch.rand(1, 3, frames, 3 * space, 5 * space, generator=generator) * 2 - 1
    encoded = reference.encode(video).latent_dist.mean
    latents = torch.randn(encoded.shape, generator=generator)
    mean, std = ours.latent_mean.view(-1, 1, 1, 1), ours.latent_std.view(-1, 1, 1, 1)
    return max(
        relative(ours.encode(video).mean * std + mean, encoded),
        relative(ours.decode(latents), reference.decode(latents * std + mean).sample),
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value; infinite where shapes or finiteness differ."""
    if actual.shape != expected.shape or not torch.isfinite(expected).all():
        return float("inf")
    scale = expected.abs().max().clamp(min=1e-12)
    return ((actual - expected).abs().max() / scale).item()
