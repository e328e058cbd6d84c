"""`spread`: work in this process, in more processes of this machine, or on a cluster, in the same order."""

import asyncio
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # pieces of work that wait at each worker, so that it never idles, and memory stays bounded
TRIES = 2  # again, of work whose worker died
PATIENCE = 30  # s for a scheduler to answer, and to have workers


class Spread:
    """Workers that a function runs on."""

    def __init__(self, client: Any | None):
        """Use `spread`; no client: this process."""
        self._client = client

    @property
    def is_here(self) -> bool:
        """Whether the work is done in this process."""
        return self._client is None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The function of every item, in the order of the items, begun a bounded number ahead.

        Raises:
            OSError: if the workers kept dying on an item, or all are gone.
        """
        if self._client is None:
            yield from map(function, items)
            return
        from distributed import KilledWorker

        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(self._client.submit(function, item, pure=False, retries=TRIES))
                if len(waiting) >= AHEAD * max(1, len(self._client.nthreads())):
                    yield self._awaited(waiting.popleft())
            while waiting:
                yield self._awaited(waiting.popleft())
        except KilledWorker as death:
            raise OSError(
                f"a worker died {TRIES + 1} times on the same piece of work ({death}); "
                "give the workers more memory, or look at their logs"
            ) from death
        finally:
            for future in waiting if self._client.status == "running" else ():
                future.cancel()

    def _awaited(self, future: Any) -> Any:
        """What a piece of work gives, as long as there is a worker that could do it."""
        while True:
            try:
                return future.result(timeout=PATIENCE)
            except TimeoutError:
                if future.done():
                    raise  # the work's own
                if not self._client.nthreads():  # type: ignore[union-attr]
                    raise OSError(
                        "the scheduler has no workers; start some, and give the same command again"
                    ) from None


@contextmanager
def spread(workers: int = 0, scheduler: str | None = None) -> Iterator[Spread]:
    """Workers, until the end of the block.

    Args:
        workers: processes of this machine; 0: this process alone.
        scheduler: address of a Dask scheduler, tls:// with the certificates that Dask's configuration
            (distributed.comm.tls) names, or tcp:// on this machine only: whoever reaches a scheduler without
            TLS can run code on its workers.

    Raises:
        ValueError: for both, for fewer workers than 0, or for a scheduler that is not safe to use.
        OSError: if the scheduler does not answer.
    """
    if workers < 0:
        raise ValueError(f"workers={workers}: expected 0 (this process) or more")
    if workers and scheduler:
        raise ValueError(
            f"workers={workers}, scheduler={scheduler}: give one of them; a scheduler has its workers"
        )
    if scheduler:
        _check_safe(scheduler)
    if not workers and not scheduler:
        yield Spread(None)
        return
    import dask
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.ERROR)  # else it tells of every connection
    if scheduler:
        _check_answers(scheduler)
        with Client(scheduler, timeout=PATIENCE, set_as_default=False) as client:
            yield Spread(client)
        return
    with (
        tempfile.TemporaryDirectory(prefix="metnet-") as folder,
        dask.config.set(temporary_directory=folder),
        LocalCluster(
            local_directory=folder,
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # None would take port 8787
            scheduler_kwargs={"dashboard": False},
            memory_limit=0,
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield Spread(client)


def _check_answers(scheduler: str) -> None:
    """Asks a Dask scheduler who it is: a `Client` waits for ever for one that lets it in and says nothing.

    Raises:
        OSError: if nobody answers in time, or no scheduler.
    """
    from distributed import Security
    from distributed.core import rpc

    async def asked() -> str:
        settings = Security().get_connection_args("client")
        async with rpc(scheduler, timeout=PATIENCE, connection_args=settings) as remote:
            return str((await remote.identity())["type"])

    try:
        kind = asyncio.run(asyncio.wait_for(asked(), PATIENCE))
    except (OSError, TimeoutError) as error:
        kind = f"nobody ({error})" if str(error) else "nobody"
    if kind != "Scheduler":
        raise OSError(
            f"scheduler={scheduler}: expected a Dask scheduler, and {kind} answered within {PATIENCE} s; "
            "start one there (dask scheduler), look at the certificates, or give workers=N for processes of "
            "this machine"
        )


def _check_safe(scheduler: str) -> None:
    """Refuses addresses that are neither encrypted nor of this machine."""
    url = urlsplit(scheduler)
    if url.scheme == "tls" or (url.scheme == "tcp" and url.hostname in ("127.0.0.1", "localhost", "::1")):
        return
    raise ValueError(
        f"scheduler={scheduler}: expected tls://HOST:PORT (or tcp:// on this machine); a scheduler "
        "without TLS lets everybody in its network run code on the workers"
    )
