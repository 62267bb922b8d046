"""Errors of the API, as a client sees them: `Status` objects with the codes and reasons of kube-apiserver."""

from __future__ import annotations

from typing import Any

Obj = dict[str, Any]


class ApiError(Exception):
    """An answer other than success. `body()` is the Status object that goes over the wire."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: Obj | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details or {}
        self.headers = headers or {}

    def body(self) -> Obj:
        status: Obj = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details:
            status["details"] = self.details
        return status


def _details(name: str, group: str, kind: str) -> Obj:
    return {key: value for key, value in (("name", name), ("group", group), ("kind", kind)) if value}


def _resource(plural: str, group: str) -> str:
    return f"{plural}.{group}" if group else plural


def not_found(plural: str, group: str, name: str) -> ApiError:
    message = f'{_resource(plural, group)} "{name}" not found'
    return ApiError(404, "NotFound", message, details=_details(name, group, plural))


def no_such_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def already_exists(plural: str, group: str, name: str) -> ApiError:
    message = f'{_resource(plural, group)} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, details=_details(name, group, plural))


def conflict(plural: str, group: str, name: str, why: str) -> ApiError:
    message = f'Operation cannot be fulfilled on {_resource(plural, group)} "{name}": {why}'
    return ApiError(409, "Conflict", message, details=_details(name, group, plural))


def modified(plural: str, group: str, name: str) -> ApiError:
    why = "the object has been modified; please apply your changes to the latest version and try again"
    return conflict(plural, group, name, why)


def apply_conflict(conflicts: list[tuple[str, str]]) -> ApiError:
    """`conflicts` are pairs of (other manager in quotes, field)."""
    lines = "\n".join(f"- conflict with {manager}: {field}" for manager, field in conflicts)
    causes = [
        {"reason": "FieldManagerConflict", "message": f"conflict with {manager}", "field": field}
        for manager, field in conflicts
    ]
    number = f"{len(conflicts)} conflict{'s' if len(conflicts) > 1 else ''}"
    return ApiError(409, "Conflict", f"Apply failed with {number}:\n{lines}", details={"causes": causes})


def invalid(kind: str, group: str, name: str, causes: list[tuple[str, str]]) -> ApiError:
    """`causes` are pairs of (field, what is wrong with it)."""
    text = "; ".join(f"{field}: {why}" for field, why in causes)
    if len(causes) > 1:
        text = f"[{', '.join(f'{field}: {why}' for field, why in causes)}]"
    qualified = f"{kind}.{group}" if group else kind
    details = _details(name, group, kind)
    details["causes"] = [{"reason": _cause(why), "message": why, "field": field} for field, why in causes]
    return ApiError(422, "Invalid", f'{qualified} "{name}" is invalid: {text}', details=details)


def _cause(why: str) -> str:
    starts = {"Required": "FieldValueRequired", "Forbidden": "FieldValueForbidden", "Duplicate": "FieldValueDuplicate"}
    starts["Unsupported"] = "FieldValueNotSupported"
    return starts.get(why.split(" ", 1)[0].rstrip(":"), "FieldValueInvalid")


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def forbidden(message: str, *, details: Obj | None = None) -> ApiError:
    return ApiError(403, "Forbidden", message, details=details)


def unauthorized() -> ApiError:
    return ApiError(401, "Unauthorized", "Unauthorized")


def method_not_allowed() -> ApiError:
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message)


def unsupported_media_type(*accepted: str) -> ApiError:
    message = f"the body of the request was in an unknown format - accepted media types include: {', '.join(accepted)}"
    return ApiError(415, "UnsupportedMediaType", message)


def expired(message: str) -> ApiError:
    return ApiError(410, "Expired", message)


def success(name: str, group: str, plural: str, uid: str) -> Obj:
    details = {**_details(name, group, plural), "uid": uid}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
