"""Matrices in files onto a device, by several threads at once: disk or page cache, pinned memory, device.

One thread copies from the page cache at a few GB/s and a GPU takes 50, so threads read while others send. Each reads
whole rows, in pieces that fit its buffer, and what a rank wants of their columns is selected on the device.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diptych.errors import ConfigError

THREADS = 8
PIECE_BYTES = 32 << 20  # of pinned memory a thread
REPORT_S = 2.0
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Matrix:
    """`rows` of `columns` numbers, one after the other from `offset` of a file on."""

    path: Path
    offset: int
    rows: int
    columns: int
    dtype: torch.dtype

    def take(self, start: int, stop: int) -> Matrix:
        """Rows [start, stop)."""
        offset = self.offset + start * self.row_bytes
        return Matrix(self.path, offset, stop - start, self.columns, self.dtype)

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes


class Uploader:
    """Copies that `put` begins and `finish` waits for. `progress` hears every two seconds how far they are."""

    def __init__(self, device: str, progress: Callable[[str], None]) -> None:
        self._device, self._progress = torch.device(device), progress
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="weights")
        self._local = threading.local()
        self._files: dict[Path, int] = {}
        self._copies: dict[Future[None], int] = {}  # and their bytes
        self._started = time.monotonic()

    def put(self, matrix: Matrix, columns: slice, out: Tensor) -> None:
        """Fill `out` `[rows, selected columns]` on the device, of any type. Raises ConfigError if the file is gone."""
        if matrix.path not in self._files:
            try:
                self._files[matrix.path] = os.open(matrix.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ConfigError(f"{matrix.path.name} cannot be read: {error.strerror}") from None
        ready = None
        if self._device.type == "cuda":  # `out` may be memory that the caller's stream still uses
            ready = torch.cuda.Event()
            ready.record()
        height = max(1, PIECE_BYTES // matrix.row_bytes)
        for start in range(0, matrix.rows, height):
            piece = matrix.take(start, min(start + height, matrix.rows))
            part = out[start : start + piece.rows]
            self._copies[self._threads.submit(self._copy, piece, columns, part, ready)] = piece.num_bytes

    def finish(self) -> None:
        """Wait until all is there. Raises ConfigError if a file cannot be read to its end."""
        left = set(self._copies)
        try:
            while left:
                done, left = wait(left, REPORT_S, FIRST_EXCEPTION)
                for copy in done:
                    copy.result()
                self._report(sum(self._copies[copy] for copy in left))
        finally:
            self._threads.shutdown(cancel_futures=True)
            for file in self._files.values():
                os.close(file)
            self._files.clear()
            self._copies.clear()

    def _report(self, left: int) -> None:
        total, elapsed_s = sum(self._copies.values()), time.monotonic() - self._started
        done = (total - left) / GIB
        self._progress(f"weights: {done:.1f} of {total / GIB:.1f} GiB, {done / max(elapsed_s, 1e-3):.1f} GiB/s")

    @torch.inference_mode()  # which is a thread's own; the tensors were made in it
    def _copy(self, piece: Matrix, columns: slice, out: Tensor, ready: torch.cuda.Event | None) -> None:
        host = self._read(piece)
        if ready is None:
            _place(host, piece, columns, out)
            return
        stream: torch.cuda.Stream = self._local.stream
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            _place(host.to(self._device, non_blocking=True), piece, columns, out)
        stream.synchronize()  # the buffer is free again, and finish knows

    def _read(self, piece: Matrix) -> Tensor:
        """The piece's bytes, in this thread's buffer."""
        if not hasattr(self._local, "buffer"):
            cuda = self._device.type == "cuda"
            self._local.buffer = torch.empty(0, dtype=torch.uint8)
            self._local.stream = torch.cuda.Stream(self._device) if cuda else None
        if self._local.buffer.numel() < piece.num_bytes:
            size = max(PIECE_BYTES, piece.num_bytes)
            self._local.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._local.stream is not None)
        host: Tensor = self._local.buffer[: piece.num_bytes]
        memory, done = host.numpy().data, 0
        while done < piece.num_bytes:
            try:
                count = os.preadv(self._files[piece.path], [memory[done:]], piece.offset + done)
            except OSError as error:
                raise ConfigError(f"{piece.path.name} cannot be read: {error.strerror}") from None
            if not count:
                raise ConfigError(f"{piece.path.name} ends before its last tensor; copy it here again")
            done += count
        return host


def _place(data: Tensor, piece: Matrix, columns: slice, out: Tensor) -> None:
    out.copy_(data.view(piece.dtype).view(piece.rows, piece.columns)[:, columns])
