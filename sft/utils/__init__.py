"""What every part may use: atomic files, errors in one sentence, processes, quiet libraries."""
