"""What a source holds, as records: where rows come from, which column is what, and what can't be used."""
