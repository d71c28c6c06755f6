"""Deformable sampling on a GPU: Triton kernels, compiled when they are first used.

One program does a few sums, a sum being one head of one query; queries are in order, so that
neighbors read the same cells. All arithmetic and accumulation is in float32, whatever the dtypes.
The backward adds to the values' gradient atomically, in no fixed order; where
``torch.are_deterministic_algorithms_enabled()`` it leaves this gradient to the sorted sums of
``deform_attn_plain``, which are the same in every run.

Both kernels are custom operators: ``torch.compile`` keeps them as they are and needs no break in
its graph (with ``torch.compiler.disable`` every layer would be one), and autocast does not touch
them: they take mixed dtypes.
"""

# Operators' schemas are read from annotations, which old versions of torch need unquoted.
import typing

import torch
import triton
import triton.language as tl
from torch import Tensor

from s4m_d2.layers.deform_attn_plain import table_gradient
from s4m_d2.transfers import to_device

Ints = typing.List[int]  # noqa: UP006 (in a schema, torch 2.4 does not know list[int])
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
    atomic: tl.constexpr,
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
                if atomic:
                    part = (weight * of_x * of_y)[:, None] * grad
                    tl.atomic_add(grad_value + where, part, mask, sem="relaxed")
        kind = grad_locations.dtype.element_ty
        tl.store(grad_locations + 2 * sample, (along_x * weight * width).to(kind), inside)
        tl.store(grad_locations + 2 * sample + 1, (along_y * weight * height).to(kind), inside)
        tl.store(grad_weights + sample, along_weight.to(grad_weights.dtype.element_ty), inside)


def _launch(kernel, level_sizes: Ints, value, locations, weights, *tensors, **options) -> None:
    sizes, first = [], 0
    for height, width in zip(level_sizes[::2], level_sizes[1::2], strict=True):
        sizes += [height, width, first]
        first += height * width
    batch, queries, heads, levels, points, _ = locations.shape
    channels = value.shape[-1]
    sums, tile = batch * queries * heads, triton.next_power_of_2(channels)
    block = max(1, _ELEMENTS // tile)
    table = to_device(sizes, value.device, torch.int32)
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(sums, block),)](
            *(table, value, locations, weights, *tensors),
            *(sums, queries, value.shape[1], heads, channels),
            **dict(levels=levels, points=points, block=block, tile=tile, num_warps=_WARPS),
            **options,
        )


@torch.library.custom_op("s4m_d2::deformable_sampling", mutates_args=())
def sample(value: Tensor, level_sizes: Ints, locations: Tensor, weights: Tensor) -> Tensor:
    """``deformable_sampling`` of tensors whose dtypes are in ``DTYPES``.

    Args:
        value, locations, weights: as there.
        level_sizes: H and W of each level, one after the other.
    """
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    output = value.new_empty(_output_shape(value, locations))
    if output.numel():
        _launch(_forward_kernel, level_sizes, value, locations, weights, output)
    return output


@torch.library.custom_op("s4m_d2::deformable_sampling_backward", mutates_args=())
def sample_backward(
    grad_output: Tensor,
    value: Tensor,
    level_sizes: Ints,
    locations: Tensor,
    weights: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, locations and weights, each in its own dtype.

    Args:
        deterministic: use no atomic additions.
    """
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    grad_output = grad_output.contiguous()
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
    if grad_output.numel():
        grads = grad_output, grad_value, grad_locations, grad_weights
        inputs = level_sizes, value, locations, weights
        _launch(_backward_kernel, *inputs, *grads, atomic=not deterministic)
        if deterministic:
            sizes = list(zip(level_sizes[::2], level_sizes[1::2], strict=True))
            grad_value = table_gradient(
                grad_output.float(), value.shape, sizes, locations.float(), weights.float()
            )
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _output_shape(value: Tensor, locations: Tensor) -> tuple[int, int, int]:
    batch, queries, heads = locations.shape[:3]
    return batch, queries, heads * value.shape[-1]


@sample.register_fake
def _(value, level_sizes, locations, weights):
    return value.new_empty(_output_shape(value, locations))


@sample_backward.register_fake
def _(grad_output, value, level_sizes, locations, weights, deterministic):
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (value, locations, weights)
    )


def _keep(ctx, inputs, output):
    value, ctx.level_sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad_output):
    value, locations, weights = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value, grad_locations, grad_weights = sample_backward(
        grad_output, value, ctx.level_sizes, locations, weights, deterministic
    )
    return grad_value, None, grad_locations, grad_weights


sample.register_autograd(_backward, setup_context=_keep)
