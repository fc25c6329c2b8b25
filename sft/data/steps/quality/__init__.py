"""The step `quality`."""
