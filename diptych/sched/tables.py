"""The page tables of the sequences that hold pages, as rows of one array, from which a plan picks its own at once."""

from __future__ import annotations

import numpy as np

from diptych.types import I32

FIRST_ROWS = 16


class PageTables:
    """`array[row]` holds the pages of one sequence, then zeros. `width`: most pages of a sequence.

    The array is another one after `take`: no views of it are kept.
    """

    def __init__(self, width: int) -> None:
        self.array: I32 = np.zeros((FIRST_ROWS, width), np.int32)
        self._free = list(range(FIRST_ROWS))

    def take(self) -> int:
        """A row of zeros."""
        if not self._free:
            num_rows = len(self.array)
            self.array = np.concatenate([self.array, np.zeros_like(self.array)])
            self._free = list(range(num_rows, 2 * num_rows))
        return self._free.pop()

    def give_back(self, row: int, num_pages: int) -> None:
        """Nobody uses this row any more, of which `num_pages` were filled."""
        self.array[row, :num_pages] = 0
        self._free.append(row)
