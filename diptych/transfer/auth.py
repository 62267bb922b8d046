"""Both ends of a new link prove that they know the shared secret, without saying it.

HMAC-SHA256 over both sides' random nonces, the purpose of the link and the prover's side. Without a secret the key is
empty: the exchange is the same, and a side with a secret and a side without do not get along.
Until it is over, a link takes only small messages.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random

from diptych.errors import ProtocolError, TransferError
from diptych.transfer import wire
from diptych.transfer.link import Link, LinkClosed

_WRONG_SECRET = (
    "the two sides of a hand-over do not know the same secret; "
    "give both the same --disaggregation-secret-file or DIPTYCH_PD_SECRET"
)
_REFUSED = "the other side refuses this server: check that both have the same version and DIPTYCH_PD_SECRET"


class AuthError(TransferError):
    """The other side refused us, or cannot prove itself. Trying again does not help."""


def _proof(secret: str, side: str, purpose: str, caller: bytes, called: bytes) -> bytes:
    message = b"\0".join([b"diptych", side.encode(), purpose.encode(), caller + called])
    return hmac.new(secret.encode(), message, hashlib.sha256).digest()


async def call(link: Link, purpose: str, secret: str, rng: random.Random, timeout_s: float) -> None:
    """The side that opened the link. Raises AuthError, LinkClosed or ProtocolError; then the link is closed."""
    try:
        async with asyncio.timeout(timeout_s):
            mine = rng.randbytes(32)
            await link.send(wire.encode(wire.Hello(wire.VERSION, purpose, mine)))
            reply = wire.decode_auth((await link.recv())[0])
            if isinstance(reply, wire.Challenge):
                if not hmac.compare_digest(reply.proof, _proof(secret, "called", purpose, mine, reply.nonce)):
                    raise AuthError(_WRONG_SECRET)
                await link.send(wire.encode(wire.Proof(_proof(secret, "caller", purpose, mine, reply.nonce))))
                reply = wire.decode_auth((await link.recv())[0])
            if isinstance(reply, wire.Refused):
                raise AuthError(_REFUSED)  # not its own words: they are a stranger's, and a client would read them
            if not isinstance(reply, wire.Accepted):
                raise ProtocolError("the other side does not answer a handshake")
    except BaseException as error:
        link.close()
        if isinstance(error, TimeoutError):
            raise LinkClosed(f"no answer to the handshake within {timeout_s:g} s") from None
        raise
    _open_up(link)


async def answer(link: Link, purpose: str, secret: str, rng: random.Random, timeout_s: float) -> None:
    """The side that was called. Raises AuthError, LinkClosed or ProtocolError; then the link is closed."""
    try:
        async with asyncio.timeout(timeout_s):
            hello = wire.decode_auth((await link.recv())[0])
            if not isinstance(hello, wire.Hello):
                raise ProtocolError("a link that begins without a hello")
            if hello.version != wire.VERSION or hello.purpose != purpose:
                await _refuse(link, f"this is {purpose}, version {wire.VERSION}, not {hello.purpose} {hello.version}")
            mine = rng.randbytes(32)
            proof = _proof(secret, "called", purpose, hello.nonce, mine)
            await link.send(wire.encode(wire.Challenge(mine, proof)))
            reply = wire.decode_auth((await link.recv())[0])
            if not isinstance(reply, wire.Proof):
                raise ProtocolError("a handshake without a proof")
            if not hmac.compare_digest(reply.proof, _proof(secret, "caller", purpose, hello.nonce, mine)):
                await _refuse(link, _WRONG_SECRET)
            await link.send(wire.encode(wire.Accepted()))
    except BaseException as error:
        link.close()
        if isinstance(error, TimeoutError):
            raise LinkClosed(f"no handshake within {timeout_s:g} s") from None
        raise
    _open_up(link)


async def _refuse(link: Link, message: str) -> None:
    await link.send(wire.encode(wire.Refused(message)))
    raise AuthError(message)


def _open_up(link: Link) -> None:
    link.max_header_bytes = wire.MAX_HEADER_BYTES
    link.max_payload_bytes = wire.MAX_PAYLOAD_BYTES
