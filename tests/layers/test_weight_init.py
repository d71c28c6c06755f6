"""Initial weights against fvcore's formula."""

import warnings

import torch
from torch import nn

from s4m_d2.layers import xavier_fill


def test_the_fill_is_that_of_mask2formers_heads():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore.nn scripts functions on import
        from fvcore.nn.weight_init import c2_xavier_fill
    ours, theirs = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        xavier_fill(ours)
        torch.manual_seed(0)
        c2_xavier_fill(theirs)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, torch.zeros(4))
    bound = (3 / (6 * 3 * 3)) ** 0.5
    assert 0.9 * bound < ours.weight.abs().max() <= bound
