"""Processes of a group that nobody keeps any more. They are known by the hosts file in their environment."""

from __future__ import annotations

import contextlib

import psutil

from diptych.group.local.paths import GroupFolder


def find_strays(folder: GroupFolder, pod_ip: str = "") -> list[psutil.Process]:
    """Processes of this user that run in the group's pods, or in the pod with that address."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or is somebody else's
            environment = process.environ()
            if environment.get("DIPTYCH_HOSTS") == str(folder.hosts) and pod_ip in ("", environment["DIPTYCH_POD_IP"]):
                found.append(process)
    return found


def kill_strays(folder: GroupFolder, pod_ip: str = "") -> None:
    """Kills them and waits until they are gone."""
    strays = find_strays(folder, pod_ip)
    for process in strays:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(strays, timeout=5)


def end_strays(folder: GroupFolder, grace_s: float) -> int:
    """For a dead supervisor's pods: their keepers end them, and have `grace_s` for it. Returns how many there were."""
    strays = find_strays(folder)
    psutil.wait_procs(strays, timeout=grace_s)
    kill_strays(folder)
    return len(strays)
