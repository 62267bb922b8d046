"""Who may call what: liveness, readiness and metrics are open, administration may have a key of its own."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass

from diptych.config import ServerConfig
from diptych.errors import Unauthorized

OPEN = frozenset({"/health", "/health_generate", "/ready", "/metrics"})
ADMIN = frozenset({"/drain", "/flush_cache", "/abort_request", "/pause_generation", "/continue_generation"})


def normal_key(config: ServerConfig) -> str:
    """The key of the inference endpoints, "" when none is needed."""
    return config.api_key or os.environ.get("DIPTYCH_API_KEY", "")


@dataclass(frozen=True)
class Keys:
    """Digests of the keys; None: no key is needed."""

    normal: bytes | None
    admin: bytes | None

    @classmethod
    def of(cls, config: ServerConfig) -> Keys:
        normal = normal_key(config)
        return cls(_digest(normal) if normal else None, _digest(config.admin_api_key) if config.admin_api_key else None)

    def check(self, path: str, authorization: str | None) -> None:
        """Raise Unauthorized unless the header opens this path. Unknown paths count as normal ones."""
        if path in OPEN:
            return
        needed = self.admin if path in ADMIN and self.admin is not None else self.normal
        if needed is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip()), needed):
            raise Unauthorized("a valid API key is needed: Authorization: Bearer KEY")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
