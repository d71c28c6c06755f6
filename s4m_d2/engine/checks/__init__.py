"""Checks before training: all problems in one report."""
