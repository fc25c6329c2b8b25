"""Conversations to tokens, with the mask of what is trained."""
