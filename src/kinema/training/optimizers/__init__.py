"""Optimisers, and learning rates over the steps."""
