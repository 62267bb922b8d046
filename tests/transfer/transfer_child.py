"""One side of a hand-over in a process of its own: `transfer_child.py prefill|decode HOST PREFILL_HOST FOLDER`.

Prefill serves its bootstrap service on port 8998; both write their pool to FOLDER and print what happened.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from aiohttp import web
from transfer_registration import announce, registrations

from diptych.kv.share import Grid
from diptych.net import listen_socket
from diptych.testing.store import ArrayStore
from diptych.transfer import wire
from diptych.transfer.bootstrap import bootstrap_app, fetch_route
from diptych.transfer.plane import DataPlane
from diptych.transfer.receive_hub import ReceiveHub
from diptych.transfer.send_hub import SendHub
from diptych.transfer.tcp import TcpTransport
from diptych.transfer.transports import data_transports
from diptych.types import Bootstrap, FirstToken

GRID = Grid(2, 1)
SRC, DST = [3, 9, 1, 20, 7, 5, 11], [30, 2, 17, 4, 0, 31, 8]


class Side:
    def __init__(self, seed):
        self.store = ArrayStore(32, 2, 50_000)
        self.store.fill(seed)
        self.plane = DataPlane(
            self.store, data_transports("auto"), 0, GRID, lambda event: self.hub.handle_event(0, event)
        )
        self.terms = wire.Terms(self.store.layout, "model", 16, 2, 1)
        self.changed = asyncio.Event()

    def on_change(self, room):
        self.changed.set()

    async def until_ended(self, end):
        async with asyncio.timeout(30):
            while not end.ended:
                self.changed.clear()
                await self.changed.wait()
        if end.error:
            sys.exit(end.error.message)


async def prefill(host, folder):
    side = Side(1)
    side.hub = SendHub(side.terms, 1, side.plane.execute, side.on_change, boot_id="p")
    control = await side.hub.start(TcpTransport(), host)
    runner = web.AppRunner(bootstrap_app("secret"))
    await runner.setup()
    await web.SockSite(runner, listen_socket(host, 8998)).start()
    await announce(host, 8998, registrations(side.terms, GRID, control, "p", "bytes", 0), "secret", 10.0)
    sender = side.hub.open(5, len(SRC))
    sender.send(SRC, 0)
    sender.finish(FirstToken(17, 0))
    await side.until_ended(sender)
    print(sender.state.name)
    np.save(folder / "prefill.npy", side.store.data)
    await side.hub.close()
    await side.plane.close()
    await runner.cleanup()


async def decode(host, prefill_host, folder):
    side = Side(2)
    addresses = [await side.plane.start(host)]
    side.hub = ReceiveHub(
        side.terms,
        addresses,
        side.plane.execute,
        side.on_change,
        boot_id="d",
        vocab_size=100,
        transport=TcpTransport(),
        fetch_route=fetch_route,
    )
    receiver = side.hub.open(Bootstrap(prefill_host, 8998, 5))
    receiver.reserve(DST, [1] * len(DST))
    await side.until_ended(receiver)
    print(*(type(link).__name__ for link in side.plane._links), receiver.state.name)
    np.save(folder / "decode.npy", side.store.data)
    await side.hub.close()
    await side.plane.close()


if __name__ == "__main__":
    which, host, prefill_host, folder = sys.argv[1:]
    asyncio.run(prefill(host, Path(folder)) if which == "prefill" else decode(host, prefill_host, Path(folder)))
