"""A prefill and a decode server's transfer halves, all ranks in one process, over any transport."""

from __future__ import annotations

import asyncio
import random

import numpy as np

from diptych.kv.share import Grid
from diptych.testing.store import ArrayStore, SharedStore
from diptych.transfer import wire
from diptych.transfer.bootstrap import Route
from diptych.transfer.plane import DataPlane
from diptych.transfer.receive_hub import ReceiveHub
from diptych.transfer.room import HubOptions, KVPoll
from diptych.transfer.send_hub import SendHub
from diptych.types import Bootstrap, FirstToken

PAGE_SIZE = 4
HEAD_BYTES = 192


class Server:
    """One server's ranks. `whole` is its pool with all heads and layers, [page, kv head, byte of all layers]."""

    def __init__(self, grid, num_pages, seed, transports, *, secret="", head_bytes=HEAD_BYTES, **plane):
        self.grid, self.layer_bytes = grid, head_bytes // grid.num_layers
        self.stores, self.planes = [], []
        self.changes: list[int] = []
        self._changed = asyncio.Event()
        self.whole = np.random.default_rng(seed).integers(0, 256, (num_pages, grid.num_heads, head_bytes), np.uint8)
        for rank in range(grid.num_ranks):
            layers = grid.layers(rank)
            pulls = any(t.scheme == "cuda" or getattr(t, "pulls", False) for t in transports(rank))
            store = (SharedStore if pulls else ArrayStore)(
                num_pages,
                len(grid.heads(rank)),
                len(layers) * self.layer_bytes,
                num_layers=len(layers),
                model_layers=grid.num_layers,
                page_size=PAGE_SIZE,
            )
            store.data[:] = self.part(self.whole, rank)
            self.stores.append(store)
            self.planes.append(
                DataPlane(
                    store,
                    transports(rank),
                    rank,
                    grid,
                    lambda event, rank=rank: self.hub.handle_event(rank, event),
                    secret=secret,
                    rng=random.Random(seed * 100 + rank),
                    **plane,
                )
            )

    def part(self, whole, rank):
        """What `rank` holds of a pool like `whole`."""
        heads, layers = self.grid.heads(rank), self.grid.layers(rank)
        start, stop = layers.start * self.layer_bytes, layers.stop * self.layer_bytes
        return whole[:, heads.start : heads.stop, start:stop]

    def broadcast(self, command):
        for plane in self.planes:
            plane.execute(command)

    def on_change(self, room):
        self.changes.append(room)
        self._changed.set()

    async def until(self, condition, timeout_s=30.0):
        """Wait for on_change calls until `condition()`."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def check_pool(self, expected):
        """Every rank's copy of every page, bit for bit."""
        for rank, store in enumerate(self.stores):
            assert np.array_equal(store.data, self.part(expected, rank)), f"rank {rank}"

    def snapshot(self):
        totals = dict(self.hub.snapshot())
        for plane in self.planes:
            for name, count in plane.snapshot().items():
                totals[name] += count
        return totals

    async def close(self):
        await self.hub.close()
        for plane in self.planes:
            await plane.close()
        for store in self.stores:
            if isinstance(store, SharedStore):
                store.close()


class Pair:
    """`prefill` and `decode`, started by `await Pair.start(...)`."""

    prefill: Server
    decode: Server

    @classmethod
    async def start(
        cls,
        transports,
        *,
        tp=(1, 1),
        pp=(1, 1),
        num_heads=4,
        num_layers=1,
        num_pages=(24, 32),
        options=None,
        secrets=("", ""),
        terms=None,
        host="127.0.0.1",
        **plane,
    ):
        """`transports(side, rank)` gives a rank's data transports; the last of them carries control too."""
        self = cls()
        options = options or HubOptions()
        self.options = options
        self.transports = transports
        grids = [Grid(num_heads, num_layers, tp[side], pp[side]) for side in range(2)]
        self.prefill = Server(grids[0], num_pages[0], 1, lambda r: transports("prefill", r), secret=secrets[0], **plane)
        self.decode = Server(grids[1], num_pages[1], 2, lambda r: transports("decode", r), secret=secrets[1], **plane)
        self.terms = wire.Terms(self.prefill.stores[0].layout, "model-a", PAGE_SIZE, num_heads, num_layers)
        self.secrets = secrets
        self.routes = {}
        await self.start_prefill(host)
        addresses = [await plane.start(host) for plane in self.decode.planes]
        self.decode.hub = ReceiveHub(
            terms or self.terms,
            addresses,
            self.decode.broadcast,
            self.decode.on_change,
            boot_id="decode-1",
            vocab_size=1000,
            pp_size=pp[1],
            transport=transports("decode", 0)[-1],
            fetch_route=self.fetch_route,
            options=HubOptions(
                secret=secrets[1],
                bootstrap_timeout_s=options.bootstrap_timeout_s,
                heartbeat_timeout_s=options.heartbeat_timeout_s,
            ),
            rng=random.Random(7),
        )
        return self

    async def start_prefill(self, host="127.0.0.1", boot_id="prefill-1"):
        prefill = self.prefill
        prefill.hub = SendHub(
            self.terms,
            prefill.grid.num_ranks,
            prefill.broadcast,
            prefill.on_change,
            boot_id=boot_id,
            options=HubOptions(
                secret=self.secrets[0],
                bootstrap_timeout_s=self.options.bootstrap_timeout_s,
                heartbeat_timeout_s=self.options.heartbeat_timeout_s,
            ),
            rng=random.Random(3),
        )
        address = await prefill.hub.start(self.transports("prefill", 0)[-1], host)
        self.routes["prefill", 1] = Route(
            attn_tp_size=prefill.grid.tp, page_size=PAGE_SIZE, kv_cache_dtype="bytes", control_address=address
        )

    async def fetch_route(self, host, port, timeout_s):
        return self.routes[host, port]

    def bootstrap(self, room):
        return Bootstrap("prefill", 1, room)

    async def hand_over(self, room, src, dst, *, prefix_pages=0, chunk=3, token=17):
        """One whole hand-over of prompt pages `src` into `dst`; both ends must succeed."""
        sender = self.prefill.hub.open(room, len(src))
        receiver = self.decode.hub.open(self.bootstrap(room))
        await self.decode.until(lambda: receiver.state >= KVPoll.WaitingForInput or receiver.ended)
        receiver.reserve(dst, [page + 100 for page in dst], prefix_pages * PAGE_SIZE)
        await self.prefill.until(lambda: sender.state >= KVPoll.WaitingForInput or sender.ended)
        for first in range(0, len(src), chunk):
            sender.send(src[first : first + chunk], first)
        sender.finish(FirstToken(token, 0))
        await self.decode.until(lambda: receiver.ended)
        await self.prefill.until(lambda: sender.ended)
        assert receiver.error is None and sender.error is None, (receiver.error, sender.error)
        assert receiver.state == sender.state == KVPoll.Success
        assert receiver.first == FirstToken(token, 0)
        return sender, receiver

    async def close(self):
        await self.decode.close()
        await self.prefill.close()
