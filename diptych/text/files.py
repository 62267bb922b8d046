"""The small JSON and text files of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from diptych import mounts
from diptych.errors import ConfigError

MAX_FILE_BYTES = 64 << 20  # tokenizer.json of the largest vocabularies is about 20 MB


def folder(path: str) -> Path:
    """The model folder behind `path`. Raises ConfigError, with the path as the user wrote it, when there is none."""
    found = Path(mounts.resolve(path))
    if not found.is_dir():
        raise ConfigError(
            f"{path} is no folder; give one with config.json, *.safetensors and tokenizer.json (nothing is downloaded)"
        )
    return found


def read_text(path: Path) -> str | None:
    """The file's text, or None when it does not exist. Raises ConfigError when it is unreadable or too large."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path.name} has more than {MAX_FILE_BYTES >> 20} MB")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path.name}: {type(error).__name__}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The file's JSON object, {} when the file does not exist. Raises ConfigError when it holds something else."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path.name} is not a JSON object: {error}") from None
