"""Every message of the hand-over, and the limits a peer cannot exceed.

Messages are msgpack arrays, told apart by a tag, decoded strictly into closed structs: wrong types, unknown tags, extra
fields and values out of range are a ProtocolError. Nothing received is ever executed or resolved.

A data frame is a header and the bytes of its pages. Both carry a crc32, so that no flipped bit goes unseen: the
header's own (it says where the bytes go) and, inside it, the payload's.
"""

from __future__ import annotations

import struct
import zlib
from typing import Annotated

import msgspec
from msgspec import Meta

from diptych.errors import CorruptTransfer, ProtocolError
from diptych.types import FirstToken

VERSION = 3
MAX_PAGES = 1 << 17  # of one room
MAX_RANKS = 1024
MAX_HEADER_BYTES = 4 << 20  # a Reserve of MAX_PAGES fits
MAX_PAYLOAD_BYTES = 16 << 20
HANDSHAKE_HEADER_BYTES = 4096  # before the peer has proved that it knows the secret; payloads are refused until then
FRAME_BYTES = 2 << 20  # pages are sent in frames of about this size: one frame holds the event loop for about 3 ms
LENT_FRAME_BYTES = 4 << 30  # of pages that the receiver copies itself: a chunk is one frame, without a pause in it

Room = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Epoch = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Crc = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
Text = Annotated[str, Meta(max_length=1024)]
Pages = Annotated[list[Count], Meta(max_length=MAX_PAGES)]
Generations = Annotated[list[Annotated[int, Meta(ge=0, le=2**63 - 1)]], Meta(max_length=MAX_PAGES)]
RankAddresses = Annotated[list[Text], Meta(max_length=8)]  # one rank's, in order of preference
Addresses = Annotated[list[RankAddresses], Meta(max_length=MAX_RANKS)]  # of each rank


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that travels."""


# ---- every link: who are you -------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of whoever opened the link. `purpose` keeps a proof for one kind of link from opening another."""

    version: Count
    purpose: Text
    nonce: Nonce


class Challenge(Message, frozen=True):
    nonce: Nonce
    proof: Nonce  # of the side that was called


class Proof(Message, frozen=True):
    proof: Nonce  # of the side that called


class Accepted(Message, frozen=True):
    pass


class Refused(Message, frozen=True):
    message: Text


Auth = Hello | Challenge | Proof | Accepted | Refused


# ---- control link: decode rank 0 <-> prefill rank 0 --------------------------------------------------------------


class Terms(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What both servers must have in common for one's pages to be the other's."""

    layout: Text
    fingerprint: Text
    page_size: Count
    num_kv_heads: Count  # of the whole model
    num_layers: Count


class Attach(Message, frozen=True):
    """decode -> prefill, first: who I am and where my ranks receive pages."""

    boot_id: Text
    terms: Terms
    addresses: Addresses
    pp_size: Count  # stages, of equally many ranks


class Welcome(Message, frozen=True):
    """prefill -> decode, the answer to Attach."""

    boot_id: Text
    terms: Terms
    num_ranks: Count


class Open(Message, frozen=True):
    """decode -> prefill: I have this room's request. From now on each side learns at once if the other gives it up."""

    room: Room
    epoch: Epoch  # drawn by decode for this use of the room; all later messages and frames repeat it


class Reserve(Message, frozen=True):
    """decode -> prefill: page i of the prompt goes into pages[i]; the first `prefix_tokens` tokens are there."""

    room: Room
    epoch: Epoch
    pages: Pages
    generations: Generations
    prefix_tokens: Count


class Final(Message, frozen=True):
    """prefill -> decode: all frames are on their way; frames[r] of them go to decode rank r."""

    room: Room
    epoch: Epoch
    first: FirstToken
    frames: Annotated[list[Count], Meta(max_length=MAX_RANKS)]


class Done(Message, frozen=True):
    """decode -> prefill: everything is here and whole."""

    room: Room
    epoch: Epoch


class Abort(Message, frozen=True):
    """Either way: the room is over. `code` is an error code of diptych.errors, or "aborted"."""

    room: Room
    epoch: Epoch
    message: Text
    code: Text


class Ping(Message, frozen=True):
    """Either way, whenever there was nothing else to say for a while: I am alive."""


ControlMessage = Attach | Welcome | Open | Reserve | Final | Done | Abort | Ping


# ---- data links: each prefill rank -> each decode rank that shares kv heads and layers with it ---------------------


class Lend(Message, frozen=True):
    """prefill -> decode, first on a link over which decode copies pages itself: my pool, and how to map it."""

    handle: Annotated[bytes, Meta(max_length=16384)]
    num_pages: Count
    num_heads: Count  # of this rank, as num_layers
    num_layers: Count


class Lent(Message, frozen=True):
    """decode -> prefill, the answer to Lend. Not mapped: take another transport."""

    mapped: bool


class Taken(Message, frozen=True):
    """decode -> prefill: this frame's pages have been copied, or refused; nothing reads them for it any more."""

    room: Room
    epoch: Epoch
    sequence: Count


class Source(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a frame's bytes lie in the sender's pool: pages, first head and first layer, counted within its rank."""

    pages: Pages
    head: Count
    layer: Count


class Frame(Message, frozen=True):
    """Header of some pages' bytes, `[page, head, layer, 2, slot, dim]`, contiguous.

    Heads and layers are numbered over the whole model; index 0 of the fourth dimension are keys. With `lent`, no bytes
    follow, and there is no checksum: the receiver copies them out of the sender's pool.
    """

    room: Room
    epoch: Epoch
    source: Count  # prefill rank
    sequence: Count  # 0, 1, 2, ... of this room from `source` to this decode rank
    pages: Pages
    generations: Generations
    head_start: Count
    head_stop: Count
    layer_start: Count
    layer_stop: Count
    payload_crc: Crc
    lent: Source | None = None


_encode = msgspec.msgpack.Encoder().encode
_auth = msgspec.msgpack.Decoder(Auth)
_control = msgspec.msgpack.Decoder(ControlMessage)
_loan = msgspec.msgpack.Decoder(Lend | Lent | Taken)
_frame = msgspec.msgpack.Decoder(Frame)
_CRC = struct.Struct("<I")


def encode(message: Message) -> bytes:
    return _encode(message)


def decode_auth(data: bytes) -> Auth:
    """Raises ProtocolError for anything but one of Auth's messages."""
    try:
        return _auth.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("not a handshake message") from None


def decode_control(data: bytes) -> ControlMessage:
    """Raises ProtocolError for anything but one of ControlMessage's messages."""
    try:
        return _control.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("not a control message") from None


def decode_loan(data: bytes) -> Lend | Lent | Taken:
    """Raises ProtocolError for anything else."""
    try:
        return _loan.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("not a message about lent memory") from None


def crc(payload: memoryview) -> int:
    return zlib.crc32(payload)


def pack_frame(frame: Frame) -> bytes:
    body = _encode(frame)
    return _CRC.pack(zlib.crc32(body)) + body


def unpack_frame(header: bytes) -> Frame:
    """Raises CorruptTransfer if the header's checksum is wrong, ProtocolError if it is no frame."""
    if len(header) <= _CRC.size:
        raise ProtocolError("not a data frame")
    body = memoryview(header)[_CRC.size :]
    if _CRC.unpack_from(header)[0] != zlib.crc32(body):
        raise CorruptTransfer("KV corruption: the header of a data frame does not match its checksum")
    try:
        frame = _frame.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ProtocolError("not a data frame") from None
    if not frame.pages or len(frame.pages) != len(frame.generations):
        raise ProtocolError("a data frame that names no pages, or not one generation a page")
    if frame.head_stop <= frame.head_start or frame.layer_stop <= frame.layer_start:
        raise ProtocolError("a data frame of no heads, or of no layers")
    if frame.lent is not None and len(frame.lent.pages) != len(frame.pages):
        raise ProtocolError("a data frame that does not name one lent page a page")
    return frame
