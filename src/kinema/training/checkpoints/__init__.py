"""Checkpoints: written while training goes on, read under any layout, kept at an address."""
