"""The next token of each of many sequences, greedy or sampled."""
