"""What must fit before a run starts from the weights of another."""

from typing import Any

from kinema.training.checkpoint import Checkpoint


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
