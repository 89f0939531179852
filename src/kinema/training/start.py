"""What must fit before a run starts from the weights of another, or goes on."""

from typing import Any

from kinema.training.checkpoints.save import sets_in
from kinema.training.checkpoints.store import Checkpoint, CheckpointError
from kinema.training.ema import EMA


def check_goes_on(found: Checkpoint) -> None:
    """Refuse weights alone (of `kinema checkpoint convert --weights-only`, or `average`): CheckpointError."""
    if not (found.folder / "training.json").exists():
        raise CheckpointError(
            f"{found.folder} holds weights only, and no run can go on from it. Start a new one from them: another "
            f"name, and init_from={found.folder}."
        )


def check_averages(found: Checkpoint, wanted: EMA) -> None:
    """Refuse averages that the run has not kept from its first step on (`ema.power`)."""
    held = sets_in(found)
    if missing := sorted(wanted.averages.keys() - held):
        raise ValueError(
            f"ema.power={wanted.config.power}: {found.folder} holds no {', '.join(missing)}, and an average begins "
            "with its run. Leave those lengths out, or start a new run from these weights: another name, and "
            f"init_from={found.folder}."
        )


def check_same_data(found: Checkpoint, now: str) -> None:
    """Refuse to go on in other data: the state of a plan says how far it went, and not in which clips.

    `now` is the hash of the data set as it is.
    """
    then = found.document("manifest")["data"]["hash"]
    if then != now:
        raise ValueError(
            f"data.path: the data set has changed since {found.folder.name}, from hash {then[:12]} to {now[:12]}, so "
            "that the run's plan would show other clips. Bring the old one back (data.rights takes clips out of it), "
            "or start a new run from these weights: another name, and init_from."
        )


def check_same_vae(source: Checkpoint, identity: dict[str, Any], *, allow_other: bool) -> str | None:
    """Refuse to start a denoiser in the latents of another VAE than it knows; returns what people should be told.

    `identity` is the VAE's of this run, as `load_vae` gives it. Imports without their VAE cannot say which it was.
    """
    trained = source.document("manifest").get("vae", {}).get("hash")
    if trained is None:
        return f"init_from={source.folder}: it does not say which VAE it was trained with, so that nothing checks this"
    if trained == identity["hash"]:
        return None
    both = f"the VAE of init_from={source.folder} has hash {trained}, that of vae.path has {identity['hash']}"
    if allow_other:
        return f"{both}: allowed by allow_other_vae=true, the weights must learn new latents"
    raise ValueError(
        f"{both}: weights trained in the latents of one mean nothing in those of another. Type vae.path="
        f"{source.folder.parent.parent / 'vae'}, or allow_other_vae=true to train on regardless."
    )
