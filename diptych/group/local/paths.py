"""Where the local runner keeps what it knows: one folder a group, readable by its owner only."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path

from diptych.errors import ConfigError
from diptych.group.spec import LABEL


def state_root() -> Path:
    """`$DIPTYCH_STATE_DIR`, else `$XDG_STATE_HOME/diptych`, else `~/.local/state/diptych`; made if missing (mode 0700).

    Raises ConfigError if the folder belongs to somebody else.
    """
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    root = Path(os.environ.get("DIPTYCH_STATE_DIR") or f"{base}/diptych").expanduser().absolute()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.geteuid():
            raise ConfigError(f"the state folder {root} belongs to another user; set DIPTYCH_STATE_DIR to one of yours")
        root.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot use the state folder {root} ({error.strerror}); set DIPTYCH_STATE_DIR") from None
    return root


class GroupFolder:
    """The files of one group. Nothing is created until `create`."""

    def __init__(self, root: Path, group: str) -> None:
        if not LABEL.fullmatch(group):
            raise ConfigError(f"{group!r} is no group name (lower-case letters, digits and dashes)")
        self.group = group
        self.path = root / group
        self.state = self.path / "state.json"
        self.launch = self.path / "launch.json"
        self.hosts = self.path / "hosts"
        self.control = self.path / "control.sock"
        self.lock = self.path / "lock"
        self.logs = self.path / "logs"
        self.bin = self.path / "bin"
        self.pods = self.path / "pods"
        self.supervisor_log = self.logs / "supervisor.log"

    def create(self) -> None:
        """A clean folder for a new run: logs and state of the run before are gone. The caller holds the lock."""
        self.clear()
        for path in (self.logs, self.bin, self.pods):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for log in self.logs.glob("*.log"):
            if log != self.supervisor_log:  # a detached supervisor is writing that one
                log.unlink()

    def clear(self) -> None:
        """After a run: everything goes but the logs, which are worth reading when something failed."""
        for file in (self.state, self.launch, self.hosts, self.control):
            file.unlink(missing_ok=True)
        for folder in (self.bin, self.pods):
            shutil.rmtree(folder, ignore_errors=True)

    def take_lock(self, timeout_s: float = 1.0) -> int:
        """A file descriptor that holds the group until it is closed. Raises ConfigError if the group runs already."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout_s
        while True:
            fd = _try_lock(self.lock)
            if fd is not None:
                return fd
            if time.monotonic() > deadline:
                raise ConfigError(f"group {self.group} is already running; `diptych down {self.group}` ends it")
            time.sleep(0.02)

    def running(self) -> bool:
        """Whether a supervisor holds this group now."""
        if not self.lock.exists():
            return False
        fd = _try_lock(self.lock)
        if fd is None:
            return True
        os.close(fd)
        return False


def _try_lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def known_groups(root: Path) -> list[str]:
    """Groups that run, or whose supervisor died before it could clean up."""
    return sorted(path.parent.name for path in root.glob("*/state.json"))


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    temporary.replace(path)
