"""A whole decoding step of a SambaY model: the next tokens of many sequences, whose states live in slots."""
