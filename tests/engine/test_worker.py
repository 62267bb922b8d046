"""How a rank starts: its GPU, and its last words when it cannot."""

from __future__ import annotations

import socket
import threading

import pytest

from diptych.config import ServerConfig
from diptych.engine import worker


def test_a_rank_that_cannot_load_lets_rank_0_say_why() -> None:
    """Rank 0 has most likely the same reason, and is the one that is heard."""
    rank_0, ours = socket.socketpair()
    with ours:
        spec = worker.Spec(ServerConfig(model_path="m", tp_size=2), 1, "", ours.fileno())
        failing = threading.Thread(target=worker.report_failure, args=(spec, "no such model"))
        with rank_0:
            failing.start()
            failing.join(0.2)
            assert failing.is_alive()
        failing.join(worker.LAST_WORDS_S - 1)
        assert not failing.is_alive()


@pytest.mark.parametrize(
    ("listed", "there", "tp", "taken"),
    [
        (None, 4, 2, ["0", "1"]),  # a container of Kubernetes
        (None, 1, 2, ["0", "0"]),
        ("5,7", 8, 2, ["5", "7"]),
        ("5,7", 8, 1, ["5,7"]),
        (None, 8, 1, [None]),
        (None, 0, 2, [None, None]),
        ("", 8, 2, ["", ""]),  # no GPU is wanted
    ],
)
def test_each_rank_of_several_has_a_gpu_of_its_own(
    listed: str | None, there: int, tp: int, taken: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.torch.cuda, "device_count", lambda: there)
    for rank, gpu in enumerate(taken):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed or "")
        if listed is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        worker.take_gpu(worker.Spec(ServerConfig(model_path="m", tp_size=tp), rank, "", 0))
        assert worker.os.environ.get("CUDA_VISIBLE_DEVICES") == gpu
