"""From the bytes of a video or an image to frames, in a process that may fail."""
