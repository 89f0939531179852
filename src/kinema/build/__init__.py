"""Putting a run together: each function reads like its list of parts. Nothing is computed here."""

from kinema.build.dit import build_dit
from kinema.build.run import start_run
from kinema.build.vae import build_vae

__all__ = ["build_dit", "build_vae", "start_run"]
