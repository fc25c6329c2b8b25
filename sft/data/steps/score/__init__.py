"""The step `score`."""
