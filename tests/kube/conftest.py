"""Servers on a manual and on the real clock, and the official client connected to the former."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kube_clients import Clients, connect

from diptych.testing.kube import Cluster, KubeServer


@pytest.fixture
def server() -> Iterator[KubeServer]:
    with KubeServer(Cluster(clock="manual")) as running:
        yield running


@pytest.fixture
def live() -> Iterator[KubeServer]:
    """On the real clock: its controllers act by themselves."""
    with KubeServer(Cluster()) as running:
        yield running


@pytest.fixture
def clients(server: KubeServer, tmp_path: Path) -> Iterator[Clients]:
    connected = connect(server, tmp_path)
    yield connected
    connected.api.close()
