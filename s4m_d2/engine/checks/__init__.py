"""Checks before the first iteration: all that is wrong, in one report."""
