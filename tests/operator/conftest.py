from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from driver import Driver
from kube_world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """An API server without operators, over HTTP."""
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def driver() -> Iterator[Driver]:
    """An operator driven by hand. Whatever the test did, the operator comes to rest and then writes nothing."""
    made = Driver()
    yield made
    made.checks.clear()
    made.run(700, tick_s=10.0)
    assert made.rests(), made.api.writes[-10:]
