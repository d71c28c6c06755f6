"""Swin, slow and literal, with Mask2Former's parameter names (Liu et al., ICCV 2021)."""

import torch
from torch.nn import functional as F


def swin_shapes(channels, depths, heads, window):
    """Parameter name -> shape."""
    shapes = {"patch_embed.proj.weight": (channels, 3, 4, 4), "patch_embed.proj.bias": (channels,)}
    norms = {"patch_embed.norm": channels}
    for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        size = channels * 2**stage
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            table = ((2 * window - 1) ** 2, count)
            shapes[f"{prefix}.attn.relative_position_bias_table"] = table
            for name, outputs, inputs in (
                ("attn.qkv", 3 * size, size),
                ("attn.proj", size, size),
                ("mlp.fc1", 4 * size, size),
                ("mlp.fc2", size, 4 * size),
            ):
                shapes[f"{prefix}.{name}.weight"] = (outputs, inputs)
                shapes[f"{prefix}.{name}.bias"] = (outputs,)
            norms |= {f"{prefix}.norm1": size, f"{prefix}.norm2": size}
        if stage < len(depths) - 1:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * size, 4 * size)
            norms[f"layers.{stage}.downsample.norm"] = 4 * size
        norms[f"norm{stage}"] = size
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes


def random_swin_weights(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in swin_shapes(*sizes).items()
    }


class Swin:
    """Maps of one image (3, H, W), each (H_i, W_i, C_i), after the norm of its stage."""

    def __init__(self, weights, depths, heads, window):
        self.weights, self.depths, self.heads, self.window = weights, depths, heads, window

    def __call__(self, image):
        w = self.weights
        x = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
        x = self.norm(x.permute(1, 2, 0), "patch_embed.norm")
        maps = []
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                x = self.block(x, f"layers.{stage}.blocks.{block}", self.heads[stage], block % 2)
            maps.append(self.norm(x, f"norm{stage}"))
            if stage < len(self.depths) - 1:
                x = self.merge(x, f"layers.{stage}.downsample")
        return maps

    def norm(self, x, name):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        deviation = x - x.mean(-1, keepdim=True)
        return deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def block(self, x, name, heads, shifted):
        x = x + self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attn", heads, shifted)
        hidden = F.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self.linear(hidden, f"{name}.mlp.fc2")

    def attention(self, x, name, heads, shifted):
        """Every token attends to those of its window and region, zeros of the padding included."""
        height, width, channels = x.shape
        window, shift = self.window, self.window // 2 if shifted else 0
        padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        size = padded.shape[:2]
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        places, keys = [], []
        for index, side in ((rows, size[0]), (columns, size[1])):
            place = ((index - shift) % side).flatten()  # after the cyclic shift
            region = (place >= side - window).int() + (place >= side - shift).int()
            places.append(place)
            keys += [place // window, region if shifted else torch.zeros_like(region)]
        keys = torch.stack(keys, dim=-1)
        together = (keys[:, None] == keys[None]).all(-1)
        reach = window - 1
        offsets = [(p[:, None] - p[None]).clamp(-reach, reach) + reach for p in places]
        table = self.weights[f"{name}.relative_position_bias_table"]
        bias = table[offsets[0] * (2 * window - 1) + offsets[1]]
        tokens = self.linear(padded.flatten(0, 1), f"{name}.qkv")
        query, key, value = tokens.unflatten(-1, (3, heads, -1)).unbind(1)
        scores = torch.einsum("qhc,khc->qkh", query, key) * query.shape[-1] ** -0.5 + bias
        scores = scores.masked_fill(~together[..., None], -torch.inf).softmax(dim=1)
        out = torch.einsum("qkh,khc->qhc", scores, value).flatten(1)
        return self.linear(out, f"{name}.proj").view(*size, channels)[:height, :width]

    def merge(self, x, name):
        height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        parts = [x[row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        merged = self.norm(torch.cat(parts, dim=-1), f"{name}.norm")
        return merged @ self.weights[f"{name}.reduction.weight"].T
