"""A Kubernetes API server for tests: in memory, over real HTTP, with the controllers that an operator relies on."""

from diptych.testing.kube.api import Api
from diptych.testing.kube.cluster import Cluster
from diptych.testing.kube.deletion import Deleting
from diptych.testing.kube.faults import Faults
from diptych.testing.kube.kubelet import Behaviour
from diptych.testing.kube.record import Request
from diptych.testing.kube.server import KubeServer
from diptych.testing.kube.status import ApiError

__all__ = ["Api", "ApiError", "Behaviour", "Cluster", "Deleting", "Faults", "KubeServer", "Request"]
