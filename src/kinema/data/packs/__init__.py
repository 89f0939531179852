"""From a step of the plan to packs of clips, in worker processes."""
