"""Real processes, real sockets, the real demo model: 2 prefill servers, 1 decode server, 1 router; 1 unified server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from pd_cluster import MODEL, PDCluster, start_cluster

from diptych.testing.processes import ServerProcess


@pytest.fixture(scope="session")
def cluster() -> Iterator[PDCluster]:
    """2P1D with default settings, shared by the tests that leave it as they found it."""
    with ExitStack() as stack:
        yield start_cluster(stack)


@pytest.fixture(scope="session")
def unified() -> Iterator[ServerProcess]:
    """One server of both phases with the same settings."""
    with ServerProcess("serve", *MODEL) as server:
        yield server.wait_ready()
