"""What a run will take before anything is loaded: memory of a rank, time, disk; from shapes alone and without torch."""
