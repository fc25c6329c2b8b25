"""Prepared data shown: on the terminal, as a page, row by row."""
