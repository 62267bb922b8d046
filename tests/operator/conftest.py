from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_place import REAL, Place, our_place, real_place
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


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Place]:
    """A namespace, on our API server or on a real cluster, whose operator does not run yet."""
    with real_place() if REAL else our_place(tmp_path) as made:
        yield made


@pytest.fixture
def place(idle: Place) -> Place:
    """A namespace with an operator."""
    idle.start()
    return idle
