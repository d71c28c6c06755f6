"""Figures of a model: during training and later."""
