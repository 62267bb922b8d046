"""A simulated server: everything but the model and the network is the real thing, put together on a virtual clock.

The engine loop with its role, the scheduler, the page pool, the hand-over, rank 0's lead of the other ranks. The ranks'
channels are pipes; they compute a mock model, each in its own time, and each compares what it finds in its pages.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from diptych.engine.client import EngineLink
from diptych.engine.handover import Site, attach_decode, attach_prefill
from diptych.engine.loop import Engine
from diptych.engine.ranks import Launched, Ranks
from diptych.errors import Unavailable
from diptych.kv.share import Grid
from diptych.sched.state import SchedConfig, new_state
from diptych.testing.exchange import serve
from diptych.testing.mock_model import U64, contents_of
from diptych.testing.mock_runner import MockRunner, num_cached
from diptych.testing.pipe import PipeChannel, Pipes
from diptych.testing.ranks import Lockstep, SimFollower, SimRank, SimThread
from diptych.testing.virtual import LateExecutor
from diptych.transfer.bootstrap import Registration, RouteTable
from diptych.transfer.commands import AnyEvent
from diptych.transfer.link import Link
from diptych.transfer.plane import DataPlane
from diptych.transfer.room import HubOptions
from diptych.types import Bootstrap, Plan, Request, Sampling, StepResult

if TYPE_CHECKING:
    from diptych.testing.cluster import Cluster

PAGE_SIZE, CONTEXT_LEN = 4, 256
COPY_S, LATE_COPY_P, LATE_COPY_S = (0.0, 0.004), 0.03, (0.05, 0.5)  # to gather, sum or scatter a frame
LAST_WORDS_S = (0.0, 0.3)  # from the death of a rank to the end of its server


class SimServer:
    """One prefill or decode server of `pp` stages of `tp` ranks. `start`, then `kill` (it is gone at once).

    Rank 0's endpoint in the network is the server's name, rank r's is `name.r`.
    """

    def __init__(
        self, name: str, mode: str, cluster: Cluster, num_pages: int, *, radix: bool, tp: int = 1, pp: int = 1
    ) -> None:
        self.name, self.mode = name, mode
        self.ended = asyncio.Event()
        self._cluster = cluster
        self._rng = random.Random(cluster.rng.getrandbits(64))
        self.runner = MockRunner(
            num_pages, PAGE_SIZE, context_len=CONTEXT_LEN, world=tp, stages=pp, overlaps=cluster.overlaps
        )
        self._grid = Grid(self.runner.info.num_kv_heads, self.runner.info.num_layers, tp, pp)
        config = SchedConfig(
            page_size=PAGE_SIZE,
            context_len=CONTEXT_LEN,
            max_running=8,
            chunk_tokens=self._rng.choice([4, 16, 64]),
            radix=radix,
            reserved_decode_tokens=8,
            eos_token_ids=self.runner.info.eos_token_ids,
        )
        self.state = new_state(config, num_pages)
        self.link = EngineLink(lambda message: self.engine.deliver(message), self.runner.info, num_pages * PAGE_SIZE)
        self.engine: Engine = Engine(self.state, self, self.link.receive, grammars=None)
        self.hub: Any = None
        self.routes = RouteTable(asyncio.get_running_loop().time)
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order of creation: a run must replay exactly
        self._inspected: dict[str, None] = {}  # requests whose pages were compared with what their prompts demand
        self._demands: dict[tuple[int, int], list[tuple[int, U64]]] = {}  # of step and rank: rows and contents
        self._num_requests = 0
        self._set_up_ranks()

    def _set_up_ranks(self) -> None:
        self._pipes = Pipes(self._rng)
        self._lockstep = Lockstep(self._grid.num_ranks)
        leader: Any = self._sim_rank(0)
        self._leader: SimRank = leader
        self.overlaps = leader.overlaps
        channel = partial(PipeChannel, self._pipes)
        self.ranks = Ranks(leader, self._on_event, self._on_death, channel=channel, thread=SimThread())
        self.plane = self.ranks.plane = self._make_plane(0, partial(self._on_event, 0))
        self._fds: list[int] = []
        self.followers: list[SimFollower] = []
        for rank in range(1, self._grid.num_ranks):
            ours, theirs = self._pipes.pair()
            self._fds.append(ours)
            make_plane = partial(self._make_plane, rank)
            on_end = partial(self._cluster.network.kill, self.endpoints[rank])
            follower = SimFollower(
                self._cluster.follower, self._sim_rank(rank), self._pipes, theirs, make_plane, on_end
            )
            self.followers.append(follower)

    def _sim_rank(self, rank: int) -> SimRank:
        return SimRank(self.runner, rank, self._lockstep, self._rng, partial(self._inspect, rank))

    def _make_plane(self, rank: int, on_event: Callable[[AnyEvent], None]) -> DataPlane:
        return DataPlane(
            self.runner.stores[rank],
            [self._cluster.network.transport(self.endpoints[rank])],
            rank,
            self._grid,
            on_event,
            rng=self._rng,
            executor=LateExecutor(self._rng, COPY_S, LATE_COPY_P, LATE_COPY_S),
            send_timeout_s=5.0,
        )

    @property
    def endpoints(self) -> list[str]:
        return [self.name, *(f"{self.name}.{rank}" for rank in range(1, self._grid.num_ranks))]

    async def start(self) -> None:
        for follower in self.followers:
            self._spawn(follower.start(self.name))
        await self.ranks.connect(self._fds, 60.0)
        transport = self._cluster.network.transport(self.name)
        site = Site(
            info=self.runner.info,
            layout=self.runner.store.layout,
            page_size=PAGE_SIZE,
            addresses=[await self.plane.start(self.name), *self.ranks.addresses],
            pp_size=self._grid.pp,
            broadcast=self.ranks.broadcast,
            counters=self.ranks.counters,
            transport=transport,
            options=HubOptions(
                bootstrap_timeout_s=30.0, heartbeat_timeout_s=5.0, clock=asyncio.get_running_loop().time
            ),
            boot_id=f"{self.name}-{self._rng.getrandbits(32)}",
            rng=self._rng,
        )
        if self.mode == "decode":
            self.hub = attach_decode(self.engine, site, self._cluster.fetch_route(self.name))
        else:
            self.hub = await attach_prefill(self.engine, site, self.name, 0, self._register)
        listener = await transport.listen(self.name, self._on_link)
        self._cluster.http[self.name] = listener.address
        self._spawn(self._run_engine())

    def kill(self) -> None:
        """The process of rank 0 is gone, nothing of it runs on; the other ranks end when they see it."""
        if self.ended.is_set():
            return
        self.ended.set()
        self._cluster.http.pop(self.name, None)
        self._cluster.network.kill(self.name)
        for fd in self._fds:
            self._pipes[fd].die()
        for task in list(self._tasks):
            task.cancel()
        self._closing = [asyncio.ensure_future(self.hub.close()), asyncio.ensure_future(self.plane.close())]
        self.ranks.close()
        self._leader.kill()

    def kill_rank(self, rank: int) -> None:
        """A rank is gone; its server follows (`ended`)."""
        if rank:
            self.followers[rank - 1].kill()
        else:
            self.kill()

    def holds(self) -> dict[str, int]:
        """All zero when nothing is left of any request."""
        pool, tree = self.state.pool, self.state.tree
        cached = sum(len(node.pages) for node in tree.nodes())
        return {
            "requests": len(self.state.seqs),
            "held": len(self.engine.requests.role.held()),
            "rooms": self.hub.snapshot()["rooms"],
            "transfers": sum(plane.snapshot()["rooms"] for plane in self.planes),
            "pages": pool.num_pages - pool.num_free - cached,
        }

    @property
    def num_steps_open(self) -> int:
        """Steps that some rank has still to begin, and collectives that wait for one."""
        return len(self._lockstep) + len(self._demands)

    @property
    def planes(self) -> list[DataPlane]:
        return [self.plane, *(follower.plane for follower in self.followers)]

    # ---- the engine's device ----

    def launch(self, plan: Plan) -> Launched:
        self._demand(plan)
        return self.ranks.launch(plan)

    async def collect(self, launched: Launched) -> StepResult:
        return await self.ranks.collect(launched)

    # ---- inside ----

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    async def _run_engine(self) -> None:
        try:
            await self.engine.run()
        except Exception as error:
            self._cluster.defects.append(f"the engine of {self.name} stopped: {error!r}")
            self._on_death(0)

    def _demand(self, plan: Plan) -> None:
        """Note what each rank must find in the pages of requests that begin or join in this step."""
        demands = []
        for index, (row, length) in enumerate(zip(plan.rows, num_cached(plan), strict=True)):
            if length and row.rid not in self._inspected:
                demands.append((index, contents_of(self.state.seqs[row.rid].tokens[:length])))
            self._inspected[row.rid] = None
        for rank in range(self._grid.num_ranks):
            self._demands[plan.step, rank] = demands

    def _inspect(self, rank: int, plan: Plan) -> None:
        """Rank `rank` begins a step: compare."""
        for index, contents in self._demands.pop((plan.step, rank)):
            wrong = self.runner.ranks[rank].wrong(plan.pages[index], contents)
            if wrong:
                rid = plan.rows[index].rid
                self._cluster.defects.append(f"rank {rank} of {self.name} finds wrong KV of {rid} at positions {wrong}")

    def _on_event(self, rank: int, event: AnyEvent) -> None:
        if self.hub is not None:
            self.hub.handle_event(rank, event)

    def _on_death(self, rank: int) -> None:
        if not self.ended.is_set():
            self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        """A rank died. As in `diptych.engine.lead`, and in the API process then."""
        self.engine.stop()
        self.link.died()
        await self.hub.close()
        await self.plane.close()
        await asyncio.sleep(self._rng.uniform(*LAST_WORDS_S))
        self.kill()

    async def _register(self, registration: Registration) -> None:
        self.routes.register(registration)

    def _on_link(self, link: Link) -> None:
        self._spawn(serve(link, self._handle))

    async def _handle(self, path: str, body: bytes) -> AsyncIterator[bytes]:
        """/health, and /generate, streamed, tokens only."""
        if path == "/health":
            if not self.link.alive:
                raise Unavailable("the engine of this server has stopped")
            yield msgspec.json.encode({"local_prefill": self.mode == "decode"})
            return
        fields = msgspec.json.decode(body)
        room = fields.get("bootstrap_room")
        self._num_requests += 1
        request = Request(
            rid=f"{self.name}-{self._num_requests}",
            prompt=fields["input_ids"],
            sampling=msgspec.convert(fields["sampling_params"], Sampling),
            bootstrap=None if room is None else Bootstrap(fields["bootstrap_host"], 0, room),
        )
        async with aclosing(self.link.generate(request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                finish = output.finish
                if finish is not None and finish.type == "abort":
                    error = Unavailable(finish.message)
                    error.status, error.code = finish.status if finish.status >= 500 else 503, finish.code
                    raise error
                frame = {"tokens": output.tokens, "finish": finish.type if finish else None}
                yield b"data: " + msgspec.json.encode(frame) + b"\n\n"
        yield b"data: [DONE]\n\n"
