"""Mount paths of a manifest on this machine."""

from __future__ import annotations

import json

import pytest

from diptych.errors import ConfigError
from diptych.mounts import resolve

MOUNTS = json.dumps([["/models/Qwen3-32B/", "/home/me/demo"], ["/models", "/data"], ["/models/Qwen3-32B/lora", "/l"]])


def test_unset_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIPTYCH_MOUNTS", raising=False)
    assert resolve("/models/Qwen3-32B/") == "/models/Qwen3-32B/"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/models/Qwen3-32B", "/home/me/demo"),
        ("/models/Qwen3-32B/", "/home/me/demo"),
        ("/models//Qwen3-32B/./config.json", "/home/me/demo/config.json"),
        ("/models/Qwen3-32B/lora/a", "/l/a"),
        ("/models/Qwen3-32B/../other/x", "/data/other/x"),
        ("/models/Qwen3-32Bx", "/data/Qwen3-32Bx"),
        ("/model", "/model"),
        ("/models/../etc/x", "/models/../etc/x"),
        ("models/Qwen3-32B", "models/Qwen3-32B"),
    ],
)
def test_the_longest_mount_wins(path: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_MOUNTS", MOUNTS)
    assert resolve(path) == expected


def test_a_mount_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_MOUNTS", '[["/", "/base"]]')
    assert resolve("/a/b") == "/base/a/b"


def test_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_MOUNTS", "{}")
    with pytest.raises(ConfigError, match="DIPTYCH_MOUNTS must be a JSON list"):
        resolve("/a")
