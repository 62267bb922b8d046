"""The `continue` token of lists: where to go on, in which state of the store."""

from __future__ import annotations

import base64
import binascii
import json

from diptych.testing.kube.status import bad_request


def continue_token(after: tuple[str, str], revision: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([revision, *after]).encode()).decode()


def continue_from(token: str) -> tuple[tuple[str, str] | None, int | None]:
    """(the last object seen, revision); (None, None) without a token. Raises 400."""
    if not token:
        return None, None
    try:
        revision, namespace, name = json.loads(base64.urlsafe_b64decode(token))
    except (ValueError, binascii.Error):
        raise bad_request(f"continue key is not valid: {token!r}") from None
    return (str(namespace), str(name)), int(revision)
