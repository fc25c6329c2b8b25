"""silu(gate) * value: the gate of an MLP and of a gated memory unit."""
