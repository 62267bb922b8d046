"""Manifests as files: YAML documents, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from diptych.errors import ConfigError


def read_text(file: str) -> str:
    """Raises ConfigError for a file that cannot be read."""
    try:
        return Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None


def documents(text: str) -> list[Any]:
    """The documents that are not empty. Raises ConfigError."""
    try:
        # a SafeLoader: plain data only
        return [each for each in yaml.load_all(text, Loader=_Loader) if each is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"the manifest is no valid YAML: {line}{getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise ConfigError("the manifest is no valid YAML: it is nested too deeply") from None
    except ValueError as error:  # a date or number in form, but not in value
        raise ConfigError(f"the manifest is no valid YAML: {error}") from None


def identity(document: Any) -> tuple[str, str]:
    """(kind, name) of a document; kind is empty if this is no Kubernetes object."""
    if not isinstance(document, dict) or not isinstance(document.get("apiVersion"), str):
        return "", ""
    metadata = document.get("metadata")
    name = metadata.get("name", "") if isinstance(metadata, dict) else ""
    return str(document.get("kind") or ""), str(name)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (the second would silently win) and text no process can be given."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise yaml.constructor.ConstructorError(
                None, None, "text must not contain a NUL character", node.start_mark
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is written twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
