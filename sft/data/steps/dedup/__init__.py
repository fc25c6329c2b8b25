"""The step `dedup`."""
