"""What may be used, what was shown, what was damaged."""
