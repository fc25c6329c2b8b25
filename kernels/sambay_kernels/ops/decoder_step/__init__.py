"""A whole decoding step of a SambaY model: one token of each of many sequences, whose states live in slots."""
