"""`kinema checkpoint ...`: what people do with the checkpoints of a run."""
