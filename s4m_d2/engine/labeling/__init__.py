"""Pseudo-labels: their protocol, how they are made, how good they are."""
