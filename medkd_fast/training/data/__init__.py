"""Data sets: what is on disk, what is wrong with it, prepared volumes, splits by patient, and batches."""
