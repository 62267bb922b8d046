"""What the operator reports about each kind (`status`)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from diptych.group.reader import Object, keyed

Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
Number = Annotated[int, Meta(ge=0)]


class Condition(Object, frozen=True, kw_only=True):
    """Kubernetes' metav1.Condition."""

    type: Annotated[str, Meta(min_length=1, max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Meta(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$(?!\n)", max_length=1024)]
    message: Annotated[str, Meta(max_length=32768)]
    last_transition_time: Time
    observed_generation: Number | None = None


class RoleStatus(Object, frozen=True, kw_only=True):
    name: str
    replicas: Number = 0
    ready_replicas: Number = 0
    updated_replicas: Number = 0


class GroupStatus(Object, frozen=True, kw_only=True):
    observed_generation: Number | None = None
    observed_template: str | None = None
    role_statuses: Annotated[tuple[RoleStatus, ...], keyed("name")] = ()
    conditions: Annotated[tuple[Condition, ...], keyed("type")] = ()


class SetStatus(Object, frozen=True, kw_only=True):
    observed_generation: Number | None = None
    replicas: Number = 0
    ready_replicas: Number = 0
    updated_replicas: Number = 0
    conditions: Annotated[tuple[Condition, ...], keyed("type")] = ()


class AdapterStatus(Object, frozen=True, kw_only=True):
    phase: Literal["", "NotBound", "Bound"] | None = None
    replicas: Number | None = None
    selector: str | None = None
    last_scale_time: Time | None = None


class ProfileStatus(Object, frozen=True, kw_only=True):
    observed_generation: Number | None = None
