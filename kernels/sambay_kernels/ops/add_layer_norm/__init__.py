"""LayerNorm of a residual stream, with the addition before it."""
