"""Checkpoints and weights of others: save, load, names, safe reading."""
