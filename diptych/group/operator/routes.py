"""Who has to look when an object changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from diptych.group.operator.cache import GROUP_LABEL, Cache
from diptych.group.operator.resources import ADAPTER, GROUP, GROUP_SET, PROFILE, Json, Kind

CONTROLLERS = {GROUP: "group", GROUP_SET: "set", ADAPTER: "adapter"}  # of the kinds that have a reconciler


class Key(NamedTuple):
    """What to look at: `controller` names the reconciler."""

    controller: str
    namespace: str
    name: str


def keys(kind: Kind, obj: Json, caches: Mapping[Kind, Cache]) -> list[Key]:
    metadata = obj["metadata"]
    namespace, name = metadata.get("namespace", ""), metadata["name"]
    if kind == PROFILE:
        return [Key("group", *key) for key in caches[GROUP].all_keys()]
    if kind == GROUP_SET:
        return [Key("set", namespace, name)]
    if kind == ADAPTER:
        group = obj["spec"]["scaleTargetRef"]["name"]
        return [Key("adapter", namespace, name), Key("group", namespace, group)]
    if kind == GROUP:
        adapters = caches[ADAPTER].of_group(namespace, name)
        owners = [each for each in metadata.get("ownerReferences") or [] if each["kind"] == GROUP_SET.kind]
        return [
            Key("group", namespace, name),
            *(Key("adapter", namespace, each["metadata"]["name"]) for each in adapters),
            *(Key("set", namespace, each["name"]) for each in owners),
        ]
    group = (metadata.get("labels") or {}).get(GROUP_LABEL)
    return [Key("group", namespace, group)] if group else []
