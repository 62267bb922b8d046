"""A server on a manual clock, and the official client connected to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kubernetes import client, config

from diptych.testing.kube import Cluster, KubeServer


@dataclass
class Clients:
    core: client.CoreV1Api
    apps: client.AppsV1Api
    custom: client.CustomObjectsApi
    api: client.ApiClient


@pytest.fixture
def server() -> Iterator[KubeServer]:
    with KubeServer(Cluster(clock="manual")) as running:
        yield running


@pytest.fixture
def live() -> Iterator[KubeServer]:
    """On the real clock: its controllers act by themselves."""
    with KubeServer(Cluster()) as running:
        yield running


def connect(server: KubeServer, folder: Path) -> Clients:
    api = config.new_client_from_config(str(server.kubeconfig(folder / "kubeconfig")))
    api.configuration.retries = False
    return Clients(client.CoreV1Api(api), client.AppsV1Api(api), client.CustomObjectsApi(api), api)


@pytest.fixture
def clients(server: KubeServer, tmp_path: Path) -> Iterator[Clients]:
    connected = connect(server, tmp_path)
    yield connected
    connected.api.close()
