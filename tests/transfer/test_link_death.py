"""A process at the other end of a link dies: this side learns at once, and keeps nothing of it."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from transfer_links import ONE_MIB, SOCKET_KINDS, send_until_blocked, transports, trust

from diptych.transfer.link import LinkClosed


@pytest.mark.parametrize("kind", SOCKET_KINDS)
@pytest.mark.parametrize("what", ["send", "listen", "silent"])
async def test_the_other_process_is_killed(kind, what, nothing_left):
    called: asyncio.Queue = asyncio.Queue()
    listener = await transports(kind)[0].listen("127.0.0.1", called.put_nowait)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).parent / "link_child.py"),
        kind,
        listener.address,
        what,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        async with asyncio.timeout(30):
            link = await called.get()
            trust(link)
            assert (await link.recv())[0] == b"here"
            if what == "silent":
                stuck, _ = await send_until_blocked(link)
                child.send_signal(signal.SIGKILL)
                with pytest.raises(LinkClosed):
                    await stuck
            else:
                for _ in range(20):
                    if what == "send":
                        await link.recv()
                    else:
                        await link.send(b"x", memoryview(ONE_MIB))
                child.send_signal(signal.SIGKILL)
                with pytest.raises(LinkClosed):
                    while True:
                        await link.recv()
            assert await child.wait() == -signal.SIGKILL
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
        listener.close()
    link.close()
