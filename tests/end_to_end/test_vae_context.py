"""`train.py` with the VAE's clips cut over two ranks takes the steps of one rank."""

import pytest
import torch

from kinema.training.checkpoints.store import Checkpoint
from tests.end_to_end.commands import checkpoint, records, vae_command
from tests.end_to_end.runs import run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STEPS = 3
LOSSES = ["task.loss.perceptual=0.5", "task.loss.adversarial=0.1", "task.loss.discriminator_width=8",
          "task.crop=[5,32,32]", "data.shapes=[[9,32,32],[5,48,32]]"]  # fmt: skip


def test_a_vae_on_two_ranks_of_one_group_follows_one_rank(folder):
    """Losses, gradient norms and weights, with every term of the loss, the discriminator's weights too."""
    model = [*LOSSES, "vae.norm=group", "vae.norm_groups=4", "vae.mid_attention=true", "data.num_workers=0"]
    for name, ranks, extra in (("vae_alone", 1, []), ("vae_together", 2, ["sequence_degree=2", "zero_stage=2"])):
        options = [*model, *[f"parallel.{key}" for key in extra]]
        answer = run(*vae_command(folder, name, STEPS, *options), ranks=ranks)
    assert "a clip of 9x32x32 is cut along height 2 + 2 latents" in answer.stdout
    for kind in ("train", "validation"):
        one, two = records(folder, "vae_alone", kind), records(folder, "vae_together", kind)
        assert one.keys() == two.keys() != set()
        compared = {"loss", "grad_norm", "psnr", "tokens", "term_adversarial", "term_discriminator"} & one[STEPS].keys()
        assert compared
        for step, record in one.items():
            assert {key: two[step][key] for key in compared} == pytest.approx(
                {key: record[key] for key in compared}, rel=1e-4
            )
    for part in ("model", "ema", "optimizer"):  # the last holds the discriminator too
        ours, theirs = (
            Checkpoint(checkpoint(folder, name, STEPS)).tensors(part) for name in ("vae_together", "vae_alone")
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
