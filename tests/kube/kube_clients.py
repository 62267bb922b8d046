"""The official client, connected to a server of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kubernetes import client, config

from diptych.testing.kube import KubeServer


@dataclass
class Clients:
    core: client.CoreV1Api
    apps: client.AppsV1Api
    custom: client.CustomObjectsApi
    api: client.ApiClient


def connect(server: KubeServer, folder: Path) -> Clients:
    api = config.new_client_from_config(str(server.kubeconfig(folder / "kubeconfig")))
    api.configuration.retries = False
    return Clients(client.CoreV1Api(api), client.AppsV1Api(api), client.CustomObjectsApi(api), api)
