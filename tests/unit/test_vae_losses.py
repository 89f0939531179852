"""The VAE's losses: every configured term is there and teaches; perceptual networks; the discriminator."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kinema.models.vae import (
    CausalVAE,
    DiscriminatorNorm,
    PatchDiscriminator,
    Perceptual,
    Posterior,
    VAEConfig,
    VAELoss,
    VAELossConfig,
    psnr,
)
from kinema.models.vae import perceptual as perceptual_module
from kinema.models.vae.discriminator import hinge_discriminator_loss, hinge_generator_loss
from kinema.models.vae.perceptual import PyramidDistance, feature_distance

OFF = {"reconstruction": 0.0, "kl": 0.0}
TERMS = {
    "reconstruction": {"reconstruction": 2.0, "kl": 0.0},
    "squared": {**OFF, "squared": 2.0},
    "kl": {"reconstruction": 0.0, "kl": 2.0},
    "perceptual": {**OFF, "perceptual": 2.0},
    "adversarial": {**OFF, "adversarial": 2.0, "discriminator_width": 8},
}


def videos(frames: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(2, 3, frames, 16, 24) * 2 - 1, torch.rand(2, 3, frames, 16, 24) * 2 - 1


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_is_reported_and_moves_the_vae_on_the_first_step(term):
    torch.manual_seed(0)
    vae = CausalVAE(VAEConfig(latent_channels=5, width=8, decoder_width=8))
    loss = VAELoss(VAELossConfig(**TERMS[term]))
    video, _ = videos()
    reconstruction, posterior = vae(video, torch.randn(2, 5, 2, 2, 3))
    total, terms = loss.generator_loss(video, reconstruction, posterior, step=0)
    assert list(terms) == [term]
    assert total.shape == terms[term].shape == (2,)
    torch.testing.assert_close(total.detach(), 2 * terms[term])
    total.sum().backward()
    assert vae.encoder.output.linear.conv.weight.grad.abs().max() > 0


def test_all_terms_together_are_their_weighted_sum_and_a_weight_of_zero_builds_nothing():
    config = VAELossConfig(
        reconstruction=1.0, squared=0.5, kl=0.25, perceptual=2.0, adversarial=3.0, discriminator_width=8
    )
    video, reconstruction = videos()
    posterior = Posterior(torch.randn(2, 5, 2, 2, 3), torch.randn(2, 5, 2, 2, 3))
    total, terms = VAELoss(config).generator_loss(video, reconstruction, posterior, step=0)
    assert set(terms) == set(TERMS)
    torch.testing.assert_close(total.detach(), sum(getattr(config, name) * value for name, value in terms.items()))
    torch.testing.assert_close(terms["reconstruction"], (video - reconstruction).abs().mean((1, 2, 3, 4)))
    torch.testing.assert_close(terms["squared"], (video - reconstruction).square().mean((1, 2, 3, 4)))

    plain = VAELoss(VAELossConfig())
    assert plain.perceptual is None
    assert plain.discriminator is None
    assert list(plain.parameters()) == []
    assert not plain.adversarial_runs(0)


def test_a_clip_has_the_same_loss_alone_and_in_a_batch():
    loss = VAELoss(VAELossConfig(squared=1.0, perceptual=1.0, adversarial=1.0, discriminator_width=8)).double()
    video, reconstruction = (v.double() for v in videos())
    posterior = Posterior(*torch.randn(2, 2, 5, 2, 2, 3, dtype=torch.float64))
    together, _ = loss.generator_loss(video, reconstruction, posterior, step=0)
    for i in range(2):
        one = slice(i, i + 1)
        alone, _ = loss.generator_loss(
            video[one], reconstruction[one], Posterior(posterior.mean[one], posterior.logvar[one]), step=0
        )
        torch.testing.assert_close(alone, together[one])


@pytest.mark.parametrize("norm", DiscriminatorNorm)
@pytest.mark.parametrize("frames", [1, 5])
def test_the_discriminator_learns_from_its_own_loss_only(norm, frames):
    torch.manual_seed(0)
    loss = VAELoss(VAELossConfig(**OFF, adversarial=1.0, discriminator_width=8, discriminator_norm=norm))
    assert loss.discriminator is not None
    video, reconstruction = videos(frames)
    reconstruction.requires_grad_()
    posterior = Posterior(torch.zeros(2, 5, 1, 2, 3), torch.zeros(2, 5, 1, 2, 3))

    loss.generator_loss(video, reconstruction, posterior, step=0)[0].sum().backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in loss.discriminator.parameters())

    reconstruction.grad = None
    value, terms = loss.discriminator_loss(video, reconstruction, step=0)
    assert value.shape == (2,)
    assert set(terms) == {"discriminator"}
    value.sum().backward()
    assert reconstruction.grad is None
    dead = [n for n, p in loss.discriminator.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # While all logits are small, real and fake pull the output's bias equally.
    assert [n for n in dead if loss.discriminator.get_parameter(n).shape != (1,)] == []


def test_the_discriminator_tells_noise_from_stripes_after_a_few_steps():
    torch.manual_seed(0)
    judge = PatchDiscriminator(8, 2, DiscriminatorNorm.group)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    real = torch.sin(torch.arange(24) * 0.8).expand(2, 3, 5, 16, 24)
    fake = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    losses = []
    for _ in range(40):
        loss = hinge_discriminator_loss(judge(real), judge(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8
    assert losses[-1] < 0.2


def test_adversarial_terms_are_zero_before_their_start_step_but_reported():
    config = VAELossConfig(adversarial=1.0, adversarial_start_step=10, discriminator_width=8)
    loss = VAELoss(config)
    video, reconstruction = videos()
    posterior = Posterior(torch.zeros(2, 5, 2, 2, 3), torch.zeros(2, 5, 2, 2, 3))
    for step, runs in ((9, False), (10, True)):
        assert loss.adversarial_runs(step) is runs
        _, generator = loss.generator_loss(video, reconstruction, posterior, step)
        _, discriminator = loss.discriminator_loss(video, reconstruction, step)
        assert (generator["adversarial"].abs().sum() > 0) == runs
        assert (discriminator["discriminator"].abs().sum() > 0) == runs


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.5]])
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), torch.tensor([0.5 * (0.25 + 0.75)]))
    torch.testing.assert_close(hinge_generator_loss(fake), torch.tensor([1.25]))


def test_the_pyramid_sees_edges_and_motion_but_no_constant_shift():
    distance = PyramidDistance()
    video, other = videos()
    assert distance(video, video).tolist() == [0.0, 0.0]
    torch.testing.assert_close(distance(video * 0.5 + 0.3, video * 0.5), torch.zeros(2), rtol=0, atol=1e-6)
    assert (distance(other, video) > 0.1).all()
    flicker = video.clone()
    flicker[:, :, ::2] += 0.2  # flat in space: only the temporal difference sees it
    torch.testing.assert_close(distance(flicker, video), torch.full((2,), 0.2))
    assert distance(video[:, :, :1], other[:, :, :1]).isfinite().all()


@pytest.fixture(
    params=[(Perceptual.vgg16, "safetensors"), (Perceptual.mobilenet_v2, "pth")], ids=["vgg16", "mobilenet"]
)
def features_file(request, tmp_path):
    """A state dict of random weights in torchvision's format, with a classifier on top."""
    return write_features(tmp_path, *request.param)


def write_features(tmp_path, kind, suffix):
    torch.manual_seed(0)
    tensors = perceptual_module._NETWORKS[kind]().state_dict()
    tensors |= {"classifier.0.weight": torch.zeros(2, 2)}
    path = tmp_path / f"weights.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    return kind, str(path), tensors


def test_network_layouts_are_torchvisions():
    """Names and shapes of the published state dicts, which were written down from their documentation."""
    vgg = perceptual_module._NETWORKS[Perceptual.vgg16]().state_dict()
    assert [int(k.split(".")[1]) for k in vgg if k.endswith("weight")] == [
        0,
        2,
        5,
        7,
        10,
        12,
        14,
        17,
        19,
        21,
        24,
        26,
        28,
    ]
    assert sum(t.numel() for t in vgg.values()) == 14_714_688
    mobile = perceptual_module._NETWORKS[Perceptual.mobilenet_v2]()
    assert sum(p.numel() for p in mobile.parameters()) == 2_223_872
    shapes = {key: tuple(value.shape) for key, value in mobile.state_dict().items()}
    assert shapes["features.0.0.weight"] == (32, 3, 3, 3)
    assert shapes["features.1.conv.1.weight"] == (16, 32, 1, 1)
    assert shapes["features.2.conv.1.0.weight"] == (96, 1, 3, 3)
    assert shapes["features.17.conv.3.running_var"] == (320,)
    assert shapes["features.18.0.weight"] == (1280, 320, 1, 1)


def test_feature_distance_is_zero_at_the_target_and_has_gradient_elsewhere(features_file):
    kind, path, _ = features_file
    config = VAELossConfig(**OFF, perceptual=1.0, perceptual_kind=kind, perceptual_weights=path)
    loss = VAELoss(config).train()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    video, reconstruction = videos(1)
    video, reconstruction = (F.interpolate(v[:, :, 0], (32, 40))[:, :, None] for v in (video, reconstruction))
    reconstruction.requires_grad_()
    posterior = Posterior(torch.zeros(2, 5, 1, 2, 3), torch.zeros(2, 5, 1, 2, 3))
    total, terms = loss.generator_loss(video, reconstruction, posterior, step=0)
    assert (terms["perceptual"] > 1e-3).all()
    total.sum().backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().max() > 0
    assert loss.generator_loss(video, video, posterior, step=0)[0].abs().max() < 1e-6
    assert not any(p.requires_grad for p in loss.parameters())
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())  # no batch norm moved


def test_vgg_features_equal_the_layers_written_out(tmp_path):
    kind, path, tensors = write_features(tmp_path, Perceptual.vgg16, "safetensors")
    distance = feature_distance(kind, path)
    x = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    features = ((x[:, :, 0] + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    for i in (0, 2):
        features = F.relu(F.conv2d(features, tensors[f"features.{i}.weight"], tensors[f"features.{i}.bias"], padding=1))
    torch.testing.assert_close(distance.stages[0](distance._prepare(x)), features)


def test_files_that_are_no_such_network_are_refused(features_file, tmp_path):
    kind, path, tensors = features_file
    other = Perceptual.vgg16 if kind is Perceptual.mobilenet_v2 else Perceptual.mobilenet_v2
    with pytest.raises(ValueError, match=f"is no {other.value} state dict"):
        feature_distance(other, path)
    del tensors["features.0.weight" if kind is Perceptual.vgg16 else "features.0.0.weight"]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="1 tensors missing"):
        feature_distance(kind, str(tmp_path / "part.safetensors"))
    with pytest.raises(ValueError, match="does not exist"):
        feature_distance(kind, str(tmp_path / "none.pth"))


def test_loading_weights_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        feature_distance(Perceptual.vgg16, str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl": -1.0}, "vae_loss.kl=-1.0 must not be negative"),
        ({"perceptual": 1.0, "perceptual_kind": Perceptual.vgg16}, "needs vae_loss.perceptual_weights"),
        ({"perceptual_weights": "x.pth"}, "would not be used"),
        ({"discriminator_layers": 0}, "vae_loss.discriminator_layers=0"),
    ],
)
def test_impossible_losses_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VAELossConfig(**settings)


def test_psnr_of_a_known_error():
    video = torch.zeros(2, 3, 4, 8, 8)
    reconstruction = video.clone()
    reconstruction[1, :, 2] = 0.2  # a tenth of the range: 20 dB
    reconstruction[1, :, 3] = 5.0  # clamped to 1: half the range
    found = psnr(reconstruction, video)
    assert found.shape == (2, 4)
    torch.testing.assert_close(found[1, 2:], torch.tensor([20.0, 6.0206]))
    assert found[0, 0] >= 100
