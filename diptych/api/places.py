"""Where a decode server connects to because a request says so: the places that its bootstrap_host may name.

Without a rule, anybody who reaches a decode server could have it connect to any address (server-side request forgery).
Names are resolved here, and the address is what the engine gets: a name that resolves differently a moment later leads
nowhere else.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from diptych.config import ANYWHERE, ServerConfig, is_network
from diptych.errors import BadRequest, Unavailable
from diptych.net import resolve
from diptych.types import FAKE_BOOTSTRAP_HOST

NAME_TTL_S = 1.0  # how long a resolved name is used again
MAX_NAMES = 256
PARAM = "bootstrap_host"


class Places:
    """`allowed`: ServerConfig.bootstrap_places."""

    def __init__(self, allowed: Iterable[str]) -> None:
        allowed = tuple(allowed)
        self._anywhere = ANYWHERE in allowed
        self._networks: list[IPv4Network | IPv6Network] = [
            ip_network(item, strict=False) for item in allowed if is_network(item)
        ]
        names = [item.lower() for item in allowed if not is_network(item)]
        self._names = frozenset(names)
        self._ends = tuple(name[1:] for name in names if name.startswith("*."))
        self._resolved: OrderedDict[str, tuple[float, str]] = OrderedDict()

    @classmethod
    def of(cls, config: ServerConfig) -> Places:
        return cls(config.bootstrap_places)

    async def find(self, host: str) -> str:
        """What the engine may connect to for `host`: itself, or its address. Raises BadRequest for a place that is not
        allowed, Unavailable for a name that does not resolve.
        """
        if self._anywhere or host == FAKE_BOOTSTRAP_HOST or self._knows(host):
            return host
        address = await self._address(host.strip("[]"))
        if not self.has(address):
            raise BadRequest(
                f"{PARAM} names a place that this decode server may not connect to; "
                "its --disaggregation-bootstrap-allow says which, or a secret shared with prefill opens all",
                param=PARAM,
            )
        return address

    def has(self, address: str) -> bool:
        """Whether an address lies in an allowed network. What is no address in full does not."""
        try:
            found = ip_address(address)
        except ValueError:  # such as 127.1, which the kernel would understand
            return False
        if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in self._networks)

    def _knows(self, host: str) -> bool:
        name = host.lower().rstrip(".")
        return name in self._names or (bool(self._ends) and name.endswith(self._ends))

    async def _address(self, host: str) -> str:
        now = asyncio.get_running_loop().time()
        known = self._resolved.get(host)
        if known is not None and now - known[0] < NAME_TTL_S:
            return known[1]
        try:
            address = await resolve(host)
        except (Unavailable, TimeoutError):
            raise Unavailable(f"the name in {PARAM} does not resolve here; check it, or the DNS") from None
        self._resolved[host] = now, address
        self._resolved.move_to_end(host)
        if len(self._resolved) > MAX_NAMES:
            self._resolved.popitem(last=False)
        return address
