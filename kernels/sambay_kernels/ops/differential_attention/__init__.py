"""Differential attention: two softmax maps of one pair of heads, subtracted."""
