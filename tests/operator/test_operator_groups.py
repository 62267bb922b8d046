"""Groups on an API server: created in order, repaired, scaled, updated, ended. Each test is one person's story."""

from __future__ import annotations

from pathlib import Path

import yaml
from driver import image_of, set_image
from kube_world import World, group, role, until

from diptych.group.operator.resources import CONFIG_MAP, GROUP, POD, SERVICE, STATEFUL_SET, Json
from diptych.testing.kube import ApiError

SEED = Path("examples/seed/sglang_pd.yaml")


def test_the_seed_unchanged(world: World) -> None:
    """The scheduler comes last, every name in its command is a pod of the group, its Service finds it, 10 writes."""
    world.start()
    mark = world.server.record.mark()
    world.create(*yaml.safe_load_all(SEED.read_text()))
    world.wait_ready("sglang-pd")
    writes = world.server.record.writes(mark)
    assert len(writes) <= 10, writes
    made = [each.name for each in writes if each.kind == "StatefulSet"]
    assert made[-1] == "sglang-pd-scheduler" and len(made) == 3
    for name in ("sglang-pd-prefill-0", "sglang-pd-prefill-1", "sglang-pd-decode-0"):
        assert world.cluster.resolve(f"{name}.{name.rpartition('-')[0]}") == [name]
    assert world.cluster.select("sglang-pd") == ["sglang-pd-scheduler-0"]
    born = {name: pod["metadata"]["resourceVersion"] for name, pod in world.pods().items()}
    assert len(born) == 4
    assert world.quiet() == []


def test_what_somebody_deletes_or_changes_comes_back(world: World) -> None:
    world.start()
    world.create(group("g", role("a", 2)))
    world.wait_ready("g")
    for kind, name in ((SERVICE, "g-a"), (CONFIG_MAP, "g"), (STATEFUL_SET, "g-a")):
        old = world.read(kind.kind, name)["metadata"]["uid"]
        world.delete(kind, name)

        def is_new(kind: str = kind.kind, name: str = name, old: str = old) -> bool:
            try:
                return bool(world.read(kind, name)["metadata"]["uid"] != old)
            except ApiError:
                return False

        until(is_new, f"a new {kind.kind}")
    world.wait_ready("g")
    world.edit("g-a", lambda each: each["spec"].update(replicas=5), STATEFUL_SET)
    until(lambda: world.read("StatefulSet", "g-a")["spec"]["replicas"] == 2, "replicas are put right")
    until(lambda: len(world.pods()) == 2, "two pods")
    world.wait_ready("g")
    assert world.quiet() == []


def test_a_role_is_created_when_what_it_needs_is_ready_and_not_before(world: World) -> None:
    stuck = world.cluster.pods.rule(name="g-a-*", ready_s=None)
    world.start()
    world.create(group("g", role("b", dependencies=["a"]), role("a")))
    message = until(lambda: world.conditions("g").get("Ready", {}).get("message"), "a reason")
    assert "b waits until a is ready" in message
    assert world.names("StatefulSet") == ["g-a"]
    stuck()
    world.cluster.on_work()
    world.wait_ready("g")
    assert world.names("StatefulSet") == ["g-a", "g-b"]


def test_a_flapping_dependency_freezes_nothing(world: World) -> None:
    world.start()
    world.create(group("g", role("b", dependencies=["a"]), role("a")))
    world.wait_ready("g")
    world.cluster.pods.rule(name="g-a-*", ready_s=None)
    world.delete(POD, "g-a-0")
    until(lambda: world.conditions("g")["Ready"]["status"] == "False", "a is not ready")
    world.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=3))
    until(lambda: len(world.pods("b")) == 3, "b is scaled all the same")


def test_scaling_rolls_nothing(world: World) -> None:
    world.start()
    world.create(group("g", role("a", 2), role("b")))
    world.wait_ready("g")
    before = {name: pod["metadata"]["uid"] for name, pod in world.pods().items()}
    world.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=4))
    until(lambda: len(world.pods("a")) == 4, "four pods")
    world.wait_ready("g")
    now = {name: pod["metadata"]["uid"] for name, pod in world.pods().items()}
    assert before.items() <= now.items()
    assert "g-a-3.g-a" in world.read("ConfigMap", "g")["data"]["config.yaml"]
    world.edit("g", lambda each: each["spec"]["roles"][0].update(replicas=0))
    until(lambda: not world.pods("a"), "no pods")
    world.wait_ready("g")


def test_an_update_of_one_role_touches_no_other(world: World) -> None:
    world.start()
    world.create(group("g", role("a", 2), role("b", 2)))
    world.wait_ready("g")
    before = {name: pod["metadata"]["uid"] for name, pod in world.pods("b").items()}
    world.edit("g", set_image("engine:2", "a"))
    until(lambda: {image_of(pod) for pod in world.pods("a").values()} == {"engine:2"}, "a is new")
    world.wait_ready("g")
    assert {name: pod["metadata"]["uid"] for name, pod in world.pods("b").items()} == before


def test_updates_that_follow_one_another_end_with_the_last(world: World) -> None:
    world.start()
    world.create(group("g", role("a", 4)))
    world.wait_ready("g")
    for number in (2, 3, 4):
        world.edit("g", set_image(f"engine:{number}"))
        until(lambda image=f"engine:{number}": image in map(image_of, world.pods().values()), "it has begun")  # type: ignore[misc]
    until(lambda: {image_of(pod) for pod in world.pods().values()} == {"engine:4"}, "the last one everywhere")
    world.wait_ready("g")
    assert world.quiet() == []


def test_a_removed_role_goes_with_all_that_belonged_to_it(world: World) -> None:
    world.start()
    world.create(
        group("g", role("a"), role("b", podDisruptionBudget={"maxUnavailable": 1}, scalingAdapter={"enable": True}))
    )
    world.wait_ready("g")
    until(lambda: world.names("RoleBasedGroupScalingAdapter") == ["g-b"], "an adapter")
    assert world.names("PodDisruptionBudget") == ["g-b"]
    world.edit("g", lambda each: each["spec"]["roles"].pop())
    until(lambda: world.names("StatefulSet") == ["g-a"] and len(world.pods()) == 1, "b is gone")
    for kind, left in (("Service", ["g-a"]), ("PodDisruptionBudget", []), ("RoleBasedGroupScalingAdapter", [])):
        until(lambda kind=kind, left=left: world.names(kind) == left, f"no {kind} of b")  # type: ignore[misc]
    world.wait_ready("g")


def test_a_group_ends_dependents_first_and_leaves_nothing(world: World) -> None:
    world.start()
    world.create(group("g", role("router", dependencies=["decode"]), role("decode")))
    world.wait_ready("g")
    mark = world.server.record.mark()
    world.delete(GROUP, "g")
    until(lambda: not world.names("RoleBasedGroup") and not world.cluster.objects("Pod"), "everything is gone")
    ended = [each.name for each in world.server.record.writes(mark) if each.kind == "StatefulSet"]
    assert ended == ["g-router", "g-decode"]
    for kind in ("StatefulSet", "Service", "ConfigMap", "ControllerRevision"):
        until(lambda kind=kind: not world.names(kind), f"no {kind}")  # type: ignore[misc]


def test_an_object_of_somebody_else_is_not_taken_over(world: World) -> None:
    mine = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "g-a"}, "spec": {"ports": [{"port": 80}]}}
    world.create(mine)
    world.start()
    world.create(group("g", role("a")))
    event = until(
        lambda: [each for each in world.cluster.objects("Event") if "does not belong" in each["message"]], "an event"
    )[0]
    assert "Service g-a exists" in event["message"] and event["type"] == "Warning"
    assert "ownerReferences" not in world.read("Service", "g-a")["metadata"]


def test_a_spec_that_cannot_be_is_refused_with_a_reason_and_leaves_what_runs(world: World) -> None:
    world.start()
    world.create(group("g", role("a")))
    world.wait_ready("g")
    world.edit("g", lambda each: each["spec"]["roles"].append(role("b", engineRuntimes=[{"profileName": "none"}])))
    until(lambda: world.conditions("g")["Ready"]["reason"] == "InvalidSpec", "it is refused")
    assert "ClusterEngineRuntimeProfile none" in world.conditions("g")["Ready"]["message"]
    assert list(world.pods()) == ["g-a-0"]


def test_a_broken_pod_stalls_no_update_that_was_held_in_between(world: World) -> None:
    """What was patched while the update was held must not stand in the way of OnDelete, which has no partition."""
    world.start()
    world.create(group("g", role("a", 4)))
    world.wait_ready("g")
    world.cluster.pods.rule(name="g-a-0", ready_s=None)
    world.cluster.pods.set_ready("g-a-0", False)
    until(lambda: world.conditions("g")["Ready"]["status"] == "False", "a pod is broken")

    def strategy() -> Json:
        found: Json = world.read("StatefulSet", "g-a")["spec"]["updateStrategy"]
        return found

    world.edit("g", set_image("engine:2"))
    until(lambda: strategy()["type"] == "OnDelete", "the broken pod goes first")
    until(lambda: image_of(world.pods().get("g-a-0", NO_POD)) == "engine:2", "it is new, and broken still")
    world.edit("g", lambda each: (each["spec"].update(paused=True), set_image("engine:3")(each))[0])
    until(lambda: strategy()["type"] == "RollingUpdate", "the update is held")
    world.edit("g", lambda each: each["spec"].update(paused=False))
    until(lambda: image_of(world.pods().get("g-a-0", NO_POD)) == "engine:3", "the broken pod is new again")


NO_POD: Json = {"spec": {"containers": [{"image": ""}]}}
