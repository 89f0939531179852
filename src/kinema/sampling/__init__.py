"""Sampling: from a checkpoint and captions to video files. The trainer's samples come from here too."""
