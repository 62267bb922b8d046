from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kube_world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """An API server without operators."""
    made = World(tmp_path)
    yield made
    made.close()
