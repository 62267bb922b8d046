"""One tree of errors. Every edge (HTTP, command line, wire) maps from here; nothing foreign leaks through it.

A message says what is wrong and what to change. It never carries addresses, paths of the machine or tracebacks.
"""

from __future__ import annotations


class DiptychError(Exception):
    """Root of the tree. `status`, `type` and `code` are what an HTTP client sees (OpenAI's envelope)."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(DiptychError):
    """A flag, a manifest or a model folder is wrong; the process cannot start with it."""

    code = "config_error"


class BadRequest(DiptychError):
    """The client has to change the request. `param` names the field."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(BadRequest):
    """Prompt and requested tokens do not fit the model's context or this server's KV pool."""

    code = "context_length_exceeded"


class PayloadTooLarge(BadRequest):
    status = 413
    code = "payload_too_large"


class Unauthorized(BadRequest):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFound(BadRequest):
    status = 404
    type = "not_found_error"
    code = "not_found"


class MethodNotAllowed(BadRequest):
    status = 405
    code = "method_not_allowed"


class Overloaded(DiptychError):
    """No room now; the same request may succeed after `retry_after_s` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(DiptychError):
    """The server is starting, draining, or has lost a peer it needs."""

    status = 503
    code = "service_unavailable"


class EngineLost(Unavailable):
    """The engine died while it had the request, which may be why."""

    code = "engine_lost"


class UpstreamError(DiptychError):
    """A server behind the router failed or answered nonsense."""

    status = 502
    code = "bad_gateway"


class DeadlineExceeded(DiptychError):
    """A wait ran past its deadline. The message names what was waited for and how long."""

    status = 504
    code = "deadline_exceeded"


class Aborted(DiptychError):
    """Somebody asked to end the request (/abort_request), here or on the other side of its hand-over."""

    status = 499
    code = "aborted"


class ClientGone(DiptychError):
    """The client hung up. Nobody failed, but on the other side of a hand-over it is no answer either."""

    code = "client_gone"


class TransferError(DiptychError):
    """The KV hand-over between prefill and decode failed."""

    code = "kv_transfer_failed"


class CorruptTransfer(TransferError):
    """What arrived is not what was sent (checksum), or it was meant for pages that have a new owner (generation)."""

    code = "kv_transfer_corruption"


class ProtocolError(DiptychError):
    """A peer sent bytes that are no valid message. The link is closed; nothing else is disturbed."""

    code = "protocol_error"


class EngineBroken(DiptychError):
    """The engine must end: it hangs, or what it would compute from now on could be wrong."""

    code = "engine_broken"


class StepFailed(DiptychError):
    """A step has no result, but every rank has done its part of it: the next one may follow."""

    code = "step_failed"


class RoomInUse(BadRequest):
    """Two requests cannot meet the other side in the same room at once."""

    status = 409
    code = "room_in_use"


class OutOfPages(DiptychError):
    """The KV pool has no free page. Internal: the scheduler answers it by evicting or preempting."""

    code = "out_of_pages"


class AuditError(DiptychError):
    """The page ledger does not add up. A defect of ours: the message says which pages and holders."""

    code = "audit_failed"
