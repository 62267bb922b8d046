"""What a StatefulSet's controller and a kubelet do, as the local runner has it."""

from __future__ import annotations

from msgspec.structs import replace

from diptych.group.actions import Backoff, Failures, PodState, RestartPolicy, Target, Wait
from diptych.group.pods import PodAction, RestartPod, StartPod, StopPod, control, kept_revision

BACKOFF = Backoff()


def pods(text: str) -> list[PodState]:
    """`o` old, `n` new, both ready; `u` new and not ready; `x` old and exited, `X` before it was ever ready; `~` ends;
    `-` is missing."""
    return [
        PodState(
            name=f"g-a-{index}",
            index=index,
            revision="new" if letter in "nu" else "old",
            phase={"x": "exited", "X": "exited", "~": "stopping"}.get(letter, "running"),  # type: ignore[arg-type]
            ready=letter in "on",
            unproven=letter == "X",
        )
        for index, letter in enumerate(text)
        if letter != "-"
    ]


def due(
    target: Target,
    text: str,
    now: float = 0.0,
    failures: dict[str, Failures] | None = None,
    policy: RestartPolicy = "None",
) -> list[PodAction]:
    return list(control(target, "old", pods(text), now, BACKOFF, failures or {}, policy))


def test_missing_pods_start_at_once_each_with_its_revision() -> None:
    assert due(Target(3, 2, "new"), "") == [StartPod(0, "old"), StartPod(1, "old"), StartPod(2, "new")]
    assert due(Target(2, 0, "new", on_delete=True), "o-") == [StartPod(1, "new")]


def test_pods_too_many_end_the_highest_first() -> None:
    assert due(Target(1, 0, "old"), "oox~") == [StopPod(2), StopPod(1)]
    assert due(Target(0, 0, ""), "o") == [StopPod(0)]


def test_a_rolling_update_goes_one_by_one_down_to_the_partition() -> None:
    assert due(Target(4, 1, "new"), "oooo") == [StopPod(3)]
    assert due(Target(4, 1, "new"), "ooo~") == []
    assert due(Target(4, 1, "new"), "ooou") == []  # not before it is ready
    assert due(Target(4, 1, "new"), "ooon") == [StopPod(2)]
    assert due(Target(4, 1, "new"), "onnn") == []
    assert due(Target(4, 0, "new", on_delete=True), "oooo") == []


def test_what_ended_is_restarted_in_place_after_its_pause() -> None:
    target = Target(1, 0, "old")
    assert due(target, "x") == [RestartPod(0)]
    failures = {"g-a-0": Failures(3, last_at=100.0)}
    assert due(target, "x", 119.9, failures) == [Wait(120.0, "g-a-0 restarts after a pause")]
    assert due(target, "x", 120.0, failures) == [RestartPod(0)]
    assert due(target, "x", policy="RecreateRBGOnPodRestart") == []
    assert due(target, "X", policy="RecreateRBGOnPodRestart") == [RestartPod(0)]


def test_a_revision_is_kept_once_all_pods_have_it_and_are_ready() -> None:
    target = Target(2, 0, "new")
    assert kept_revision(target, "old", pods("nu")) == "old"
    assert kept_revision(target, "old", pods("on")) == "old"
    assert kept_revision(target, "old", pods("nn")) == "new"
    assert kept_revision(replace(target, on_delete=True), "old", pods("nn")) == "old"
