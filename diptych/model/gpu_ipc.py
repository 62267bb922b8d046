"""GPU memory of another process: exported, mapped and copied from by CUDA's inter-process handles.

The driver's own interface, not torch's: torch wraps what it shares in a count of references that only torch ends, and
needs the exporting GPU to be visible here, which CUDA does not. libcuda.so.1 keeps its names over versions.

A handle names a whole allocation of the driver; torch's allocator gives out parts of those, so an offset goes with it.
Memory of expandable segments has no such handle.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

from diptych.errors import TransferError
from diptych.kv.extents import Extent

_HANDLE = struct.Struct("<64sQQ")  # the driver's handle, offset in the allocation, bytes from there to its end
_LAZY_PEER_ACCESS = 1
_NON_BLOCKING = 1  # a stream that does not wait for the default one, nor makes it wait
_DEVICE_MEMORY = 2


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = [
        ("src_x", c_size_t),
        ("src_y", c_size_t),
        ("src_type", c_int),
        ("src_host", c_void_p),
        ("src_device", c_uint64),
        ("src_array", c_void_p),
        ("src_pitch", c_size_t),
        ("dst_x", c_size_t),
        ("dst_y", c_size_t),
        ("dst_type", c_int),
        ("dst_host", c_void_p),
        ("dst_device", c_uint64),
        ("dst_array", c_void_p),
        ("dst_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    ]


_CALLS = {
    "cuDeviceGet": [c_void_p, c_int],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuMemGetAddressRange_v2": [c_void_p, c_void_p, c_uint64],
    "cuIpcGetMemHandle": [c_void_p, c_uint64],
    "cuIpcOpenMemHandle_v2": [c_void_p, _IpcHandle, c_uint],
    "cuIpcCloseMemHandle": [c_uint64],
    "cuStreamCreate": [c_void_p, c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamDestroy_v2": [c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuMemcpy2DAsync_v2": [c_void_p, c_void_p],
    "cuGetErrorName": [c_int, c_void_p],
}


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in _CALLS.items():
        getattr(library, name).argtypes = arguments
    return library


def _call(name: str, *arguments: object) -> None:
    """Raises TransferError with the driver's name for what went wrong."""
    code = getattr(_library(), name)(*arguments)
    if code:
        text = c_char_p()
        _library().cuGetErrorName(code, byref(text))
        raise TransferError(f"{name}: {(text.value or b'unknown error').decode()}")


@functools.cache
def _context(device: int) -> int:
    """The device's primary context: the one that torch uses too."""
    number, context = c_int(), c_void_p()
    _call("cuDeviceGet", byref(number), device)
    _call("cuDevicePrimaryCtxRetain", byref(context), number)
    assert context.value is not None
    return context.value


def _enter(device: int) -> None:
    """Calls of this thread are for `device` from now on."""
    _call("cuCtxSetCurrent", _context(device))


def export(device: int, address: int, num_bytes: int) -> bytes:
    """A handle for `num_bytes` of this process's memory at `address`. Raises TransferError."""
    _enter(device)
    base, size, handle = c_uint64(), c_size_t(), _IpcHandle()
    _call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
    offset = address - base.value
    if offset + num_bytes > size.value:
        raise TransferError("the pool is not one allocation (torch's expandable_segments?)")
    _call("cuIpcGetMemHandle", byref(handle), base.value)
    return _HANDLE.pack(bytes(handle.reserved), offset, size.value - offset)


class MappedPool:
    """Another process's pool as a LentPool (diptych/kv/store.py), to be copied into ours at `to`, on `device`.

    Copies run on a stream of their own. A thread that waits for one has no deadline: until the device is done, it may
    write into our pages, and whoever holds them must not give them back.
    """

    def __init__(self, device: int, to: int, handle: bytes, num_bytes: int) -> None:
        if len(handle) != _HANDLE.size:
            raise TransferError("not a handle of GPU memory")
        reserved, offset, size = _HANDLE.unpack(handle)
        if num_bytes > size:
            raise TransferError("the other side's memory is smaller than its pool")
        self._device, self._to = device, to
        self._turn = threading.Lock()
        self._closed = False
        _enter(device)
        base, stream = c_uint64(), c_void_p()
        _call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        self._stream = stream
        try:
            _call("cuIpcOpenMemHandle_v2", byref(base), _IpcHandle.from_buffer_copy(reserved), _LAZY_PEER_ACCESS)
        except TransferError:
            _call("cuStreamDestroy_v2", stream)
            raise
        self._base, self._source = base.value, base.value + offset

    def copy(self, extents: Sequence[Extent]) -> None:
        """See LentPool.copy."""
        with self._turn:
            if self._closed:
                raise TransferError("the other side's memory is not mapped any more")
            _enter(self._device)
            try:
                for extent in extents:
                    self._begin(extent)
            finally:
                _call("cuStreamSynchronize", self._stream)  # also after an error: what has begun must end

    def _begin(self, extent: Extent) -> None:
        to, source = self._to + extent.to, self._source + extent.source
        if extent.rows == 1:
            _call("cuMemcpyDtoDAsync_v2", to, source, extent.width, self._stream)
            return
        copy = _Copy2D(
            src_type=_DEVICE_MEMORY,
            src_device=source,
            src_pitch=extent.source_pitch,
            dst_type=_DEVICE_MEMORY,
            dst_device=to,
            dst_pitch=extent.to_pitch,
            width=extent.width,
            height=extent.rows,
        )
        _call("cuMemcpy2DAsync_v2", byref(copy), self._stream)

    def close(self) -> None:
        """See LentPool.close."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            _enter(self._device)
            _call("cuIpcCloseMemHandle", self._base)
            _call("cuStreamDestroy_v2", self._stream)
