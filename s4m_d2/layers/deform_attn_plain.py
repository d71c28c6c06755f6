"""Deformable sampling in plain PyTorch: sums of table rows with a custom backward.

A bilinear look-up is a weighted sum of four rows of a table with one row of channels per cell, so
that all look-ups of a query are one sum of 4 · levels · points rows: ``embedding_bag``. Autograd's
backward of it is slow; here

- the gradients of weights and locations need the products of each row with the gradient of its sum,
  which are the elements of a dense matrix product at a sparse set of places (``sampled_addmm``);
- the gradient of the table is again a sum of rows of the gradient: look-ups are sorted by their
  upper left corner, and each of the four corners is one ``embedding_bag``. Nothing is scattered, so
  the result is deterministic.

The table has a border of two zero cells around each level, so that positions outside need no
special case. Look-ups are computed in pieces that fit a cache, and again in the backward: only the
inputs are saved.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s4m_d2.transfers import to_device

Sizes = list[tuple[int, int]]  # (H, W) of each level

_BORDER = 2  # cells around a level; a row's right border is the left one of the next row
_PIECE = 1 << 17  # look-ups that are prepared at a time


class PlainDeformableSampling(torch.autograd.Function):
    """``deformable_sampling`` of float32 or float64 tensors of one dtype, on any device."""

    @staticmethod
    def forward(ctx, value, level_sizes, locations, weights):
        """(B, Q, heads · C) for the arguments of ``deformable_sampling``."""
        ctx.save_for_backward(value, locations, weights)
        ctx.level_sizes = level_sizes
        plan = _Plan(level_sizes, locations)
        batch, queries, heads = locations.shape[:3]
        output = value.new_empty(batch, queries * heads, value.shape[-1])
        for images in plan.groups():
            table = plan.table(value[images])
            sums_of_group = output[images].view(-1, value.shape[-1])
            for _, sums, lookups in plan.pieces(locations[images], weights[images]):
                rows, factors = lookups.rows.view(-1), lookups.factors.view(-1)
                sums_of_group[sums] = _sum_rows(table, rows, lookups.starts, factors)
        return output.view(batch, queries, heads * value.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """Gradients of the values, the locations and the weights."""
        value, locations, weights = ctx.saved_tensors
        grads = gradients(value, ctx.level_sizes, locations, weights, grad_output)
        return grads[0], None, *grads[1:]


def gradients(
    value: Tensor, level_sizes: Sizes, locations: Tensor, weights: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the values, the locations and the weights, from that of the output."""
    plan = _Plan(level_sizes, locations)
    batch, queries, heads = locations.shape[:3]
    grad_output = grad_output.reshape(batch, queries * heads, value.shape[-1])
    grad_value, grad_locations, grad_weights = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (value, locations, weights)
    )
    for images in plan.groups():
        table, grad = plan.table(value[images]), grad_output[images].flatten(0, 1)
        of_locations = grad_locations[images].view(-1, *locations.shape[2:])
        of_weights = grad_weights[images].view(-1, *weights.shape[2:])
        collected = []
        for piece, sums, lookups in plan.pieces(locations[images], weights[images]):
            products = _products(table, grad[sums], lookups.rows, lookups.starts)
            plan.write_gradients(lookups, products, of_locations[piece], of_weights[piece])
            collected.append(lookups)
        plan.write_table_gradient(grad, collected, grad_value[images])
    return grad_value, grad_locations, grad_weights


class _Lookups(NamedTuple):
    rows: Tensor  # (q, heads, levels, points, 4) int32, of the table: upper left, right, lower …
    factors: Tensor  # the same shape
    fractions: Tensor  # (q, heads, levels, points, 2): (x, y) from the upper left corner
    weights: Tensor  # (q, heads, levels, points), of the attention
    starts: Tensor  # of each sum's rows, and the end of the last


class _Plan:
    """Layout of one call's table, whose rows are (image, padded cell, head).

    Small images share a table: few long operations are faster than many short ones.
    """

    def __init__(self, level_sizes: Sizes, locations: Tensor) -> None:
        self.images, self.queries, self.heads, levels, points, _ = locations.shape
        device, dtype = locations.device, locations.dtype
        self.level_sizes = level_sizes
        self.lookups_per_sum = levels * points
        self.paddeds = [(height + 2 * _BORDER, width + _BORDER) for height, width in level_sizes]
        sizes, firsts, strides, self.cells = [], [], [], 0
        for (height, width), (rows, columns) in zip(level_sizes, self.paddeds, strict=True):
            upper_left = self.cells + _BORDER * (columns + 1)
            sizes.append([[width, height]] * points)
            firsts.append([upper_left * self.heads] * points)
            strides.append([[self.heads, columns * self.heads]] * points)
            self.cells += rows * columns
        self.cells += _BORDER  # the last row has a right border too
        self.sizes = to_device(sizes, device, dtype)  # levels, points, 2
        self.strides = to_device(strides, device, torch.int32)
        heads = torch.arange(self.heads, dtype=torch.int32, device=device)
        self.firsts = to_device(firsts, device, torch.int32) + heads[:, None, None]

    def groups(self) -> Iterator[slice]:
        """Images that share a table: one, or as many as fit into one piece."""
        lookups = max(1, self.queries * self.heads * self.lookups_per_sum)
        step = max(1, _PIECE // lookups)
        return (slice(start, start + step) for start in range(0, self.images, step))

    def pieces(self, locations: Tensor, weights: Tensor) -> Iterator[tuple[slice, slice, _Lookups]]:
        """Slices of queries (image after image), the same as slices of (query, head), and their
        look-ups in the table of these images."""
        images, queries = locations.shape[:2]
        firsts, step = self.firsts, _PIECE // (self.heads * self.lookups_per_sum)
        if images > 1:  # all in one piece
            step = images * queries
            offsets = torch.arange(images, dtype=torch.int32, device=locations.device)
            offsets = offsets * (self.cells * self.heads)  # the first row of each image
            offsets = offsets.repeat_interleave(queries, output_size=step)
            firsts = firsts + offsets[:, None, None, None]
        locations, weights = locations.flatten(0, 1), weights.flatten(0, 1)
        step = max(1, step)
        for start in range(0, images * queries, step):
            piece = slice(start, start + step)
            sums = slice(start * self.heads, piece.stop * self.heads)
            yield piece, sums, self.lookups(locations[piece], weights[piece], firsts)

    def table(self, value: Tensor) -> Tensor:
        """(rows, C) of the values (images, S, heads, C) of a group of images."""
        images, channels = len(value), value.shape[-1]
        table = value.new_zeros(images, self.cells, self.heads, channels)
        for inside, level in zip(self._insides(table), self._levels(value), strict=True):
            inside.copy_(level)
        return table.view(-1, channels)

    def _levels(self, value: Tensor) -> list[Tensor]:
        parts = value.split([height * width for height, width in self.level_sizes], dim=1)
        return [part.unflatten(1, size) for part, size in zip(parts, self.level_sizes, strict=True)]

    def _insides(self, table: Tensor, up: int = 0, left: int = 0) -> list[Tensor]:
        """The levels (images, H, W, heads, C) in a table, or as many cells moved up and left."""
        parts = table[:, : self.cells - _BORDER].split([h * w for h, w in self.paddeds], dim=1)
        top, start = _BORDER - up, _BORDER - left
        return [
            part.unflatten(1, padded)[:, top : top + height, start : start + width]
            for part, padded, (height, width) in zip(
                parts, self.paddeds, self.level_sizes, strict=True
            )
        ]

    def lookups(self, locations: Tensor, weights: Tensor, firsts: Tensor) -> _Lookups:
        """Rows and factors of the look-ups of some queries; ``firsts``: rows of their levels."""
        position = locations * self.sizes
        position.sub_(0.5).clamp_(min=-_BORDER)
        torch.minimum(position, self.sizes, out=position)
        corner = position.floor()
        fractions = position.sub_(corner)  # NaN where the location is
        corner = corner.nan_to_num_(nan=-_BORDER).to(torch.int32).mul_(self.strides)
        first = (corner[..., 0] + corner[..., 1]).add_(firsts)
        right, below = self.strides.unbind(-1)
        rows = torch.empty(*weights.shape, 4, dtype=torch.int32, device=weights.device)
        factors = weights.new_empty(*weights.shape, 4)
        rows[..., 0] = first
        for index, step in enumerate((right, below, right + below), start=1):
            torch.add(first, step, out=rows[..., index])
        x, y = fractions.unbind(-1)
        lower = weights * y
        for index, row in ((0, weights - lower), (2, lower)):
            torch.mul(row, x, out=factors[..., index + 1])
            torch.sub(row, factors[..., index + 1], out=factors[..., index])
        end, size = rows.numel() + 1, 4 * self.lookups_per_sum
        starts = torch.arange(0, end, size, dtype=rows.dtype, device=rows.device)
        return _Lookups(rows, factors, fractions, weights, starts)

    def write_gradients(
        self, lookups: _Lookups, products: Tensor, grad_locations: Tensor, grad_weights: Tensor
    ) -> None:
        """Gradients from ``products`` of the rows and the gradient of their sums (as ``rows``)."""
        upper_left, upper_right, lower_left, lower_right = products.unbind(-1)
        x, y = lookups.fractions.unbind(-1)
        upper = torch.lerp(upper_left, upper_right, x)
        lower = torch.lerp(lower_left, lower_right, x)
        torch.lerp(upper, lower, y, out=grad_weights)
        along_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, y)
        torch.mul(along_x, lookups.weights, out=grad_locations[..., 0])
        torch.mul(lower.sub_(upper), lookups.weights, out=grad_locations[..., 1])
        grad_locations.mul_(self.sizes)

    def write_table_gradient(
        self, grad: Tensor, collected: list[_Lookups], grad_value: Tensor
    ) -> None:
        """Gradient (images, S, heads, C) of a group's values, from that of its sums, (…, C)."""
        if not collected:
            grad_value.zero_()
            return
        corners = torch.cat([lookups.rows[..., 0].flatten() for lookups in collected])
        factors = [lookups.factors.view(-1, 4) for lookups in collected]
        corners, order = corners.sort(stable=True)
        count = len(grad_value) * self.cells * self.heads
        rows = torch.arange(count + 1, dtype=torch.int32, device=grad.device)
        starts = torch.searchsorted(corners, rows, out_int32=True)
        sums = order.div(self.lookups_per_sum, rounding_mode="floor").to(torch.int32)
        for corner, (up, left) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            ordered = torch.cat([factor[:, corner] for factor in factors]).index_select(0, order)
            table = _sum_rows(grad, sums, starts, ordered)
            table = table.view(len(grad_value), self.cells, self.heads, -1)
            insides = self._insides(table, up, left)
            for level, part in zip(self._levels(grad_value), insides, strict=True):
                level.add_(part) if corner else level.copy_(part)


def _sum_rows(table: Tensor, rows: Tensor, starts: Tensor, factors: Tensor) -> Tensor:
    """Sums (len(starts) - 1, C) of ``table``'s rows, times factors, from each start to the next."""
    return torch.embedding_bag(
        table, rows, starts, mode=0, per_sample_weights=factors, include_last_offset=True
    )[0]


def _products(table: Tensor, grad: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """Product of each row with the gradient (sums, C) of the sum that it is part of."""
    if table.device.type != "cpu":
        found = table[rows.view(len(grad), -1).long()]
        return torch.bmm(found, grad[..., None]).view(rows.shape)
    with warnings.catch_warnings():  # CSR tensors are said to be in beta state
        warnings.filterwarnings("ignore", message="Sparse CSR")
        values, size = table.new_zeros(rows.numel()), (len(grad), len(table))
        places = torch.sparse_csr_tensor(
            starts, rows.view(-1), values, size, check_invariants=False
        )
    products = torch.sparse.sampled_addmm(places, grad, table.t(), beta=0.0)
    return products.values().view(rows.shape)
