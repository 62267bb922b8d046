"""Copies into other GPUs' memory by the copy engine: they take no processor from the kernels they run beside."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_size_t, c_uint, c_uint32, c_uint64, c_void_p

import torch
from torch import Tensor

from diptych.errors import EngineBroken

_CALLS = {
    "cuMemcpyDtoDAsync_v2": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuStreamWriteValue32_v2": [c_void_p, c_uint64, c_uint32, c_uint],
}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in _CALLS.items():
        getattr(library, name).argtypes = arguments
    return library


def _call(name: str, *arguments: object) -> None:
    if code := getattr(_library(), name)(*arguments):
        raise EngineBroken(f"a copy to another GPU failed: {name} returned CUDA error {code}")


class PeerCopies:
    """Copies on a stream of their own, one after the other. Addresses are of this process (see share_memory)."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def send(self, source: Tensor, to: int, flag: int, number: int) -> None:
        """Once all that the current stream was given so far is done: copy `source`, contiguous, to the address `to`,
        then write `number` (32 bits) to the address `flag`. Nothing waits for it: `source` must stay as it is until
        then. Raises EngineBroken.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        stream = self._stream.cuda_stream
        _call("cuMemcpyDtoDAsync_v2", to, source.data_ptr(), source.nbytes, stream)
        _call("cuStreamWriteValue32_v2", stream, flag, number & 0xFFFFFFFF, 0)  # after a fence: the copy is seen first
