"""Deformable sampling on a GPU: Triton kernels, compiled when they are first used.

One program does a few sums, a sum being one head of one query; queries are in order, so that
neighbors read the same cells. All arithmetic and accumulation is in float32, whatever the dtypes,
which may be mixed. The backward adds to the values' gradient atomically, in no fixed order; where
``torch.are_deterministic_algorithms_enabled()`` the backward is that of ``deform_attn_plain``,
whose sorted sums are the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from s4m_d2.layers.deform_attn_plain import gradients
from s4m_d2.transfers import to_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS = 1024  # that a program accumulates: sums times channels
_WARPS = 4


@triton.jit
def _own_part(sums, queries, cells, heads, channels, block: tl.constexpr, tile: tl.constexpr):
    """The program's sums, which exist, their first row of values; channels, and which exist."""
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < sums
    start = index // (queries * heads) * cells * heads + index % heads
    channel = tl.arange(0, tile)[None, :]
    return index, inside, start, channel, channel < channels


@triton.jit
def _lookup(table, locations, weights, sample, level, start, heads, inside):
    """Upper left cell, fractions, weight, the level's size and first row, for each sum's sample."""
    height = tl.load(table + 3 * level)
    width = tl.load(table + 3 * level + 1)
    first = start + tl.load(table + 3 * level + 2) * heads
    x = tl.load(locations + 2 * sample, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(locations + 2 * sample + 1, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + sample, mask=inside, other=0.0).to(tl.float32)
    keep: tl.constexpr = tl.PropagateNan.ALL
    # What is clamped looks at cells outside only; a cell's number stays in an int's range.
    x = tl.minimum(tl.maximum(x * width - 0.5, -2.0, keep), width.to(tl.float32), keep)
    y = tl.minimum(tl.maximum(y * height - 0.5, -2.0, keep), height.to(tl.float32), keep)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, weight, width, height, first


@triton.jit
def _row(column, line, width, height, first, heads, inside):
    """Row of the values' (cells · heads, channels) for each sum's cell, and whether it exists."""
    found = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
    return first + (line * width + column) * heads, found


@triton.jit
def _forward_kernel(
    table,
    value,
    locations,
    weights,
    output,
    sums,
    queries,
    cells,
    heads,
    channels,
    levels: tl.constexpr,
    points: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
):
    index, inside, start, channel, exists = _own_part(
        sums, queries, cells, heads, channels, block, tile
    )
    total = tl.zeros((block, tile), dtype=tl.float32)
    for number in range(levels * points):
        sample = index * (levels * points) + number
        left, top, x, y, weight, width, height, first = _lookup(
            table, locations, weights, sample, number // points, start, heads, inside
        )
        for lower in tl.static_range(2):
            for right in tl.static_range(2):
                factor = weight * (x if right else 1 - x) * (y if lower else 1 - y)
                row, found = _row(left + right, top + lower, width, height, first, heads, inside)
                where = row[:, None] * channels + channel
                cell = tl.load(value + where, mask=found[:, None] & exists, other=0.0)
                total += factor[:, None] * cell.to(tl.float32)
    where = index[:, None] * channels + channel
    tl.store(output + where, total.to(output.dtype.element_ty), mask=inside[:, None] & exists)


@triton.jit
def _backward_kernel(
    table,
    value,
    locations,
    weights,
    grad_output,
    grad_value,
    grad_locations,
    grad_weights,
    sums,
    queries,
    cells,
    heads,
    channels,
    levels: tl.constexpr,
    points: tl.constexpr,
    block: tl.constexpr,
    tile: tl.constexpr,
):
    index, inside, start, channel, exists = _own_part(
        sums, queries, cells, heads, channels, block, tile
    )
    where = index[:, None] * channels + channel
    grad = tl.load(grad_output + where, mask=inside[:, None] & exists, other=0.0).to(tl.float32)
    for number in range(levels * points):
        sample = index * (levels * points) + number
        left, top, x, y, weight, width, height, first = _lookup(
            table, locations, weights, sample, number // points, start, heads, inside
        )
        along_x = tl.zeros((block,), dtype=tl.float32)
        along_y = tl.zeros((block,), dtype=tl.float32)
        along_weight = tl.zeros((block,), dtype=tl.float32)
        for lower in tl.static_range(2):
            for right in tl.static_range(2):
                of_x, of_y = x if right else 1 - x, y if lower else 1 - y
                row, found = _row(left + right, top + lower, width, height, first, heads, inside)
                where, mask = row[:, None] * channels + channel, found[:, None] & exists
                cell = tl.load(value + where, mask=mask, other=0.0).to(tl.float32)
                product = tl.sum(cell * grad, axis=1)
                along_x += product * of_y * (2 * right - 1)
                along_y += product * of_x * (2 * lower - 1)
                along_weight += product * of_x * of_y
                part = (weight * of_x * of_y)[:, None] * grad
                tl.atomic_add(grad_value + where, part, mask, sem="relaxed")
        kind = grad_locations.dtype.element_ty
        tl.store(grad_locations + 2 * sample, (along_x * weight * width).to(kind), inside)
        tl.store(grad_locations + 2 * sample + 1, (along_y * weight * height).to(kind), inside)
        tl.store(grad_weights + sample, along_weight.to(grad_weights.dtype.element_ty), inside)


def _launch(kernel, level_sizes, value: Tensor, locations: Tensor, *tensors: Tensor) -> None:
    sizes, first = [], 0
    for height, width in level_sizes:
        sizes.append([height, width, first])
        first += height * width
    batch, queries, heads, levels, points, _ = locations.shape
    channels = value.shape[-1]
    sums, tile = batch * queries * heads, triton.next_power_of_2(channels)
    block = max(1, _ELEMENTS // tile)
    table = to_device(sizes, value.device, torch.int32)
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(sums, block),)](
            *(table, value, locations, *tensors),
            *(sums, queries, value.shape[1], heads, channels),
            **dict(levels=levels, points=points, block=block, tile=tile, num_warps=_WARPS),
        )


class TritonDeformableSampling(torch.autograd.Function):
    """``deformable_sampling`` of tensors on a GPU whose dtypes are in ``DTYPES``."""

    @staticmethod
    def forward(ctx, value, level_sizes, locations, weights):
        """(B, Q, heads · C) for the arguments of ``deformable_sampling``."""
        value, locations, weights = (x.contiguous() for x in (value, locations, weights))
        ctx.save_for_backward(value, locations, weights)
        ctx.level_sizes = level_sizes
        batch, queries, heads = locations.shape[:3]
        output = value.new_empty(batch, queries, heads * value.shape[-1])
        if output.numel():
            _launch(_forward_kernel, level_sizes, value, locations, weights, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        """Gradients of values, locations and weights, each in its own dtype."""
        inputs = value, locations, weights = ctx.saved_tensors
        if torch.are_deterministic_algorithms_enabled():
            singles = [x.float() for x in (*inputs, grad_output)]
            grads = gradients(singles[0], ctx.level_sizes, *singles[1:])
        else:
            kinds = torch.float32, locations.dtype, weights.dtype
            grads = [torch.zeros_like(x, dtype=kind) for x, kind in zip(inputs, kinds, strict=True)]
            if grad_output.numel():
                tensors = *inputs[1:], grad_output.contiguous(), *grads
                _launch(_backward_kernel, ctx.level_sizes, value, *tensors)
        of_value, *others = (grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
        return of_value, None, *others
