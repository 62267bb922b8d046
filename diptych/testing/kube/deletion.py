"""How an object is deleted: preconditions, grace, finalizers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.testing.kube.kinds import Kind
from diptych.testing.kube.status import Obj, conflict


@dataclass(frozen=True)
class Deleting:
    """DeleteOptions. `policy` is Background, Foreground or Orphan; `grace_s` counts for pods only; `uid` and
    `revision` are preconditions.
    """

    policy: str = "Background"
    grace_s: int | None = None
    uid: str | None = None
    revision: str | None = None
    dry_run: bool = False


def check(kind: Kind, live: Obj, options: Deleting) -> None:
    """Raises 409 where a precondition does not hold."""
    have = live["metadata"]
    for name, wanted, got in (
        ("UID", options.uid, have["uid"]),
        ("ResourceVersion", options.revision, have["resourceVersion"]),
    ):
        if wanted is not None and wanted != got:
            why = f"Precondition failed: {name} in precondition: {wanted}, {name} in object meta: {got}"
            raise conflict(kind.plural, kind.group, have["name"], why)


def mark(kind: Kind, live: Obj, options: Deleting, now: str) -> Obj | None:
    """The object marked for deletion, or None if it can go at once."""
    metadata = dict(live["metadata"])
    finalizers = [name for name in metadata.get("finalizers", []) if name not in ("orphan", "foregroundDeletion")]
    finalizers += {"Foreground": ["foregroundDeletion"], "Orphan": ["orphan"]}.get(options.policy, [])
    grace_s = _grace_s(kind, live, options)
    if kind.key == ("", "namespaces") and live["spec"].get("finalizers"):
        live = {**live, "status": {**live.get("status", {}), "phase": "Terminating"}}
    elif not finalizers and not grace_s:
        return None
    if "deletionTimestamp" not in metadata:
        metadata["deletionTimestamp"] = now
        metadata["deletionGracePeriodSeconds"] = grace_s
        if "generation" in metadata:
            metadata["generation"] += 1
    elif grace_s < metadata.get("deletionGracePeriodSeconds", 0):
        metadata["deletionGracePeriodSeconds"] = grace_s
    if finalizers:
        metadata["finalizers"] = finalizers
    else:
        metadata.pop("finalizers", None)
    return {**live, "metadata": metadata}


def is_finished(obj: Obj) -> bool:
    """Whether an object that is being deleted has nothing left to wait for."""
    metadata = obj["metadata"]
    waiting = metadata.get("finalizers") or metadata.get("deletionGracePeriodSeconds")
    return "deletionTimestamp" in metadata and not waiting and not obj.get("spec", {}).get("finalizers")


def _grace_s(kind: Kind, live: Obj, options: Deleting) -> int:
    """How long a pod may take to end: nothing when it never ran or has ended."""
    if kind.key != ("", "pods"):
        return 0
    ended = live.get("status", {}).get("phase") in ("Succeeded", "Failed")
    if ended or not live["spec"].get("nodeName"):
        return 0
    wanted = options.grace_s if options.grace_s is not None else live["spec"].get("terminationGracePeriodSeconds", 30)
    return int(wanted)
