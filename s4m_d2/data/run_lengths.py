"""Masks as run lengths, decoded only where they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RunLengths:
    """A mask in COCO's order: down the columns, from the left on.

    Attributes:
        lengths: (R,) int64, of a background run, a run of the mask, and so on; they add up to the
            mask's area. Any may be 0.
        height: of the mask, at least 1.
    """

    lengths: np.ndarray
    height: int

    def bounds(self) -> tuple[slice, slice]:
        """Rows and columns that hold all set pixels; the rows may be more than that."""
        ends = self.lengths.cumsum()[1::2]
        lengths = self.lengths[1::2]
        first, last = (ends - lengths)[lengths > 0], ends[lengths > 0] - 1
        if not len(first):
            return slice(0, 0), slice(0, 0)
        left, right = first // self.height, last // self.height
        columns = slice(int(left[0]), int(right[-1]) + 1)
        if (left != right).any():  # a run goes on in the next column, from its top
            return slice(0, self.height), columns
        top, bottom = (first % self.height).min(), (last % self.height).max()
        return slice(int(top), int(bottom) + 1), columns

    def columns(self, start: int, stop: int) -> np.ndarray:
        """(H, stop - start) bool: these columns of the mask."""
        begin, end = start * self.height, stop * self.height
        edges = self.lengths.cumsum().clip(begin, end)
        is_set = np.arange(len(edges)) % 2 == 1
        return np.repeat(is_set, np.diff(edges, prepend=begin)).reshape(-1, self.height).T
