"""From a stage's sources to the rows it trains on: a row goes from read/ to pack/, once."""
