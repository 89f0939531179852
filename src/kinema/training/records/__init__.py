"""What a run writes down beside its checkpoints."""
