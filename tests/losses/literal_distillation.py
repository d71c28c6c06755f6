"""Structural distillation once more: NumPy loops in double precision, and SAMs of random features.

Nothing of the loss is shared with the package.
"""

import math

import numpy as np
import torch

from s4m_d2.sam.backend import EncodedImages, SamBackend

CHANNELS = 5


class RandomSam(SamBackend):
    """Random features that depend on the image (its mean value is its number) and on the point.

    They are not frozen: whoever uses them has to keep gradients from them.

    Args:
        grid_side: S.
        pads: resize the long side to the frame and pad, as SAM does; otherwise stretch the image.
        prompt_dependent: False takes the point's influence away.
    """

    device = torch.device("cpu")

    def __init__(self, grid_side=6, *, pads, prompt_dependent=True, seed=99):
        self.grid_side = grid_side
        self.image_side = 8 * grid_side
        self.pads = pads
        rng = np.random.default_rng(seed)
        self.base = torch.from_numpy(rng.normal(size=(8, CHANNELS, grid_side, grid_side)))
        tilt = prompt_dependent * rng.normal(size=(2, CHANNELS, grid_side, grid_side))
        self.tilt = torch.from_numpy(tilt)
        self.base.requires_grad_()
        self.tilt.requires_grad_()
        self.largest_call = 0

    def features(self, image_number, x, y):
        """(C, S, S) float64 image tokens of one image after a click at (x, y)."""
        return self.base[image_number] + x * self.tilt[0] + y * self.tilt[1]

    def encode(self, images, image_sizes):
        numbers = images.mean(dim=(1, 2, 3)).round().long()
        return EncodedImages(numbers, list(image_sizes))

    def prompt(self, *args, **options):
        raise NotImplementedError("distillation asks for no masks")

    def prompted_features(self, encoded, points):
        self.largest_call = max(self.largest_call, sum(map(len, points)))
        return [
            torch.stack([self.features(number, *click) for click in clicks.tolist()]).float()
            for number, clicks in zip(encoded.embeddings.tolist(), points, strict=True)
        ]

    def grid_scale(self, image_size):
        if not self.pads:
            return 1.0, 1.0
        height, width = (
            math.floor(side * self.image_side / max(image_size) + 0.5) for side in image_size
        )
        return width / self.image_side, height / self.image_side

    upscale = prompt


def interpolate(cells, x, y):
    """Bilinear value of (C, h, w) cells at (x, y), in cells from the upper left corner.

    Cell (i, j) has its center at (j + ½, i + ½); beyond the outermost centers the values go on
    unchanged.
    """
    _, height, width = cells.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    value = np.zeros(len(cells))
    for row in range(height):
        for column in range(width):
            weight = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
            value += weight * cells[:, row, column]
    return value


def cosine(a, b):
    return (a @ b) / math.sqrt((a @ a) * (b @ b))


def cosines(cells, place):
    """Of (C, h, w) cells, row by row, to the value at (x, y), in cells."""
    there = interpolate(cells, *place)
    return [cosine(there, cell) for cell in cells.reshape(len(cells), -1).T]


def huber(difference, delta):
    size = abs(difference)
    return 0.5 * size**2 if size <= delta else delta * (size - 0.5 * delta)


def content_of_grid(backend, size):
    """(rows, columns) of the cells whose centers lie on content: they begin at the upper left."""
    side = backend.grid_side
    scale_x, scale_y = backend.grid_scale(size)
    rows = sum((cell + 0.5) / side < scale_y for cell in range(side))
    return rows, sum((cell + 0.5) / side < scale_x for cell in range(side))


def teacher_on_grid(backend, mask_features, size, padded_size):
    """The teacher's (C, h, w) mask features where the centers of the grid's content cells lie.

    Only cells of the mask features that hold content are read.
    """
    side = backend.grid_side
    scale_x, scale_y = backend.grid_scale(size)
    stride_y = padded_size[0] / mask_features.shape[1]
    stride_x = padded_size[1] / mask_features.shape[2]
    shown = mask_features[:, : math.ceil(size[0] / stride_y), : math.ceil(size[1] / stride_x)]
    rows, columns = content_of_grid(backend, size)
    resized = np.zeros((len(mask_features), rows, columns))
    for row in range(rows):
        for column in range(columns):
            y = (row + 0.5) / side / scale_y * size[0]  # pixels of the content
            x = (column + 0.5) / side / scale_x * size[1]
            resized[:, row, column] = interpolate(shown, x / stride_x, y / stride_y)
    return resized


def image_loss(backend, number, mask_features, size, padded_size, points, delta):
    """Mean over points i and content cells j of Huber(C_SAM[i, j] - C_T[i, j])."""
    side = backend.grid_side
    scale_x, scale_y = backend.grid_scale(size)
    rows, columns = content_of_grid(backend, size)
    if not rows or not columns:
        return 0.0
    teacher = teacher_on_grid(backend, mask_features, size, padded_size)
    terms = []
    for x, y in points:  # each alone prompts SAM
        sam = backend.features(number, x, y)[:, :rows, :columns].detach().numpy()
        place = x * scale_x * side, y * scale_y * side  # the point on the grid
        pairs = zip(cosines(sam, place), cosines(teacher, place), strict=True)
        terms += [huber(c_sam - c_teacher, delta) for c_sam, c_teacher in pairs]
    return sum(terms) / len(terms)


def distillation_loss(backend, mask_features, sizes, padded_size, points, delta=1.0):
    """Mean over the images; ``mask_features`` (B, C, h, w), ``points`` (x, y) of each image."""
    losses = [
        image_loss(backend, number, features, size, padded_size, its_points, delta)
        for number, (features, size, its_points) in enumerate(
            zip(mask_features, sizes, points, strict=True)
        )
    ]
    return sum(losses) / len(losses)
