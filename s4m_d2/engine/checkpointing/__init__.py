"""Checkpoints and weight files: save, load, names, safe reading."""
