"""Whatever people, pods and crashes do to groups, the operator brings them where their specs want them, and then rests.

Checked at every single write, as long as the operator can know it: what we do never makes more pods of a role
unavailable than its maxUnavailable allows, and no role is created before the roles it depends on are ready.
"""

from __future__ import annotations

from typing import Any

from driver import Crash, Driver, image_of, is_pod_ready
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kube_world import group, role

from diptych.group.operator.resources import Json
from diptych.testing.kube import ApiError, Behaviour
from diptych.testing.kube.store import Change

ROLE = "rolebasedgroup.workloads.x-k8s.io/role"
POLICIES = [*["None"] * 6, "RecreateRBGOnPodRestart", "RecreateRoleInstanceOnPodRestart"]
DELETABLE = ["StatefulSet", "Service", "ConfigMap", "ControllerRevision", "Pod", "PodDisruptionBudget"]
DEPENDENCIES = {"a": [], "b": ["a"], "c": ["a", "b"]}


@st.composite
def roles(draw: st.DrawFn, name: str) -> Json:
    strategy: Json = {"maxUnavailable": draw(st.sampled_from([1, 2, "50%"])), "maxSurge": draw(st.integers(0, 1))}
    more: Json = {"restartPolicy": draw(st.sampled_from(POLICIES)), "rolloutStrategy": {"rollingUpdate": strategy}}
    if draw(st.booleans()):
        more["podDisruptionBudget"] = {"maxUnavailable": 1}
    return role(name, draw(st.integers(0, 4)), dependencies=DEPENDENCIES[name], **more)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.driver.cluster.pods.behaviour = Behaviour(ready_s=1.0, ended_s=0.5)
        self.driver.cluster.store.listeners.append(self._check)
        self.deleted_by_hand: set[str] = set()
        self.wrong: list[str] = []
        self.number, self.steps, self.away_until = 1, 0, 0
        self.guesses = False  # the operator has acted on what was no longer so

    # ---- what must hold at every write ----

    def _check(self, change: Change) -> None:
        spec = self._spec()
        self.guesses = self.guesses or self.driver.deaf
        if spec is None or self.guesses:
            return
        if change.resource == ("apps", "statefulsets") and change.type == "ADDED":
            name = change.obj["metadata"]["name"].removeprefix("g-")
            for needed in DEPENDENCIES.get(name, []):
                if needed in spec and self._ready(needed) < spec[needed]["replicas"]:
                    self.wrong.append(f"{name} is created before {needed} is ready")
        before = change.before
        if change.resource == ("", "pods") and before is not None and "deletionTimestamp" not in before["metadata"]:
            ends = change.type == "DELETED" or "deletionTimestamp" in change.obj["metadata"]
            self._check_end(before, spec) if ends else None

    def _check_end(self, pod: Json, spec: dict[str, Json]) -> None:
        """A pod was ready and is made to end: enough others have to be ready."""
        name = pod["metadata"]["labels"].get(ROLE, "")
        wanted = spec.get(name)
        workload = self._get("StatefulSet", f"g-{name}")
        owners = [each["uid"] for each in pod["metadata"].get("ownerReferences", [])]
        if wanted is None or workload is None or workload["metadata"]["uid"] not in owners or not is_pod_ready(pod):
            return
        index = int(pod["metadata"]["name"].rpartition("-")[2])
        policies = {each.get("restartPolicy", "None") for each in spec.values()}
        restarted = wanted.get("restartPolicy", "None") != "None" or "RecreateRBGOnPodRestart" in policies
        if pod["metadata"]["uid"] in self.deleted_by_hand or index >= wanted["replicas"] or restarted:
            return
        limit = wanted["rolloutStrategy"]["rollingUpdate"]["maxUnavailable"]
        most = limit if isinstance(limit, int) else wanted["replicas"] // 2
        most = max(most, int(wanted["rolloutStrategy"]["rollingUpdate"]["maxSurge"] == 0))
        if self._ready(name) < wanted["replicas"] - most:
            self.wrong.append(f"{pod['metadata']['name']} ends while only {self._ready(name)} others are ready")

    def _ready(self, name: str) -> int:
        return sum(map(is_pod_ready, self.driver.pods(name).values()))

    def _get(self, kind: str, name: str) -> Json | None:
        try:
            return self.driver.read(kind, name)
        except ApiError:
            return None

    def _spec(self) -> dict[str, Json] | None:
        """Roles by name; None without a group."""
        found = self._get("RoleBasedGroup", "g")
        if found is None or "deletionTimestamp" in found["metadata"]:
            return None
        return {each["name"]: each for each in found["spec"]["roles"]}

    def _run(self, seconds: float, tick_s: float = 0.5) -> None:
        end_s = self.driver.cluster.clock.now() + seconds
        while True:
            try:
                self.driver.run(max(0.0, end_s - self.driver.cluster.clock.now()), tick_s)
                break
            except Crash:
                self.driver.restart()
        assert not self.wrong, self.wrong
        self.guesses = self.driver.deaf

    # ---- what people do ----

    @initialize(names=st.sets(st.sampled_from("abc"), min_size=1), data=st.data())
    def begin(self, names: set[str], data: st.DataObject) -> None:
        self.create(names, data)

    def create(self, names: set[str], data: st.DataObject) -> None:
        made = group("g", *(data.draw(roles(name)) for name in sorted(names, reverse=True)))
        for each in made["spec"]["roles"]:
            each["dependencies"] = [name for name in each["dependencies"] if name in names]
        self.driver.create(made)

    @precondition(lambda self: self._spec())
    @rule(what=st.sampled_from(["scale", *["image"] * 5, "limit", "pause", "adapter"]), data=st.data())
    def edit(self, what: str, data: st.DataObject) -> None:
        def change(obj: Json) -> Any:
            each = data.draw(st.sampled_from(obj["spec"]["roles"]))
            if what == "scale":
                each["replicas"] = data.draw(st.integers(0, 4))
            elif what == "image":
                self.number += 1
                each["template"]["spec"]["containers"][0]["image"] = f"engine:{self.number}"
            elif what == "limit":
                each["rolloutStrategy"]["rollingUpdate"]["maxUnavailable"] = data.draw(st.integers(1, 3))
            elif what == "pause":
                obj["spec"]["paused"] = not obj["spec"].get("paused", False)
            else:
                each["scalingAdapter"] = {"enable": data.draw(st.booleans())}

        self.driver.edit("g", change)

    @precondition(lambda self: self._spec())
    @rule(data=st.data())
    def add_or_remove_a_role(self, data: st.DataObject) -> None:
        have = self._spec() or {}
        name = data.draw(st.sampled_from("abc"))

        def change(obj: Json) -> None:
            kept = [each for each in obj["spec"]["roles"] if each["name"] != name]
            if name not in have:
                kept.append(data.draw(roles(name)))
            obj["spec"]["roles"] = kept or obj["spec"]["roles"]
            names = {each["name"] for each in obj["spec"]["roles"]}
            for each in obj["spec"]["roles"]:
                each["dependencies"] = [one for one in DEPENDENCIES[each["name"]] if one in names]

        self.driver.edit("g", change)

    @precondition(lambda self: self._spec())
    @rule(really=st.sampled_from([False, False, True]))
    def delete_the_group(self, really: bool) -> None:
        if really:
            self.driver.delete("RoleBasedGroup", "g")

    @precondition(lambda self: self._get("RoleBasedGroup", "g") is None)
    @rule(data=st.data())
    def make_it_again(self, data: st.DataObject) -> None:
        self.create({"a", "b"}, data)

    @rule(kind=st.sampled_from(DELETABLE), data=st.data())
    def delete_by_hand(self, kind: str, data: st.DataObject) -> None:
        names = self.driver.names(kind)
        if names:
            name = data.draw(st.sampled_from(names))
            self.deleted_by_hand.add(self.driver.read(kind, name)["metadata"]["uid"])
            self.driver.delete(kind, name)

    # ---- what pods do ----

    @rule(how=st.sampled_from(["crash", "fail", "ill", "well"]), data=st.data())
    def pod(self, how: str, data: st.DataObject) -> None:
        alive = [name for name, pod in self.driver.pods().items() if pod["status"].get("phase") == "Running"]
        if not alive:
            return
        name, pods = data.draw(st.sampled_from(alive)), self.driver.cluster.pods
        if how == "crash":
            pods.crash(name)
        elif how == "fail":
            self.deleted_by_hand.add(self.driver.read("Pod", name)["metadata"]["uid"])
            pods.fail(name)
        else:
            pods.set_ready(name, False if how == "ill" else None)

    # ---- what happens to the operator ----

    @rule(after=st.integers(1, 12))
    def crash(self, after: int) -> None:
        self.driver.api.crash_after = after

    @rule(steps=st.integers(1, 3))
    def lose_the_server(self, steps: int) -> None:
        self.driver.api.down, self.away_until = True, self.steps + steps

    @rule(steps=st.integers(1, 2))
    def lose_the_watches(self, steps: int) -> None:
        self.driver.deaf, self.away_until = True, self.steps + steps

    @invariant()
    def life_goes_on(self) -> None:
        """Now and then two things happen at once."""
        self.steps += 1
        if self.steps > self.away_until:
            self.driver.api.down = self.driver.deaf = False
        if self.steps % 4:
            self._run(0.5)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0, 15.0]))
    def time_passes(self, seconds: float) -> None:
        self._run(seconds)

    # ---- where all must end ----

    def teardown(self) -> None:
        if not self.wrong:
            self._end()

    def _end(self) -> None:
        driver = self.driver
        driver.api.down, driver.deaf, driver.api.crash_after = False, False, None
        for name in driver.pods():
            driver.cluster.pods.set_ready(name, None)
        if self._spec() and driver.read("RoleBasedGroup", "g")["spec"].get("paused"):
            driver.edit("g", lambda each: each["spec"].update(paused=False))
        self._run(30)
        self._run(700, tick_s=5.0)
        self._look()
        assert driver.rests(), driver.api.writes[-10:]
        driver.restart()
        self._run(5)
        self._look()
        assert driver.rests(), driver.api.writes[-10:]

    def _look(self) -> None:
        spec, pods = self._spec(), self.driver.pods()
        if spec is None:
            for kind in ("RoleBasedGroup", "StatefulSet", "Service", "Pod", "RoleBasedGroupScalingAdapter"):
                assert self.driver.names(kind) == []
            return
        assert self.driver.ready("g"), self.driver.conditions("g")
        image = {name: image_of({"spec": each["template"]["spec"]}) for name, each in spec.items()}
        assert {name: image_of(pod) for name, pod in pods.items()} == {
            f"g-{name}-{index}": image[name] for name, each in spec.items() for index in range(each["replicas"])
        }
        assert self.driver.names("StatefulSet") == self.driver.names("Service") == sorted(f"g-{name}" for name in spec)
        budgets = sorted(f"g-{name}" for name, each in spec.items() if "podDisruptionBudget" in each)
        assert self.driver.names("PodDisruptionBudget") == budgets
        scaled = sorted(f"g-{n}" for n, each in spec.items() if (each.get("scalingAdapter") or {}).get("enable"))
        assert self.driver.names("RoleBasedGroupScalingAdapter") == scaled


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
