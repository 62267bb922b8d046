"""GPUs of this machine, handed out to pods through CUDA_VISIBLE_DEVICES. Without torch."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path


def find_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES: those our own one has, else all that nvidia-smi or /proc shows."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [each.strip() for each in allowed.split(",") if each.strip() not in ("", "-1", "NoDevFiles")]
    return [str(index) for index in range(_count())]


def _count() -> int:
    tool = shutil.which("nvidia-smi")
    if tool:
        try:
            listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
            return len(re.findall(r"^GPU \d+:", listing, re.MULTILINE))
        except (subprocess.SubprocessError, OSError):
            pass  # a driver that does not answer: the kernel's own list decides
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


class GpuPool:
    """Which pod has which GPU. An abstract Unix socket holds a device, so two groups never hand out the same one."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self._held: dict[str, dict[str, socket.socket]] = {}

    def take(self, pod: str, count: int) -> list[str] | None:
        """`count` devices for `pod`, those it has already if it has them; None (and none held) if too few are free."""
        if pod not in self._held:
            held: dict[str, socket.socket] = {}
            for device in self.devices:
                if len(held) < count:
                    hold = _hold(device)
                    if hold is not None:
                        held[device] = hold
            self._held[pod] = held
            if len(held) < count:
                self.give_back(pod)
                return None
        return list(self._held[pod])

    def give_back(self, pod: str) -> None:
        for hold in self._held.pop(pod, {}).values():
            hold.close()


def _hold(device: str) -> socket.socket | None:
    hold = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        hold.bind(f"\0diptych/gpu/{device}")
    except OSError:
        hold.close()
        return None
    return hold
