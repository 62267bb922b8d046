"""The revisions of a group's spec, as ControllerRevisions: what `diptych rollout history | diff | undo` shows and does.

A revision is the spec without replicas: scaling is no new revision. The newest KEEP are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from diptych.group.operator import objects
from diptych.group.operator.cluster import Cluster
from diptych.group.operator.report import TEMPLATE
from diptych.group.operator.resources import GROUP, REVISION, Json
from diptych.group.revision import restore, revision_data, spec_revision

KEEP = 5
ROLLED_BACK = "rolebasedgroupset.workloads.x-k8s.io/rolled-back"  # annotation of a set's groups: from which template
ROLE_REVISIONS = f"{objects.names.PREFIX}/role-revisions"  # annotation: role → revision of its pod template


class History:
    """Of one group, which controls its revisions."""

    def __init__(self, cluster: Cluster, group: Json) -> None:
        self._cluster, self._group = cluster, group

    def revisions(self) -> list[Json]:
        """Oldest first."""
        found = self._cluster.owned(REVISION, self._group["metadata"]["uid"])
        return sorted(found, key=lambda each: int(each["revision"]))

    def keep(self, role_revisions: Mapping[str, str]) -> None:
        """Make today's spec the newest revision, and forget the oldest ones."""
        known = self.revisions()
        revision = spec_revision(self._group["spec"])
        name = f"{self._group['metadata']['name']}-{revision.hash}"
        is_newest = bool(known) and known[-1]["metadata"]["name"] == name
        number = int(known[-1]["revision"]) + (not is_newest) if known else 1
        annotations = {ROLE_REVISIONS: msgspec.json.encode(role_revisions, order="sorted").decode()}
        metadata = objects.metadata(self._group, "", name, annotations=annotations)
        self._cluster.apply(REVISION, {"metadata": metadata, "data": revision.data, "revision": number})
        older = [each for each in known if each["metadata"]["name"] != name]
        for old in older[: max(0, len(older) + 1 - KEEP)]:
            self._cluster.delete(REVISION, old)

    def undo_to(self, role: str, revision: str) -> bool:
        """Return the group's spec to the newest revision in which `role` had this template. False if there is none."""
        today = f"{self._group['metadata']['name']}-{spec_revision(self._group['spec']).hash}"
        for each in reversed(self.revisions()):
            if _role_revisions(each).get(role) == revision and each["metadata"]["name"] != today:
                self.restore(each)
                return True
        return False

    def restore(self, revision: Json) -> None:
        """Make the group's spec that of `revision`, with today's replicas. Raises Conflict if the group has changed.

        A set learns from a mark which of its templates the group could not have, and does not give it again.
        """
        metadata = self._group["metadata"]
        annotations = metadata.get("annotations") or {}
        if TEMPLATE in annotations:
            metadata = {**metadata, "annotations": {**annotations, ROLLED_BACK: annotations[TEMPLATE]}}
        spec = restore(self._group["spec"], revision_data(revision["data"]))
        self._cluster.replace(GROUP, {"metadata": metadata, "spec": spec})


def _role_revisions(revision: Json) -> dict[str, str]:
    text = (revision["metadata"].get("annotations") or {}).get(ROLE_REVISIONS, "{}")
    try:
        return msgspec.json.decode(text, type=dict[str, str])
    except msgspec.DecodeError:
        return {}  # somebody edited it: that revision is none to go back to
