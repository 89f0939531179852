"""Noise schedules, objectives, solvers and guidance: formulas on lists of clips over any callable model."""
