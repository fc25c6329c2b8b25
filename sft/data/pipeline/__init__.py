"""From sources to a stage's rows: steps that run shard by shard, in processes or on Ray, and account for every row."""
