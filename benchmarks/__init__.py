"""Kinema beside the reference library, in one run and with the same weights."""
