"""Shards, decoding, geometry and the plan: from files on disk to packs of clips."""
