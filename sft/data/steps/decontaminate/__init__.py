"""The step `decontaminate`."""
