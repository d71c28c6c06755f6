"""Pseudo-labels: protocol of the model, labeling, the gate, and quality."""
