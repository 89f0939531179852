"""Given frames: the same in training and in sampling, clean at every call, and never learnt."""

from dataclasses import fields, replace

import pytest
import torch

from kinema.conditioning.condition import Condition, embed, with_words
from kinema.conditioning.frames import CleanFrame, ClipSize, FrameChannels, FrameCondition, Given, PaddedClip
from kinema.conditioning.text import HashText, build_text_encoder
from kinema.data.config import DataConfig
from kinema.data.geometry import ClipShape, Geometry
from kinema.data.packs.pack import Pack
from kinema.diffusion.guidance import guided
from kinema.diffusion.objective import DDPM, PredictionTarget, RectifiedFlow
from kinema.diffusion.solvers import FOR_TABLES, Solver, solve
from kinema.models.dit import DiT, DiTConfig, Extras
from kinema.models.vae import CausalVAE, Norm, VAEConfig
from kinema.sampling.conditioner import numbers_told, shown_frames
from kinema.sampling.denoiser import Denoiser, check_condition, check_embedded_guidance, extras_of, with_given_frames
from kinema.sampling.pipeline import OtherVAE, Pipeline, SamplingConfig
from kinema.training.context_parallel import ContextParallel
from kinema.training.dit_task import DiTTask, PosteriorDraw, check_training

SIZES = [(4, 3, 4, 6), (4, 2, 2, 2), (4, 4, 4, 2)]
OBJECTIVES = {
    "flow": RectifiedFlow(timestep_shift=3.0),
    "ddpm": DDPM(prediction_target=PredictionTarget.velocity, zero_terminal_snr=True),
}
SHAPE = ClipShape(9, 16, 32)
VAE = {"latent_channels": 4, "width": 8, "decoder_width": 8, "width_multipliers": [1, 1, 1], "num_res_blocks": 1}
TEXT = HashText(width=16)


def draw(seed: int, sizes=SIZES) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g) for size in sizes]


def conditions() -> list[Condition]:
    """The first and the last clip have a given frame."""
    text = draw(2, [(5, 16), (2, 16), (3, 16)])
    given = draw(3, [(4, 1, *size[2:]) for size in SIZES])
    return [Condition(text[0], given[0]), Condition(text[1]), Condition(text[2], given[2])]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    return module.eval()


def tiny_dit(**changes) -> DiT:
    config = DiTConfig(width=24, depth=2, num_heads=2, rope_axes=[4, 4, 4], timestep_channels=16, **changes)
    return randomised(DiT(config, 4, 16))


TIMESTEPS = torch.tensor([0.2, 0.5, 0.9])


def test_given_frames_have_no_loss_and_no_gradient():
    latents, noise, predictions = draw(0), draw(1), [x.requires_grad_() for x in draw(4)]
    losses = RectifiedFlow().loss(
        lambda *_: predictions, latents, conditions(), TIMESTEPS, noise, given_frames=[1, 0, 2]
    )
    losses.sum().backward()
    assert predictions[0].grad[:, :1].eq(0).all()
    assert predictions[2].grad[:, :2].eq(0).all()
    assert all(x.grad[:, 2:].ne(0).all() for x in predictions)
    for loss, p, x, e, given in zip(losses, predictions, latents, noise, [1, 0, 2], strict=True):
        errors = (p.double() - (e.double() - x.double())).square()
        torch.testing.assert_close(loss.double(), errors[:, given:].mean(), rtol=1e-6, atol=0)


def test_the_model_gets_given_frames_bit_for_bit_with_timestep_0():
    seen = []
    model = lambda latents, times, text, extras: seen.append((latents, times)) or latents  # noqa: E731
    RectifiedFlow().loss(Denoiser(model, 1), draw(0), conditions(), TIMESTEPS, draw(1), given_frames=[1, 0, 1])
    (latents, times), noisy = seen[0], RectifiedFlow().add_noise(draw(0), draw(1), TIMESTEPS)
    assert [row.tolist() for row in times] == [
        [0, *[TIMESTEPS[0].item()] * 2], [TIMESTEPS[1].item()] * 2, [0, *[TIMESTEPS[2].item()] * 3],
    ]  # fmt: skip
    for clip, before, condition in zip(latents, noisy, conditions(), strict=True):
        given = condition.num_frames
        assert given == 0 or torch.equal(clip[:, :given], condition.frames)
        assert torch.equal(clip[:, given:], before[:, given:])


def test_a_pack_without_given_frames_is_asked_with_one_timestep_a_clip():
    seen = []
    plain = [Condition(condition.text) for condition in conditions()]
    Denoiser(lambda latents, times, *_: seen.append(times) or latents, 1)(draw(0), TIMESTEPS, plain)
    assert torch.equal(seen[0], TIMESTEPS)


@pytest.mark.parametrize("solver", [solver for solver in Solver if solver not in FOR_TABLES])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_given_frames_stay_exactly_through_every_step_of_every_solver(name, solver):
    model, calls = tiny_dit(), []

    def watched(latents, times, text, extras):
        calls.append(latents)
        return model(latents, times, text, extras)

    told = conditions()
    predict = guided(Denoiser(watched, 1), told, with_words(told, {"text": torch.zeros(1, 16)}), 2.0)
    with torch.no_grad():
        found = with_given_frames(solve(predict, draw(1), OBJECTIVES[name], solver, 4), told)
    assert len(calls) >= 4
    for clips in [*calls, [*found, *found]]:
        for clip, condition in zip(clips, [*told, *told], strict=True):
            assert torch.isfinite(clip).all()
            assert condition.frames is None or torch.equal(clip[:, :1], condition.frames)


def test_the_loss_and_gradient_of_a_pack_are_those_of_each_clip_alone():
    model = tiny_dit()
    parameters = list(model.parameters())

    def losses(clips):
        picked = [[values[i] for i in clips] for values in (draw(0), conditions(), draw(1))]
        given = [condition.num_frames for condition in picked[1]]
        denoiser = Denoiser(model, 1)
        return RectifiedFlow().loss(denoiser, picked[0], picked[1], TIMESTEPS[clips], picked[2], given_frames=given)

    together, alone = losses([0, 1, 2]), torch.cat([losses([i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    expected = torch.autograd.grad(alone.sum(), parameters)
    for a, b in zip(torch.autograd.grad(together.sum(), parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


def test_what_a_condition_holds_reaches_the_model():
    assert {field.name for field in fields(Condition)} <= {"text", "frames"} | {field.name for field in fields(Extras)}
    pooled = [Condition(torch.zeros(1, 4), pooled=torch.ones(3)), Condition(torch.zeros(2, 4), pooled=torch.zeros(3))]
    assert [x.sum().item() for x in extras_of(pooled).pooled] == [3, 0]
    assert extras_of(pooled).channels is None


def test_another_image_is_another_prediction():
    told = conditions()
    other = [Condition(c.text, None if c.frames is None else c.frames + 0.1) for c in told]
    with torch.no_grad():
        a, b = (Denoiser(tiny_dit(), 1)(draw(0), TIMESTEPS, c) for c in (told, other))
    assert not torch.allclose(a[0][:, 1:], b[0][:, 1:])
    torch.testing.assert_close(a[1], b[1])  # which was given nothing


# Trainer, validator and sampler build the same conditions


def frames(seed: int = 0, clips: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (*SHAPE, 3), dtype=torch.uint8, generator=g) for _ in range(clips)]


def pack(latents=None) -> Pack:
    clips = frames()
    names = [f"clip{i}" for i in range(len(clips))]
    return Pack(
        step=3, lane=1, keys=names, captions=["a red ball", "a blue one"], shapes=[SHAPE] * 2,
        frames=None if latents else clips, latents=latents, weights=torch.ones(2), cost=2.0,
        positions=[0, 1], epochs=[0, 0], failures=[], fps=8.0, seconds=0.0,
    )  # fmt: skip


@pytest.fixture(name="vae", scope="module")
def tiny_vae() -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(VAEConfig(**VAE)).eval()
    vae.latent_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    return vae


def task(vae: CausalVAE, condition: FrameCondition, model: DiT) -> DiTTask:
    return DiTTask(
        engine=model, vae=vae, text_encoder=build_text_encoder(TEXT), objective=RectifiedFlow(), condition=condition,
        image_encoder=None, context=ContextParallel(None, vae.geometry_strides),
        geometry=Geometry(*vae.geometry_strides, (1, 2, 2)), guidance_dropout=0.0, frozen={}, seed=0,
        numbers=numbers_told(model.config, 8.0, 6.0 if model.config.guidance else None), posterior=PosteriorDraw.sample,
        device=torch.device("cpu"),
    )  # fmt: skip


def pipeline(vae: CausalVAE, condition: FrameCondition, model: DiT) -> Pipeline:
    return Pipeline(
        denoiser=model, vae=vae, text_encoder=build_text_encoder(TEXT), objective=RectifiedFlow(), fps=8.0,
        geometry=Geometry(*vae.geometry_strides, (1, 2, 2)), shapes=[SHAPE], guidance_dropout=0.0, condition=condition,
    )  # fmt: skip


@pytest.mark.parametrize(
    "condition",
    [CleanFrame(), FrameChannels(), FrameChannels(mask=False), PaddedClip(), PaddedClip(last=True)],
    ids=lambda c: type(c).__name__,
)
def test_training_and_sampling_build_the_same_conditions(vae, condition):
    model, training = tiny_dit(), pack()
    trainer, sampler = task(vae, condition, model), pipeline(vae, condition, model)
    words = embed(trainer.text_encoder, training.captions)
    trained = trainer.conditions(training, trainer.encode(training), words, [False, False])
    images = [shown_frames(clip, condition.num_images()) for clip in frames()]
    sampled = sampler.conditions(training.captions, SHAPE, SamplingConfig(), images)
    for a, b in zip(trained, sampled, strict=True):
        assert same(a.text, b.text)
        assert same(a.frames, b.frames)
        assert same(a.channels, b.channels)
        assert a.frames is not None or a.channels is not None


class Tokens:
    """An image encoder of two tokens an image: its mean colour, and its first pixel."""

    width, num_tokens = 3, 2

    def encode(self, images):
        return torch.cat([torch.stack([image.float().mean((0, 1)), image[0, 0].float()]) for image in images])

    def nothing(self, images):
        return torch.zeros(images * self.num_tokens, self.width)


def test_image_tokens_are_the_same_in_training_and_sampling_and_zeros_without_an_image(vae):
    condition, training = PaddedClip(last=True), pack()
    trainer, sampler = task(vae, condition, tiny_dit()), pipeline(vae, condition, tiny_dit())
    trainer.conditioner = replace(trainer.conditioner, image_encoder=Tokens())
    sampler = replace(sampler, image_encoder=Tokens())
    words = embed(trainer.text_encoder, training.captions)
    trained = trainer.conditions(training, trainer.encode(training), words, [False, True])
    images = [shown_frames(clip, 2) for clip in frames()]
    sampled = sampler.conditions(training.captions, SHAPE, SamplingConfig(), images)
    assert trained[0].image.shape == (4, 3)
    assert same(trained[0].image, sampled[0].image)
    assert trained[1].image.eq(0).all()
    assert trained[1].image.shape == sampled[1].image.shape
    without = sampler.conditions(training.captions, SHAPE, SamplingConfig())
    assert same(trained[1].image, without[1].image)
    assert same(trained[1].channels, without[1].channels)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a, b))


def test_cached_latents_hold_the_given_frame_of_a_causal_vae(vae):
    trainer = task(vae, CleanFrame(), tiny_dit())
    words = [{"text": torch.zeros(1, 16)}] * 2
    fresh = trainer.conditions(pack(), trainer.encode(pack()), words, [False, False])
    cached = pack(latents=[(p.mean[0], p.logvar[0]) for p in trainer.encode(pack())])
    again = trainer.conditions(cached, trainer.encode(cached), words, [False, True])
    torch.testing.assert_close(again[0].frames, fresh[0].frames, rtol=1e-5, atol=1e-6)
    assert again[1].frames is None


def test_a_sampled_video_starts_with_the_latent_of_its_image(vae):
    sampler = pipeline(vae, CleanFrame(), tiny_dit())
    image = frames()[0][:1]
    found = sampler.latents(["a", "b"], SHAPE, SamplingConfig(num_steps=2, guidance_scale=1.0), images=[image, image])
    encoded = vae.encode(image.permute(3, 0, 1, 2)[None] / 127.5 - 1).mean[0]
    assert all(torch.equal(latents[:, :1], encoded) for latents in found)
    assert not torch.equal(found[0][:, 1:], found[1][:, 1:])


# What is dropped, and what is refused


def test_a_vae_that_encodes_no_image_is_given_none(vae):
    sampler = replace(pipeline(vae, FrameChannels(), tiny_dit(condition_channels=5)), vae=OtherVAE("X", (4, 8)))
    with pytest.raises(ValueError, match=r"Kinema's VAE cannot be X, so it encodes no given image"):
        sampler.conditions(["one", "two"], SHAPE, SamplingConfig(), [torch.empty(0, 32, 48, 3), frames()[0][:1]])
    plain = replace(pipeline(vae, FrameCondition(), tiny_dit()), vae=OtherVAE("X", (4, 8)))
    for nothing in (None, [torch.empty(0, 32, 48, 3)]):
        (condition,) = plain.conditions(["one"], SHAPE, SamplingConfig(), nothing)
        assert condition.channels is None


def test_images_are_dropped_at_the_declared_rate_and_not_with_the_captions():
    dropped = [CleanFrame(dropout=0.3).is_dropped(seed) for seed in range(10_000)]
    assert abs(sum(dropped) / 10_000 - 0.3) < 3 * (0.3 * 0.7 / 10_000) ** 0.5
    assert not any(CleanFrame(dropout=0.0).is_dropped(seed) for seed in range(100))
    assert CleanFrame().of_images([], ClipSize((9, 16, 24), (4, 3, 2, 3), 4), encode=lambda video: video) == Given()


def test_impossible_rates_and_numbers_of_images_are_refused():
    with pytest.raises(ValueError, match=r"condition\.dropout=1"):
        CleanFrame(dropout=1.0)
    with pytest.raises(ValueError, match=r"1 image\(s\) given: these weights were trained with 0"):
        FrameCondition().check_images(1)
    with pytest.raises(ValueError, match=r"always given 1 image.*image=picture\.png"):
        CleanFrame(dropout=0.0).check_images(0)
    CleanFrame().check_images(0)
    CleanFrame().check_images(1)


def test_a_model_that_cannot_take_the_condition_is_refused():
    with pytest.raises(ValueError, match=r"Type model\.condition_channels=0"):
        check_condition(CleanFrame(), DiTConfig(condition_channels=5), VAEConfig(**VAE))
    with pytest.raises(ValueError, match="puts 2 into a token"):
        check_condition(CleanFrame(), DiTConfig(patch_size=[2, 2, 2]), VAEConfig(**VAE))


def test_a_distilled_model_is_told_its_guidance_in_training_too(vae):
    trainer = task(vae, CleanFrame(), tiny_dit(guidance=True))
    training = pack()
    words = embed(trainer.text_encoder, training.captions)
    told = trainer.conditions(training, trainer.encode(training), words, [False, True])
    assert extras_of(told).guidance == [6.0, 6.0]
    sampler, config = pipeline(vae, CleanFrame(), trainer.denoiser.model), SamplingConfig(embedded_guidance=6.0)
    assert extras_of(sampler.conditions(training.captions, SHAPE, config)).guidance == [6.0, 6.0]
    with torch.no_grad():
        trainer.denoiser([torch.zeros(4, 3, 2, 4)] * 2, torch.tensor([0.2, 0.5]), told)
    check_embedded_guidance(6.0, trainer.denoiser.model.config)
    with pytest.raises(ValueError, match=r"embedded_guidance=None and model\.guidance=True.*such as 6"):
        check_embedded_guidance(None, trainer.denoiser.model.config)


def test_every_clip_is_told_the_numbers_that_the_model_reads():
    assert numbers_told(DiTConfig(), 8.0, None) == {}
    assert numbers_told(DiTConfig(rope_fps=24.0, ofs_channels=16), 8.0, None) == {"fps": 8.0, "ofs": 2.0}
    assert numbers_told(DiTConfig(guidance=True), 8.0, 6.0) == {"guidance": 6.0}


def test_clips_of_which_nothing_is_left_and_caches_without_the_image_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 64, 64\], of which condition=clean_frame gives every frame"):
        check_training(CleanFrame(), DataConfig(shapes=[[17, 64, 64], [1, 64, 64]]), VAEConfig(**VAE))
    cached = DataConfig(latents="cache")
    check_training(CleanFrame(), cached, VAEConfig(**VAE))
    with pytest.raises(ValueError, match=r"data\.latents=cache: vae\.norm=group .* data\.latents=null"):
        check_training(CleanFrame(), cached, VAEConfig(**VAE, norm=Norm.group, norm_groups=4))
