"""What a run will take: memory of a rank, time and disk, from shapes and without torch."""
