"""A recipe from start to end: the chain of stages and what the run leaves behind."""
