"""Where payloads lie in a shared-memory ring: pure bookkeeping, no memory."""

from __future__ import annotations

_ALIGN = 64


class RingSpace:
    """Hands out contiguous pieces of `size` bytes, taken back in the order in which they were given."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._head = 0  # bytes ever given
        self._tail = 0  # bytes ever taken back

    @property
    def used(self) -> int:
        return self._head - self._tail

    def alloc(self, num_bytes: int) -> tuple[int, int] | None:
        """(offset, how many bytes to take back later), or None while there is no room for `num_bytes` in one piece."""
        need = -(-num_bytes // _ALIGN) * _ALIGN
        if self.used == 0:
            self._head = self._tail = 0  # start over at the front: a quiet ring touches little memory
        offset = self._head % self.size
        skipped = 0 if offset + need <= self.size else self.size - offset
        if self.used + skipped + need > self.size:
            return None
        self._head += skipped + need
        return (0 if skipped else offset), skipped + need

    def take_back(self, num_bytes: int) -> None:
        """Raises ValueError for more than is out."""
        if num_bytes > self.used:
            raise ValueError("more was given back than is out")
        self._tail += num_bytes
