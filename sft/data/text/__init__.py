"""What several steps know of text."""
