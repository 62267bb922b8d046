"""A process at the other end of a link: `link_child.py tcp|shm ADDRESS send|listen|silent`. Ends when killed."""

import asyncio
import sys

from transfer_links import transports, trust

from diptych.transfer.link import LinkClosed


async def main(kind, address, what):
    link = await transports(kind)[1].connect(address, 10.0)
    trust(link)
    payload = memoryview(bytes(1 << 20))
    try:
        await link.send(b"here")
        if what == "silent":  # connected, never reads
            await asyncio.Event().wait()
        while True:
            if what == "send":
                await link.send(b"more", payload)
            else:
                await link.recv()
    except LinkClosed:
        return


asyncio.run(main(*sys.argv[1:]))
