"""deploy/Containerfile and the first process of a container, as far as no container tool is needed to see it."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

CONTAINERFILE = Path("deploy/Containerfile")


def instructions() -> list[list[str]]:
    """Words of each instruction; none of ours goes over more than one line."""
    return [line.split() for line in CONTAINERFILE.read_text().splitlines() if line and not line.startswith("#")]


def stages() -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for words in instructions():
        if words[0] == "FROM":
            found[words[-1]] = []
        found[list(found)[-1]].append(words)
    return found


def test_what_is_copied_is_there_and_not_ignored() -> None:
    """The ignore file shuts out everything and lets some paths in."""
    patterns = [line for line in Path(".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    copied = [
        name for words in instructions() if words[0] == "COPY" and "--from" not in words[1] for name in words[1:-1]
    ]
    assert sorted(set(copied)) == sorted(allowed)
    assert all(Path(name).exists() for name in copied)
    assert not any(fnmatch(name, pattern) for name in copied for pattern in patterns[1:] if pattern[0] != "!")


@pytest.mark.parametrize("name", ["operator", "server"])
def test_nobody_is_root_and_a_change_of_the_sources_installs_no_dependencies_again(name: str) -> None:
    words = stages()[name]
    assert ["USER", "65532:65532"] in words and ["ENTRYPOINT", '["diptych"]'] in words
    installed = next(i for i, each in enumerate(words) if each[:3] == ["RUN", "pip", "install"])
    ours = words.index(["COPY", "--from=package", "/package", "/usr/local"])
    assert installed < ours
    assert all(each[0] in ("FROM", "COPY", "ARG", "ENV", "RUN") for each in words[:installed])
    assert not any(each[:2] == ["COPY", "diptych"] for each in words)


def test_the_first_process_of_a_container_ends_on_a_sigterm_that_comes_early() -> None:
    """The kernel drops signals to process 1 that have no handler, and commands set theirs when they are imported."""
    command = "cli.main = lambda: os.kill(os.getpid(), signal.SIGTERM)"
    code = f"import os, signal; from diptych import cli; {command}; cli.entry()"
    isolated = ["unshare", "--user", "--pid", "--fork"]
    if subprocess.run([*isolated, "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("no process namespaces here")
    assert subprocess.run([*isolated, sys.executable, "-c", code], timeout=60).returncode == 143
