"""The points of a sweep on a Dask cluster: a local one by default, any other by its address."""

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from importlib.util import find_spec

import dask
import psutil
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, wait
from distributed.comm import connect
from distributed.security import Security

from lib.book import sweep_ship
from lib.errors import BookError

RETRIES = 8  # how often a point whose worker was killed is tried again
TICK = 0.5  # seconds between two looks at the cluster
PATIENCE = 20.0  # seconds that a worker of a local cluster may take to start


@dataclass
class Cluster:
    """A connected cluster. `environment` is what its points add to their worker's own."""

    client: Client
    name: str
    dashboard: str | None
    environment: dict[str, str] = field(default_factory=dict)
    local: LocalCluster | None = None
    workers: int = 0  # how many a local cluster should have
    short_since: float | None = None
    renewals: int = 0

    def alive(self) -> bool:
        """Whether the scheduler is still there."""
        return self.client.status in ("running", "connecting")

    def threads(self) -> int:
        """How many points run at the same time, now."""
        return sum(self.client.nthreads().values())

    def heal(self) -> None:
        """Give a local cluster its workers back: Dask gives up on one that dies as it starts.

        Raises BookError where none starts at all.
        """
        now, there = time.monotonic(), len(self.client.nthreads())
        self.renewals = 0 if there else self.renewals
        if self.local is None or there >= self.workers:
            self.short_since = None
        elif self.short_since is None:
            self.short_since = now
        elif now - self.short_since > PATIENCE:
            if self.renewals == 5:
                raise BookError("the workers of the local cluster do not start")
            self.short_since, self.renewals = now, self.renewals + 1
            self.local.loop.add_callback(_renew, self.local, self.workers)


@contextlib.contextmanager
def cluster(address: str | None, workers: int, points_threads: int) -> Iterator[Cluster]:
    """The cluster at `address`, or a new one of `workers` processes on this machine.

    points_threads: threads a point computes with, on a new cluster.
    """
    for name in ("distributed", "tornado", "asyncio"):  # killed workers are ours to report
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sweep_ship.by_value()
    passed = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "BOOK_DEVICE")
              if name in os.environ}  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if address:
            client = stack.enter_context(Client(address, timeout=30))
            yield Cluster(client, address, _dashboard(client), passed)
            return
        scratch = tempfile.TemporaryDirectory(prefix="book-sweep-", ignore_cleanup_errors=True)
        stack.enter_context(scratch)
        # A kill is counted by us.
        quiet = {"distributed.scheduler.allowed-failures": 0,
                 "distributed.deploy.lost-worker-timeout": "1h",  # see `heal`
                 "distributed.logging.distributed": "critical"}  # fmt: skip
        stack.enter_context(dask.config.set(quiet))
        with _deaf_to_ctrl_c():
            local = LocalCluster(
                n_workers=0, threads_per_worker=1, processes=True, memory_limit=0,
                host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL,
                local_directory=scratch.name,
            )  # fmt: skip
            stack.enter_context(local)
            client = stack.enter_context(Client(local))
            local.scale(workers)
        threads = {name: _at_most(name, points_threads) for name in sweep_ship.THREADS}
        name, link = f"{workers} local worker{'' if workers == 1 else 's'}", _dashboard(client)
        yield Cluster(client, name, link, passed | threads, local, workers)


async def _renew(local: LocalCluster, workers: int) -> None:
    """Put new workers in the place of those that the scheduler does not know."""
    known = {each["name"] for each in local.scheduler_info["workers"].values()}
    for name in [name for name in local.worker_spec if name not in known]:
        del local.worker_spec[name]
        lost = local.workers.pop(name, None)
        if lost is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(lost.close(timeout=2), 5)
    local.scale(workers)


def check(address: str) -> None:
    """Raise BookError where no Dask scheduler answers at `address`."""

    async def knock():
        security = Security().get_connection_args("client")
        await (await connect(address, timeout=10, **security)).close()

    try:
        asyncio.run(knock())
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise BookError(f"no Dask scheduler at {address}: {said}") from None


def _dashboard(client: Client) -> str | None:
    """The link, where the scheduler serves a dashboard and, for our own, bokeh can draw it."""
    serves = "dashboard" in client.scheduler_info().get("services", {})
    drawn = client.cluster is None or find_spec("bokeh")
    return client.dashboard_link if serves and drawn else None


def _at_most(name: str, threads: int) -> str:
    """The reader's own limit where it is lower."""
    own = os.environ.get(name, "")
    return str(min(int(own), threads) if own.isdigit() and int(own) else threads)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started in here, or later from threads started in here, never hear Ctrl-C.

    The terminal sends it to all of them; this process alone ends the sweep.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it would undo the mask of the thread that starts it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def size(points: int, workers: int | None, peak_gib: float | None) -> tuple[int, int]:
    """How many workers a local cluster gets, and how many threads each point.

    As many as there are cores, unless there are fewer points or memory is short of `peak_gib`
    gibibytes each (2 where the chapter was not measured).
    """
    if workers is None:
        free = psutil.virtual_memory().available / 2**30
        workers = max(1, min(CPU_COUNT, points, int(free / max(peak_gib or 2.0, 0.1))))
    return workers, max(1, CPU_COUNT // workers)


def run(
    on: Cluster,
    content: bytes,
    orders: dict[str, dict],
    claim: Callable[[str], str],
    done: Callable[[str, dict], bool],
    tick: Callable[[dict], None],
) -> None:
    """Run the points of `orders` (key → what `BookFiles.run` takes), until each has an end.

    claim: "mine" (run it), "finished" (nothing to do) or "elsewhere" (ask again). done: called
    with what came back; whether that was the point's end. tick: called twice a second with the
    counts `running`, `elsewhere`, `workers`. Raises BookError where the scheduler goes away.
    """
    name = f"book-{os.urandom(6).hex()}"
    on.client.register_plugin(sweep_ship.BookFiles(name, content), name=name)
    task = sweep_ship.task(name)
    todo, elsewhere, running, tries = deque(orders), deque(), {}, dict.fromkeys(orders, 0)
    looked = 0.0
    try:
        while todo or elsewhere or running:
            # No point waits on a worker: it would count as killed with it.
            room = max(1, on.threads()) - len(running)
            while todo and room > 0:
                key = todo.popleft()
                verdict = claim(key)
                if verdict == "elsewhere":
                    elsewhere.append(key)
                elif verdict == "mine":
                    order = orders[key] | {"environment": on.environment}
                    running[key] = on.client.submit(
                        task, order, key=f"{key}-{tries[key]}-{name}", pure=False
                    )
                    room -= 1
            if running:
                with contextlib.suppress(TimeoutError, CancelledError):
                    wait(list(running.values()), timeout=TICK, return_when="FIRST_COMPLETED")
            else:
                time.sleep(TICK)
            if not on.alive():
                raise BookError(f"lost the Dask scheduler at {on.name}")
            for key, future in list(running.items()):
                if not future.done():
                    continue
                del running[key]
                tries[key] += 1
                last = tries[key] > RETRIES
                if not done(key, _outcome(future) | {"tries": tries[key], "last": last}):
                    todo.append(key)
            if time.monotonic() - looked > TICK:
                looked = time.monotonic()
                on.heal()
                threads = on.client.nthreads()
                busy = min(len(running), sum(threads.values()))
                tick({"running": busy, "elsewhere": len(elsewhere), "workers": len(threads)})
                todo.extend(elsewhere)
                elsewhere.clear()
    finally:
        # Ctrl-C: what is finished already is kept, the rest is cancelled.
        for key, future in running.items():
            if future.status == "finished":
                with contextlib.suppress(Exception):
                    done(key, _outcome(future) | {"tries": tries[key] + 1, "last": True})
        if on.alive():
            with contextlib.suppress(Exception):
                on.client.cancel(list(running.values()))
                on.client.unregister_worker_plugin(name)
                on.client.run(sweep_ship.removal(name))


def _outcome(future) -> dict:
    """What a point left: `code`, `said`, `record`; code None where its worker was killed."""
    try:
        return future.result()
    except Exception as error:  # whatever a worker or the way to it can raise
        if future.status == "cancelled":
            said = "its worker was lost"
        elif type(error).__name__ == "KilledWorker":
            said = "its worker was killed"
        else:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"code": None, "said": said, "record": b""}
