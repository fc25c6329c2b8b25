"""What a run will take before anything is loaded: memory of a rank, time and disk, from shapes alone and without torch."""
