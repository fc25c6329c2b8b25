"""How fast answers come: the engine beside transformers' `generate`, and beside a transformer of the same size."""
