"""How a rank starts: its GPU, what the collector is spared, and its last words when it cannot."""

from __future__ import annotations

import socket
import threading

import pytest

from diptych.config import ServerConfig
from diptych.engine import load, worker
from diptych.errors import ConfigError


def test_a_rank_that_cannot_load_lets_rank_0_say_why() -> None:
    """Rank 0 has most likely the same reason, and is the one that is heard."""
    rank_0, ours = socket.socketpair()
    with ours:
        spec = load.Spec(ServerConfig(model_path="m", tp_size=2), 1, "", ours.fileno())
        failing = threading.Thread(target=worker.report_failure, args=(spec, "no such model"))
        with rank_0:
            failing.start()
            failing.join(0.2)
            assert failing.is_alive()
        failing.join(worker.LAST_WORDS_S - 1)
        assert not failing.is_alive()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_loading_leaves_is_set_aside_once_before_serving(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    async def serve(*_: object) -> None:
        done.append("serve")

    monkeypatch.setattr(worker, "load", lambda spec: done.append("load"))
    monkeypatch.setattr(worker, ["lead", "follow"][rank], serve)
    monkeypatch.setattr(worker.gc, "collect", lambda: done.append("collect"))
    monkeypatch.setattr(worker.gc, "freeze", lambda: done.append("freeze"))
    assert worker.run(load.Spec(ServerConfig(model_path="m"), rank, "", 0)) == 0
    assert done == ["load", "collect", "freeze", "serve"]


@pytest.mark.parametrize(
    ("listed", "there", "base", "tp", "taken"),
    [
        (None, 4, 0, 2, ["0", "1"]),  # a container of Kubernetes
        (None, 4, 2, 2, ["2", "3"]),
        ("5,7", 8, 0, 2, ["5", "7"]),
        ("5,7", 8, 1, 1, ["7"]),
        (None, 8, 0, 1, ["0"]),
        (None, 0, 0, 2, [None, None]),
        ("", 8, 1, 2, ["", ""]),  # no GPU is wanted
    ],
)
def test_each_rank_has_a_gpu_of_its_own(
    listed: str | None, there: int, base: int, tp: int, taken: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.torch.cuda, "device_count", lambda: there)
    for rank, gpu in enumerate(taken):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed or "")
        if listed is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        config = ServerConfig(model_path="m", tp_size=tp, base_gpu_id=base)
        load.take_gpu(load.Spec(config, rank, "", 0))
        assert load.os.environ.get("CUDA_VISIBLE_DEVICES") == gpu


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_says_that_there_are_too_few_gpus(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    config = ServerConfig(model_path="m", tp_size=2, base_gpu_id=1)
    with pytest.raises(ConfigError, match=r"2 GPUs from --base-gpu-id 1 on are needed.*has 2"):
        load.take_gpu(load.Spec(config, rank, "", 0))
    on_cpu = ServerConfig(model_path="m", tp_size=4, device="cpu")
    load.take_gpu(load.Spec(on_cpu, rank, "", 0))
    assert load.os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
