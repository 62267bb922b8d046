"""The machine a figure was taken on. Never its name, addresses or paths."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("diptych", "torch", "transformers", "aiohttp", "uvloop", "numpy", "tokenizers")


def describe_machine() -> dict[str, Any]:
    """CPU model, usable cores, memory, GPUs, operating system, Python and package versions, date (UTC)."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The model name as Linux has it, else what the platform calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def usable_cores() -> float:
    """Cores this process may run on: its affinity, and its cgroup's quota where that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # the tool without a driver behind it
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_HIDDEN = ("host", "hostname", "addr", "address", "url", "ip", "key", "secret", "path", "dir", "file")


def without_places(value: Any) -> Any:
    """What a server says, without what names its machine: hosts, addresses, keys; of a path the last part stays."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items() if _may_show(key, item)}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rpartition("/")[2]
    return value


def _may_show(key: str, item: Any) -> bool:
    hidden = str(key).lower().rpartition("_")[2] in _HIDDEN
    return not hidden or (isinstance(item, str) and str(key).endswith("_path"))
