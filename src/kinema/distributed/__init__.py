"""Process start-up and the DeepSpeed engine: knows groups and collectives, never what the model is."""
