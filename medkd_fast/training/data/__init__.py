"""Data sets: what is on disk, what is wrong with it, prepared volumes, splits by patient, and batches."""

# what runs, reports and pictures still take from here
import importlib.util

from medkd_fast.training.data.slices import (
    CLASSES,
    NUM_CLASSES,
    Slices,
    Split,
    demo_paths,
    demo_slices,
    hold_out,
    load_slices,
    resample_in_plane,
    to_classes,
)

__all__ = [
    "CLASSES",
    "NUM_CLASSES",
    "Slices",
    "Split",
    "demo_paths",
    "demo_slices",
    "hold_out",
    "importlib",
    "load_slices",
    "resample_in_plane",
    "to_classes",
]
