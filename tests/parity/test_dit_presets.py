"""Published transformers: `diffusers`' own classes, every parameter random, against ours with the same weights."""

import dataclasses

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers import transformer_cosmos

from kinema.interop.comparing import NearestResize, Sample, kandinsky, minimax_h3
from kinema.interop.presets import PRESETS
from kinema.models.dit import Extras, Sound
from tests.parity.published import LATTE

TOLERANCE = 1e-5  # largest difference over largest value
BY_NAME = {preset.name: preset for preset in PRESETS}

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
}
WAN_IMAGE = WAN | {"in_channels": 9, "image_dim": 10, "added_kv_proj_dim": 32}
WAN_VACE = WAN | {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 6}

LTX = {
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "in_channels": 6,
    "out_channels": 6,
    "cross_attention_dim": 40,
    "num_layers": 2,
    "caption_channels": 12,
}
LTX2 = {
    "in_channels": 6,
    "out_channels": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "cross_attention_dim": 40,
    "audio_in_channels": 5,
    "audio_out_channels": 5,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 12,
    "rope_type": "split",
}
LTX2_3 = {
    "rope_type": "split",
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "text_embed_dim": 10,
    "pooled_projection_dim": 6,
    "rope_axes_dim": (4, 4, 4),
}
MINIMAX = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "hidden_size": 20,
    "num_layers": 2,
    "ffn_dim": 28,
    "in_channels": 4,
    "audio_in_channels": 5,
    "text_dim": 12,
    "freq_dim": 16,
    "time_embed_hidden_dim": 14,
    "time_embed_dim": 10,
    "rope_freq_dim": 2,
}
HUNYUAN_15 = {
    "in_channels": 7,
    "out_channels": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "text_embed_dim": 10,
    "text_embed_2_dim": 6,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}
COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 14,
    "text_embed_dim": 12,
    "num_layers": 2,
}
COSMOS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 12,
    "adaln_lora_dim": 6,
    "max_size": (128, 240, 240),
    "extra_pos_embed_type": None,
    "rope_scale": (1.0, 3.0, 3.0),
}
COSMOS_PROJECTED = {
    "in_channels": 5,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 20,
    "encoder_hidden_states_channels": 12,
}
COSMOS_2B = {"num_attention_heads": 16, "in_channels": 17, "extra_pos_embed_type": None, "rope_scale": (1.0, 3.0, 3.0)}
COSMOS_25 = COSMOS_2B | {"use_crossattn_projection": True, "crossattn_proj_in_channels": 100352}
COSMOS_14B = {"num_attention_heads": 40, "num_layers": 36}
MOCHI = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "pooled_projection_dim": 15,
    "in_channels": 4,
    "text_embed_dim": 24,
    "time_embed_dim": 10,
}
COG_ROTARY = COG | {"use_rotary_positional_embeddings": True}


@dataclasses.dataclass
class Case:
    """A small model of a preset and the released sizes whose every tensor must find its place."""

    preset: str
    config: dict
    released: dict = dataclasses.field(default_factory=dict)
    """Name of the release -> its config."""
    frame_times: bool = False
    """A timestep for each latent frame, the first one 0."""
    words: int = 7
    """Tokens of a caption; some references know one number only."""
    image_tokens: int = 6
    silent: bool = False
    """No sound, for a model that may do without."""
    fps: float | None = None
    frames: int = 3
    padded: bool = False
    """The second caption has three tokens less: masked there, absent here."""


WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
WAN_I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
WAN_FLF = WAN_I2V | {"pos_embed_seq_len": 514}
WAN_1B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
LTX_13B = {"num_attention_heads": 32, "attention_head_dim": 128, "num_layers": 48, "cross_attention_dim": 4096}
COG_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
COG_15 = COG_5B | {"patch_size_t": 2}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "sample_size": 10,
    "caption_channels": 12,
}
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 12,
    "in_text_dim2": 6,
    "time_dim": 10,
    "model_dim": 32,
    "ff_dim": 40,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (8, 4, 4),
}
KANDINSKY_LITE = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "time_dim": 512,
    "model_dim": 1792,
    "ff_dim": 7168,
    "visual_cond": True,
}
KANDINSKY_PRO = KANDINSKY_LITE | {
    "time_dim": 1024,
    "model_dim": 4096,
    "ff_dim": 16384,
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
    "axes_dims": (32, 48, 48),
}
LATTE_1 = LATTE | {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 64,
    "caption_channels": 4096,
    "video_length": 16,
}
COG_5B_I2V = COG_5B | {"in_channels": 32, "use_learned_positional_embeddings": True}
COG_LEARNED = COG_ROTARY | {
    "in_channels": 8,
    "use_learned_positional_embeddings": True,
    "sample_width": 6,
    "sample_height": 10,
    "sample_frames": 9,
    "max_text_seq_length": 5,
}
CASES = {
    "cosmos": Case("cosmos", COSMOS, {"Predict 2 2B": COSMOS_2B, "Predict 2 14B": COSMOS_2B | COSMOS_14B}),
    "cosmos, another rate": Case("cosmos", COSMOS | {"rope_scale": (20 / 24, 2.0, 2.0)}, fps=16.0),
    "cosmos, a timestep for each frame": Case("cosmos", COSMOS | {"concat_padding_mask": False}, frame_times=True),
    "cosmos, projected captions": Case(
        "cosmos", COSMOS | COSMOS_PROJECTED, {"Predict 2.5 2B": COSMOS_25, "Predict 2.5 14B": COSMOS_25 | COSMOS_14B}
    ),
    "cosmos, learned places": Case(
        "cosmos",
        COSMOS | {"extra_pos_embed_type": "learnable", "max_size": (3, 12, 8), "rope_scale": (2.0, 1.0, 1.0)},
        {"1 7B": {}, "1 14B": COSMOS_14B | {"rope_scale": (2.0, 2.0, 2.0)}},
    ),
    "latte": Case("latte", LATTE, {"1": LATTE_1}),
    "kandinsky": Case("kandinsky", KANDINSKY, {"5 Lite": KANDINSKY_LITE, "5 Pro": KANDINSKY_PRO}),
    "kandinsky, given channels": Case("kandinsky", KANDINSKY | {"visual_cond": True, "patch_size": (1, 1, 2)}),
    "pixart": Case("pixart", PIXART, {"alpha 512": {"sample_size": 64, "caption_channels": 4096}}, frames=1),
    "pixart, larger pictures": Case(
        "pixart",
        PIXART | {"sample_size": 128, "interpolation_scale": 3, "use_additional_conditions": False, "out_channels": 4},
        {"sigma 1024": {"sample_size": 128, "use_additional_conditions": False, "caption_channels": 4096}},
        frames=1,
    ),
    "latte, larger frames, no variance": Case("latte", LATTE | {"sample_size": 140, "out_channels": 4}),
    "ltx": Case("ltx", LTX, {"2B": {}, "13B": LTX_13B}, padded=True),
    "ltx, a timestep for each frame": Case("ltx", LTX, frame_times=True),
    "ltx-2": Case("ltx2", LTX2, {"2.0": {"rope_type": "split"}}, padded=True),
    "ltx-2, a timestep for each frame": Case("ltx2", LTX2, frame_times=True, fps=12.5),
    "minimax-h3": Case("minimax_h3", MINIMAX, {"H3": {}}, frames=7),
    "minimax-h3 without sound": Case("minimax_h3", MINIMAX | {"patch_size": (1, 1, 2)}, silent=True),
    "ltx-2.3": Case("ltx2", LTX2 | LTX2_3 | {"caption_channels": 3840}, {"2.3": LTX2_3}, padded=True),
    "ltx-2.3, a timestep for each frame": Case(
        "ltx2", LTX2 | LTX2_3 | {"use_prompt_embeddings": True}, frame_times=True, fps=12.5
    ),
    "hunyuan": Case("hunyuan", HUNYUAN, {"13B": {}}, padded=True),
    "hunyuan, given channels": Case(
        "hunyuan",
        HUNYUAN | {"in_channels": 9, "image_condition_type": "latent_concat", "guidance_embeds": False},
        {"I2V": {"in_channels": 33, "image_condition_type": "latent_concat", "guidance_embeds": False}},
    ),
    "hunyuan, a given first frame": Case(
        "hunyuan",
        HUNYUAN | {"image_condition_type": "token_replace"},
        {"I2V, token replacement": {"image_condition_type": "token_replace"}},
        padded=True,
    ),
    "hunyuan 1.5": Case("hunyuan15", HUNYUAN_15, {"8B": {}}, padded=True),
    "hunyuan 1.5 without an image": Case("hunyuan15", HUNYUAN_15, padded=True, image_tokens=0),
    "cogvideox, sines": Case("cogvideox", COG, {"2B": {}}, words=226),
    "cogvideox, rotary": Case("cogvideox", COG_ROTARY, {"5B": COG_5B}),
    "cogvideox 1.5": Case("cogvideox", COG_ROTARY | {"patch_size_t": 2, "in_channels": 8}, {"1.5 5B": COG_15}),
    "cogvideox, learned places": Case("cogvideox", COG_LEARNED, {"5B I2V": COG_5B_I2V}, words=5),
    "cogvideox 1.5, another number": Case(
        "cogvideox",
        COG_ROTARY | {"patch_size_t": 2, "in_channels": 8, "ofs_embed_dim": 14},
        {"1.5 5B I2V": COG_15 | {"in_channels": 32, "ofs_embed_dim": 512}},
    ),
    "mochi": Case("mochi", MOCHI, {"1 preview": {}}, words=9, padded=True),
    "wan": Case("wan", WAN, {"1.3B": WAN_1B, "14B": {}}),
    "wan, a timestep for each frame": Case("wan", WAN, {"2.2 TI2V 5B": WAN_5B}, frame_times=True),
    "wan, given channels": Case("wan", WAN | {"in_channels": 9}, {"2.2 I2V A14B": {"in_channels": 36}}),
    "wan, image tokens": Case("wan", WAN_IMAGE, {"I2V 14B": WAN_I2V}, words=512),
    "wan, first and last image": Case("wan", WAN_IMAGE | {"pos_embed_seq_len": 6}, {"FLF2V 14B": WAN_FLF}, words=512),
    "wan vace": Case(
        "wan_vace",
        WAN_VACE,
        {
            "1.3B": WAN_1B | {"vace_layers": list(range(0, 30, 2))},
            "14B": {},
        },
    ),
    "wan vace with image tokens": Case("wan_vace", WAN_IMAGE | {"vace_layers": [0, 1]}, words=512),
    "wan without cross norm": Case("wan", WAN | {"cross_attn_norm": False, "patch_size": (2, 1, 2), "eps": 1e-5}),
}


def reference(case, seed=0):
    """A float32 model of the reference's class, every parameter random: zeros and ones would hide mistakes."""
    torch.manual_seed(seed)
    model = getattr(diffusers, BY_NAME[case.preset].reference)(**case.config)
    if case.config.get("use_learned_positional_embeddings"):  # a buffer there, which nothing could train
        table = model.patch_embed._buffers.pop("pos_embedding")
        model.patch_embed.pos_embedding = torch.nn.Parameter(table.float())
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.8 / parameter[0].numel() ** 0.5)
        if parameter.ndim == 1 and name.endswith("weight"):  # of a norm: near 0 it would flatten every softmax
            parameter.data += 1
    return model.eval()


def record(model):
    return dict(model.config)


@pytest.fixture(params=CASES, name="case")
def any_case(request):
    return CASES[request.param]


def ours(case, theirs):
    preset = BY_NAME[case.preset]
    preset.check(record(theirs))
    model = preset.build(record(theirs))
    model.load_state_dict(preset.key_map(record(theirs)).to_ours(theirs.state_dict()), strict=True)
    return model


@dataclasses.dataclass
class Given:
    """A batch of two: odd grids, two timesteps, as both projects take them."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    channels: torch.Tensor | None = None
    image: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    guidance: list[float] | None = None
    control: torch.Tensor | None = None
    glyphs: torch.Tensor | None = None
    fps: list[float] | None = None
    audio: Sound | None = None
    ofs: list[float] | None = None
    padding: int = 0

    def captions(self):
        whole, second = self.text
        return [whole, second[: len(second) - self.padding]]

    def glyph_words(self):
        """The padding the other way round: a short first entry, a whole second one."""
        if self.glyphs is None:
            return None
        return [self.glyphs[0, : self.glyphs.shape[1] - self.padding], self.glyphs[1]]

    def extras(self):
        return Extras(
            channels=parts(self.channels),
            image=parts(self.image),
            pooled=parts(self.pooled),
            guidance=self.guidance,
            control=parts(self.control),
            glyphs=self.glyph_words(),
            audio=self.audio,
            fps=self.fps,
            ofs=self.ofs,
        )


def mask_of(entries):
    """1 for each token of an entry, 0 for its padding."""
    longest = max(len(entry) for entry in entries)
    return torch.stack([(torch.arange(longest) < len(entry)).long() for entry in entries])


def parts(batch):
    return None if batch is None else list(batch)


def inputs(case, model):
    g = torch.Generator().manual_seed(1)
    config = model.config
    grid = [count * patch for count, patch in zip((case.frames, 5, 3), config.patch_size, strict=True)]

    def draw(*shape):
        return torch.randn(2, *shape, generator=g)

    timesteps = torch.tensor([0.81, 0.237])
    if case.frame_times:
        timesteps = torch.stack([torch.zeros(2), timesteps, timesteps], dim=1)
    return Given(
        draw(model.latent_channels, *grid),
        timesteps,
        draw(case.words, model.text_width),
        draw(config.condition_channels, *grid) if config.condition_channels else None,
        draw(case.image_tokens, config.image_width) if config.image_width else None,
        draw(config.pooled_width) if config.pooled_width else None,
        [6.0, 1.5] if config.guidance else None,
        draw(config.control_channels, *grid) if config.control_channels else None,
        draw(5, config.glyph_width) if config.glyph_width else None,
        None if case.fps is None else [case.fps] * 2,
        sound(case, model, draw) if config.audio or (config.audio_channels and not case.silent) else None,
        [2.0, 0.5] if config.ofs_channels else None,
        3 if case.padded else 0,
    )


def sound(case, model, draw):
    """Longer than the video, with timesteps of its own; a tower's captions too, the second as short as the video's."""
    timesteps = torch.tensor([0.62, 0.113])
    if not model.config.audio:
        return Sound(list(draw(model.config.audio_channels, 7, 2)), timesteps)
    text = list(draw(9, model.audio.text_width))
    if case.frame_times:
        timesteps = list(timesteps[:, None].repeat(1, 7).index_fill(1, torch.arange(2), 0.0))
    text[1] = text[1][: 9 - (3 if case.padded else 0)]
    return Sound(list(draw(model.config.audio.channels, 7)), timesteps, text)


def run_wan(theirs, given):
    latents = together(given)
    timesteps = given.timesteps * 1000
    if timesteps.ndim == 2:  # one for each token
        tokens = latents.shape[-2] // 2 * latents.shape[-1] // 2
        timesteps = timesteps.repeat_interleave(tokens, dim=1)
    image = given.image
    if theirs.config.pos_embed_seq_len:  # two images a clip, one after the other in the batch
        image = image.view(4, 3, -1)
    control = {} if given.control is None else {"control_hidden_states": given.control}
    return theirs(latents, timesteps, given.text, image, **control).sample


def together(given, dim=1):
    return given.latents if given.channels is None else torch.cat([given.latents, given.channels], dim=dim)


def run_ltx(theirs, given):
    b, _, t, h, w = given.latents.shape
    timesteps = given.timesteps * 1000
    if timesteps.ndim == 2:
        timesteps = timesteps.repeat_interleave(h * w, dim=1)
    else:
        timesteps = timesteps[:, None].expand(b, t * h * w)
    tokens = given.latents.permute(0, 2, 3, 4, 1).flatten(1, 3)
    scale = (8 / 25, 32, 32)
    out = theirs(tokens, given.text, timesteps, mask_of(given.captions()), t, h, w, scale).sample
    return out.unflatten(1, (t, h, w)).permute(0, 4, 1, 2, 3)


def run_ltx2(theirs, given):
    """Both streams, one behind the other."""
    b, _, t, h, w = given.latents.shape
    audio, timesteps = given.audio, given.timesteps * 1000
    timesteps = (timesteps if timesteps.ndim == 2 else timesteps[:, None].expand(b, t)).repeat_interleave(h * w, dim=1)
    heard = torch.stack(list(audio.timesteps)) * 1000
    heard = heard if heard.ndim == 2 else heard[:, None].expand(b, 7)
    words = torch.nn.utils.rnn.pad_sequence(audio.text, batch_first=True)
    video, played = theirs(
        given.latents.permute(0, 2, 3, 4, 1).flatten(1, 3),
        torch.stack(audio.latents).transpose(1, 2),
        given.text,
        words,
        timesteps,
        heard,
        timesteps.amax(1),
        heard.amax(1),
        encoder_attention_mask=mask_of(given.captions()),
        audio_encoder_attention_mask=mask_of(audio.text),
        num_frames=t,
        height=h,
        width=w,
        fps=24.0 if given.fps is None else given.fps[0],
        audio_num_frames=7,
        use_cross_timestep=theirs.config.cross_attn_mod,
        return_dict=False,
    )
    video = video.unflatten(1, (t, h, w)).permute(0, 4, 1, 2, 3)
    return torch.cat([video.flatten(1), played.transpose(1, 2).flatten(1)], dim=1)


def run_hunyuan(theirs, given):
    guidance = None if given.guidance is None else torch.tensor(given.guidance) * 1000
    return theirs(
        together(given), given.timesteps * 1000, given.text, mask_of(given.captions()), given.pooled, guidance
    ).sample


def run_hunyuan15(theirs, given):
    image = given.image if given.image.shape[1] else torch.zeros(2, 6, given.image.shape[2])
    told = [given.text, mask_of(given.captions()), None, given.glyphs, mask_of(given.glyph_words()), image]
    return theirs(together(given), given.timesteps * 1000, *told).sample


def run_cogvideox(theirs, given):
    rope = None
    if theirs.config.use_rotary_positional_embeddings:
        _, _, t, h, w = given.latents.shape
        frames = t // (theirs.config.patch_size_t or 1)
        rope = get_3d_rotary_pos_embed(
            theirs.config.attention_head_dim, ((0, 0), (h // 2, w // 2)), (h // 2, w // 2), frames
        )
    latents = together(given).transpose(1, 2)
    ofs = None if given.ofs is None else torch.tensor(given.ofs)
    return theirs(latents, given.text, given.timesteps * 1000, ofs=ofs, image_rotary_emb=rope).sample.transpose(1, 2)


def run_cosmos(theirs, given):
    transformer_cosmos.transforms = NearestResize
    latents, timesteps = together(given), given.timesteps
    mask = torch.zeros(1, 1, *[8 * side for side in latents.shape[-2:]])
    if timesteps.ndim == 2:
        timesteps = timesteps[:, None, :, None, None]
    fps = None if given.fps is None else given.fps[0]
    return theirs(latents, timesteps, given.text, fps=fps, padding_mask=mask).sample


def run_kandinsky(theirs, given):
    sample = Sample(given.latents, given.timesteps, given.text, given.channels, pooled=given.pooled)
    return kandinsky(theirs, theirs.config, sample)


def run_minimax_h3(theirs, given):
    sample = Sample(given.latents, given.timesteps, given.text, audio=given.audio)
    return minimax_h3(theirs, theirs.config, sample)


def run_mochi(theirs, given):
    """Its time runs from noise to data."""
    mask = mask_of(given.captions())
    return -theirs(given.latents, given.text, (1 - given.timesteps) * 1000, mask).sample


def run_pixart(theirs, given):
    return theirs(given.latents[:, :, 0], given.text, given.timesteps * 1000).sample.unsqueeze(2)


def run_latte(theirs, given):
    return theirs(given.latents, given.timesteps * 1000, given.text).sample


RUN = {
    "cogvideox": run_cogvideox,
    "cosmos": run_cosmos,
    "hunyuan": run_hunyuan,
    "hunyuan15": run_hunyuan15,
    "kandinsky": run_kandinsky,
    "latte": run_latte,
    "ltx": run_ltx,
    "ltx2": run_ltx2,
    "minimax_h3": run_minimax_h3,
    "mochi": run_mochi,
    "pixart": run_pixart,
    "wan": run_wan,
    "wan_vace": run_wan,
}


def run_ours(model, given):
    timesteps = given.timesteps if given.timesteps.ndim == 1 else list(given.timesteps)
    found = model.predict_streams(list(given.latents), timesteps, given.captions(), given.extras())
    video = torch.stack(found.video)
    return video if found.audio is None else torch.cat([video.flatten(1), torch.stack(found.audio).flatten(1)], dim=1)


def meta_record(case, config):
    """The whole config of a released size, and the reference's tensors without memory."""
    with torch.device("meta"):
        theirs = getattr(diffusers, BY_NAME[case.preset].reference)(**config)
    return record(theirs), theirs.state_dict()


def close(ours, theirs, scale=None):
    """Largest difference over the largest value."""
    if torch.equal(ours, theirs):
        return 0.0  # whatever the largest value: nothing reads some weights of published models
    return float((ours - theirs).detach().abs().max() / (theirs if scale is None else scale).detach().abs().max())


def gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def gradient_differences(case, theirs, model):
    """Difference of the gradient of every parameter.

    A bias is measured by the larger of its own and its layer's gradient: those of keys cancel in a softmax, and
    what is left of them is rounding.
    """
    key_map = BY_NAME[case.preset].key_map(record(theirs))
    expected = key_map.to_ours({name: gradient(p) for name, p in theirs.named_parameters()})
    actual = {name: gradient(p) for name, p in model.named_parameters()}
    assert set(actual) == set(expected)
    found = {}
    for name, grad in actual.items():
        weight = expected.get(name.removesuffix("bias") + "weight", expected[name])
        scale = torch.stack([expected[name].abs().max(), weight.abs().max()])
        found[name] = close(grad, expected[name], scale)
    return found


def test_outputs_and_gradients_equal_the_reference(case, request, parity):
    theirs = reference(case)
    model = ours(case, theirs)
    given = inputs(case, model)
    expected = RUN[case.preset](theirs, given)
    actual = run_ours(model, given)
    output = close(actual, expected)
    assert output <= TOLERANCE

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    gradients = gradient_differences(case, theirs, model)
    assert {name: difference for name, difference in gradients.items() if not difference <= TOLERANCE} == {}
    row = request.node.callspec.params["case"]
    parity.note(row, case.preset, output=output, gradients=max(gradients.values()))


def test_weights_come_back_bit_for_bit(case):
    preset, theirs = BY_NAME[case.preset], reference(case)
    maps = [preset.key_map(record(theirs))]
    if preset.original_key_map:
        maps.append(preset.original_key_map(record(theirs)))
    mine = ours(case, theirs).state_dict()
    for key_map in maps:
        there = key_map.to_theirs(mine)
        back = key_map.to_ours(there)
        assert set(back) == set(mine)
        assert all(torch.equal(back[name], mine[name]) for name in mine)
    there = maps[0].to_theirs(mine)
    assert {name: x.shape for name, x in there.items()} == {n: x.shape for n, x in theirs.state_dict().items()}
    assert all(torch.equal(there[name], x) for name, x in theirs.state_dict().items())


def test_a_model_describes_itself_as_the_reference_does(case):
    preset, theirs = BY_NAME[case.preset], reference(case)
    described = preset.describe(ours(case, theirs)) | {key: case.config[key] for key in case.config.keys() & UNSAID}
    public = {key: value for key, value in record(theirs).items() if not key.startswith("_")}
    assert plain(described) == plain(public)


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


UNSAID = {"video_length"}  # what says nothing of a model


RELEASED = [(case, name) for case, entry in CASES.items() for name in entry.released]


@pytest.mark.parametrize(("case_name", "release"), RELEASED)
def test_every_tensor_of_a_release_has_its_place(case_name, release, parity):
    case = CASES[case_name]
    preset = BY_NAME[case.preset]
    whole, tensors = meta_record(case, case.released[release])
    with torch.device("meta"):
        model = preset.build(whole)
    mapped = preset.key_map(whole).to_ours(tensors)
    assert {n: x.shape for n, x in mapped.items()} == {n: x.shape for n, x in model.state_dict().items()}
    back = preset.key_map(whole).to_theirs(model.state_dict())
    assert {n: x.shape for n, x in back.items()} == {n: x.shape for n, x in tensors.items()}
    parity.size(case_name, case.preset, release, tensors)


@pytest.mark.parametrize(
    "case_name", [name for name, case in CASES.items() if case.preset in ("wan", "wan_vace", "ltx")]
)
def test_a_vendors_own_names_are_those_that_diffusers_converts(case_name):
    """Through `diffusers`' conversion of original files: one fact, two independent tables."""
    from diffusers.loaders import single_file_utils as files

    case = CASES[case_name]
    convert = {
        "wan": files.convert_wan_transformer_to_diffusers,
        "wan_vace": files.convert_wan_transformer_to_diffusers,
        "ltx": files.convert_ltx_transformer_checkpoint_to_diffusers,
    }[case.preset]
    theirs = reference(case)
    original = BY_NAME[case.preset].original_key_map(record(theirs)).to_theirs(ours(case, theirs).state_dict())
    converted = convert(dict(original))
    if "img_emb.emb_pos" in converted:  # which that table forgets
        converted["condition_embedder.image_embedder.pos_embed"] = converted.pop("img_emb.emb_pos")
    assert set(converted) == set(theirs.state_dict())
    assert all(torch.equal(converted[key], x) for key, x in theirs.state_dict().items())


def test_hunyuans_own_names_and_shapes_are_those_that_diffusers_converts():
    """At the released width, which that conversion has written into it: names and shapes, without memory."""
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    preset = BY_NAME["hunyuan"]
    whole, tensors = meta_record(CASES["hunyuan"], {"num_layers": 2, "num_single_layers": 2})
    mine = preset.key_map(whole).to_ours(tensors)
    converted = convert_hunyuan_video_transformer_to_diffusers(preset.original_key_map(whole).to_theirs(mine))
    assert {name: x.shape for name, x in converted.items()} == {name: x.shape for name, x in tensors.items()}


def test_mochis_own_names_are_those_that_diffusers_converts():
    """At the released depth, which that conversion has written into it."""
    from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers

    case = Case("mochi", MOCHI | {"num_layers": 48})
    preset, theirs = BY_NAME["mochi"], reference(case)
    original = preset.original_key_map(record(theirs)).to_theirs(ours(case, theirs).state_dict())
    converted = convert_mochi_transformer_checkpoint_to_diffusers(dict(original))
    assert set(converted) == set(theirs.state_dict())
    assert all(torch.equal(converted[key], x) for key, x in theirs.state_dict().items())


def test_the_original_names_of_hunyuan_15_are_those_of_the_releases():
    """As diffusers' own conversion script reads them."""
    preset = BY_NAME["hunyuan15"]
    whole, tensors = meta_record(CASES["hunyuan 1.5"], {"num_layers": 2})
    original = preset.original_key_map(whole).to_theirs(preset.key_map(whole).to_ours(tensors))
    assert original["txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight"].shape == (6144, 2048)
    for stream in ("img", "txt"):
        for part in ("attn_q", "attn_k", "attn_v", "attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear"):
            assert f"double_blocks.1.{stream}_{part}.bias" in original
    assert {name.split(".")[0] for name in original} == {
        "byt5_in",
        "cond_type_embedding",
        "double_blocks",
        "final_layer",
        "img_in",
        "time_in",
        "txt_in",
        "vision_in",
    }


def test_two_original_tensors_that_swap_halves_differ():
    """The head's shift and scale lie the other way round in the two namings; the numbers must say so."""
    preset, theirs = BY_NAME["hunyuan"], reference(CASES["hunyuan"])
    original = preset.original_key_map(record(theirs)).to_theirs(ours(CASES["hunyuan"], theirs).state_dict())
    shift, scale = original["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(torch.cat([scale, shift]), theirs.state_dict()["norm_out.linear.weight"])
    q = theirs.state_dict()["single_transformer_blocks.1.attn.to_q.weight"]
    assert torch.equal(original["single_blocks.1.linear1.weight"][: len(q)], q)


def test_kandinsky_as_it_stands_rounds_and_no_more():
    """The comparison leaves out its rounding of queries and keys to bfloat16; this is how far that takes it."""
    theirs = reference(CASES["kandinsky"])
    model = ours(CASES["kandinsky"], theirs)
    given = inputs(CASES["kandinsky"], model)
    grid = [torch.arange(size // patch) for size, patch in zip(given.latents.shape[2:], (1, 2, 2), strict=True)]
    clips, words = given.latents.movedim(1, -1), torch.arange(given.text.shape[1])
    rounded = theirs(clips, given.text, given.timesteps * 1000, given.pooled, grid, words).sample.movedim(-1, 1)
    assert TOLERANCE < close(run_ours(model, given), rounded) < 1e-2


def test_latte_tells_a_single_frame_of_no_time():
    theirs = reference(CASES["latte"])
    model = ours(CASES["latte"], theirs)
    g = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 1, 6, 10, generator=g), torch.randn(1, 5, 12, generator=g)
    expected = theirs(latents, torch.tensor([300.0]), text).sample
    assert close(model.predict(list(latents), torch.tensor([0.3]), list(text))[0], expected[0]) <= TOLERANCE


def test_a_choice_that_the_reference_lacks_is_named():
    model = BY_NAME["wan"].build(record(reference(CASES["wan"])))
    model.config.pooled_text = True
    with pytest.raises(ValueError, match=r"WanTransformer3DModel cannot be model\.pooled_text=True"):
        BY_NAME["wan"].describe(model)
