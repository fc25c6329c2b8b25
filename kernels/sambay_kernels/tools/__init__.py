"""Commands for developers: compilation of every GPU kernel without a GPU."""
