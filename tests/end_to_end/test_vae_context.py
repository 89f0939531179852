"""`train.py` with the VAE's clips cut over two ranks takes the steps of one rank."""

import pytest
import safetensors.torch
import torch

from tests.end_to_end.commands import VAE, checkpoint, common, records, run, torchrun

pytestmark = pytest.mark.slow
STEPS = 3
LOSSES = ["task.loss.perceptual=0.5", "task.loss.adversarial=0.1", "task.loss.discriminator_width=8",
          "task.crop=[5,32,32]", "data.shapes=[[9,32,32],[5,48,32]]"]  # fmt: skip


def test_a_vae_on_two_ranks_of_one_group_follows_one_rank(folder):
    """Losses, gradient norms and weights, with every term of the loss, the discriminator's weights too."""
    command = [*VAE, *LOSSES, "vae.norm=group", "vae.norm_groups=4", "vae.mid_attention=true"]
    run("train.py", *common(folder, "alone", STEPS), *command)
    together = [*common(folder, "together", STEPS), *command, "parallel.sequence_degree=2", "parallel.zero_stage=2"]
    said = run(*torchrun(2), "train.py", *together).stdout
    assert "a clip of 9x32x32 is cut along height 2 + 2 latents" in said
    for kind in ("train", "validation"):
        one, two = records(folder, "alone", kind), records(folder, "together", kind)
        assert one.keys() == two.keys() != set()
        for step, record in one.items():
            for key in ("loss", "grad_norm", "psnr", "term_discriminator", "tokens"):
                assert two[step].get(key) == pytest.approx(record.get(key), rel=1e-4), (step, key)
    for part in ("model", "ema", "discriminator"):
        ours, theirs = (
            safetensors.torch.load_file(checkpoint(folder, name, STEPS) / f"{part}.safetensors")
            for name in ("together", "alone")
        )
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
