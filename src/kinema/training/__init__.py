"""The loop and its state: tasks, optimiser, schedule, EMA, checkpoints, metrics."""
