"""Device memory that the ranks of a host have of one another, by the CUDA driver's inter-process handles.

Memory of a device that this process does not see (CUDA_VISIBLE_DEVICES) can be opened too; what cannot be is memory of
another host, and of a GPU that this one has no way to. (CUDA driver API: cuIpcGetMemHandle, cuIpcOpenMemHandle.)
"""

from __future__ import annotations

import ctypes
import logging

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

log = logging.getLogger(__name__)

LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
BLOCK = 2 << 20  # bytes: what is smaller lies in a block with other allocations, which a handle would give away too


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which travels as it is."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _Bytes:
    """Memory as torch takes it from others (Numba's "CUDA Array Interface", version 3)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


def bytes_at(address: int, num_bytes: int) -> torch.Tensor:
    """Memory of the current device as a tensor, which does not keep it."""
    return torch.as_tensor(_Bytes(address, num_bytes), device="cuda")


def share_memory(group: ProcessGroup, num_bytes: int) -> list[int] | None:
    """`num_bytes` of zeroed memory on each rank's device: where each rank's is in this process, by rank.

    None, on every rank, if one of them cannot reach another's. A collective of an NCCL `group`; the current device is
    used. The memory is held until the process ends, as others may write to it until they have ended.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()  # makes the device's context current in this thread
    driver, addresses = ctypes.CDLL("libcuda.so.1"), [0] * group.size()
    num_bytes = -(-num_bytes // BLOCK) * BLOCK
    handle, mine = _Handle(), ctypes.c_uint64()
    made = (
        _done(driver.cuMemAlloc_v2(ctypes.byref(mine), ctypes.c_size_t(num_bytes)), "cuMemAlloc")
        and _done(driver.cuMemsetD8_v2(mine, ctypes.c_ubyte(0), ctypes.c_size_t(num_bytes)), "cuMemsetD8")
        and _done(driver.cuIpcGetMemHandle(ctypes.byref(handle), mine), "cuIpcGetMemHandle")
    )
    torch.cuda.synchronize()
    told = torch.tensor([made, *handle.reserved], dtype=torch.uint8, device=device)
    heard = told.new_empty(group.size(), len(told))
    dist.all_gather_into_tensor(heard, told, group=group)
    for rank, (there, *reserved) in enumerate(heard.tolist()):
        opened, address = bool(there), mine
        if rank != group.rank() and there:
            theirs, address = _Handle((ctypes.c_ubyte * 64)(*reserved)), ctypes.c_uint64()
            code = driver.cuIpcOpenMemHandle_v2(ctypes.byref(address), theirs, ctypes.c_uint(LAZY_PEER_ACCESS))
            opened = _done(code, f"cuIpcOpenMemHandle of rank {rank}")
        made, addresses[rank] = made and opened, address.value
    all_made = torch.tensor([int(made)], dtype=torch.int32, device=device)
    dist.all_reduce(all_made, dist.ReduceOp.MIN, group=group)
    return addresses if all_made.item() else None


def _done(code: int, call: str) -> bool:
    if code:
        log.warning("%s failed with CUDA error %d", call, code)
    return code == 0
