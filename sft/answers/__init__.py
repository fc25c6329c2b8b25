"""What a final answer is, and whether it is right: the one judge of training data and of models."""
