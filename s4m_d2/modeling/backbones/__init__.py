"""Backbones of timm, which is imported only where one is built."""
