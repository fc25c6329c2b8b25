"""A section's plan, carried out shard by shard in processes or on Ray, with an account of every row."""
