"""What keeps a run alive, or ends it by name: signals, hangs, slow ranks, numbers that are not sound."""
