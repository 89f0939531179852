"""Conditions of a clip: frozen text encoders, and which captions are dropped in training."""
