"""Which clips make up each step and each lane."""
