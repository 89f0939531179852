"""The libraries that decode video, each behind the same small interface."""
