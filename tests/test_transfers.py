"""Copies between host and device."""

import numpy as np
import pytest
import torch

from s4m_d2.transfers import to_device, to_host

TENSORS = [
    torch.tensor([[True, False, True]]),
    torch.tensor(2.5, dtype=torch.float64),
    torch.zeros(0, 3, dtype=torch.int64),
    torch.arange(5, dtype=torch.uint8)[::2],
    torch.tensor([-1, 1 << 40]),
    torch.tensor([1.5], requires_grad=True),
]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_every_tensor_comes_back_as_it_was(device):
    arrays = to_host(*(tensor.to(device) for tensor in TENSORS))
    for array, tensor in zip(arrays, TENSORS, strict=True):
        expected = tensor.detach().numpy()
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_what_the_host_knows_becomes_a_tensor():
    for values, dtype, expected in (
        ([[1, 2]], torch.float32, torch.tensor([[1.0, 2.0]])),
        (np.array([True, False]), None, torch.tensor([True, False])),
        (torch.tensor([3, 4]), None, torch.tensor([3, 4])),
        ([], torch.int64, torch.zeros(0, dtype=torch.int64)),
    ):
        torch.testing.assert_close(to_device(values, "cpu", dtype), expected, rtol=0, atol=0)
