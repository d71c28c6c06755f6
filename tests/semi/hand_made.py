"""Masks, labels and selections by hand."""

import torch

from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.structures import PseudoLabels


def rectangle(size, top, left, height, width) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def make_selection(mask_logits, content_size=None) -> Selection:
    """Pseudo-labels of the classes 10, 11, … with the pixels of positive logits."""
    count, height, width = mask_logits.shape
    scores = torch.linspace(0.7, 1.0, count)
    labels = PseudoLabels(torch.arange(count) + 10, mask_logits > 0, scores)
    return Selection(labels, mask_logits, content_size or (height, width), {"kept": count})
