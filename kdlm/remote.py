"""Asking a server: in time, again where that helps, from threads, and with a clear end when it stays away.

A request is tried until it is answered or `patience` is over, with growing, jittered pauses in between. What will not
mend itself (a wrong key, a request that the server does not take) ends at once with the server's own reason. Nothing
is ever left out of an answer: it comes whole, or an error does.
"""

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BufferedRandom, BytesIO
from queue import SimpleQueue
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

from kdlm.connections import Connections, Endpoint, Passing, ServerRefused, ServerUnavailable

__all__ = ["Answers", "Endpoint", "Passing", "Patience", "Remote", "ServerRefused", "ServerUnavailable"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between tries: doubled from the first to the longest."""
LAST_TRY = 1.0
"""Seconds that the try at the end of the patience has at least."""


class Remote:
    """Asks one server, from a pool of threads. It can be handed to a worker process, which opens its own lines."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._lines: Connections | None = None
        self._away = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.endpoint,)

    def ask(self, calls: Sequence[Callable[[], Any]]) -> "Answers":
        """Start calls that ask this server, and return what gives their results.

        In a worker process of a data loader it waits for them: what crosses to the trainer is their results.
        """
        answers = Answers([self._here().pool.submit(call) for call in calls])
        return answers if get_worker_info() is None else answers.settled()

    def as_answered(self, calls: Iterable[Callable[[], T]]) -> Iterator[tuple[int, T]]:
        """Make calls that ask this server, and yield the result of each with its number, as soon as it is there.

        Calls are taken when there is room for them: twice `concurrency` are under way or next. When one raises, no more
        are taken, the results of those under way are yielded, and then it is raised.
        """
        numbered, waiting = enumerate(calls), dict[int, Future[T]]()
        done: SimpleQueue[int] = SimpleQueue()
        failure: BaseException | None = None
        try:
            while True:
                while failure is None and len(waiting) < 2 * self.endpoint.concurrency:
                    if (following := next(numbered, None)) is None:
                        break
                    number, call = following
                    waiting[number] = self._here().pool.submit(call)
                    waiting[number].add_done_callback(lambda _, number=number: done.put(number))
                if not waiting:
                    break
                future = waiting.pop(number := done.get())
                if future.cancelled():
                    continue
                if (error := future.exception()) is None:
                    yield number, future.result()
                elif failure is None:
                    failure = error
                    for other in waiting.values():
                        other.cancel()
        finally:
            for future in waiting.values():
                future.cancel()
        if failure is not None:
            raise failure

    def json(self, method: str, path: str, *, limit: int, data: Any) -> Any:
        """Return what a server answers as JSON; as `request`."""
        body = self.request(method, path, limit=limit, data=data)
        try:
            return json.loads(body)
        except ValueError as error:
            raise ServerUnavailable(f"{self.endpoint}{path}: an answer that is not JSON ({error})") from error

    def request(
        self,
        method: str,
        path: str,
        *,
        limit: int,
        content: bytes | None = None,
        data: Any = None,
        into: BufferedRandom | None = None,
    ) -> bytes:
        """Return the body of the answer.

        Args:
            limit: most bytes the answer may have.
            content: the body of the request; or
            data: what the body says as JSON.
            into: a file that takes the answer instead; the result is then empty.

        Raises ServerUnavailable when the server stays away for longer than the patience, or refuses.
        """
        headers = {"content-type": "application/octet-stream" if data is None else "application/json"}
        content = content if data is None else json.dumps(data).encode()
        patience = self.patience()
        while True:
            sink = into or BytesIO()
            sink.seek(0)
            sink.truncate()
            try:
                self._try(method, path, content, headers, sink, limit, max(LAST_TRY, patience.left))
            except Passing as failure:
                patience.pause(failure)
            else:
                return sink.getvalue() if isinstance(sink, BytesIO) else b""

    def once(self, method: str, path: str, *, limit: int, data: Any = None) -> Any:
        """Return the JSON of the answer to a single try, None where it is empty.

        Raises Passing when another try may help, ServerUnavailable when none will.
        """
        headers, sink = {"content-type": "application/json"}, BytesIO()
        content = None if data is None else json.dumps(data).encode()
        self._try(method, path, content, headers, sink, limit, self.endpoint.timeout)
        try:
            return json.loads(sink.getvalue() or b"null")
        except ValueError as error:
            raise ServerUnavailable(f"{self.endpoint}{path}: an answer that is not JSON ({error})") from error

    def patience(self) -> "Patience":
        """Return what spaces tries that begin now."""
        return Patience(self)

    def _try(self, *asked: Any) -> None:
        """Make one try, as `Connections.ask`."""
        self._here().ask(*asked)
        if self._away:
            self._away = False
            logger.warning("%s: answers again", self.endpoint)

    def close(self) -> None:
        """End the pauses of requests under way and these themselves, drop those that wait, and hang up."""
        if self._lines is not None and self._lines.pid == os.getpid():
            self._lines.close()

    def _here(self) -> Connections:
        """Return this process's own: sockets and threads cannot be shared across a fork."""
        if self._lines is None or self._lines.pid != os.getpid():
            self._lines = Connections.opened(self.endpoint)
        return self._lines

    def rest(self, seconds: float) -> None:
        """Wait before a request. Raises ServerUnavailable when the run ends meanwhile."""
        if seconds > 0 and self._here().stopped.wait(seconds):
            raise ServerUnavailable(f"{self.endpoint}: the run is over")

    def wait(self, seconds: float, reason: str, left: float) -> None:
        """Pause between tries, and say so once. Raises ServerUnavailable when the run ends meanwhile."""
        if not self._away:
            self._away = True
            logger.warning("%s: %s; trying for another %.0f s", self.endpoint, reason, left)
        self.rest(seconds)


class Patience:
    """Spaces tries with growing, jittered pauses, until the endpoint's patience is over."""

    def __init__(self, remote: Remote):
        self.remote = remote
        self._jitter = random.Random()  # its own: the run's random numbers are not to depend on a server
        self.renew()

    def renew(self) -> None:
        """Begin again, as if nothing had failed."""
        self._end, self._pause = time.monotonic() + self.remote.endpoint.patience, FIRST_PAUSE

    @property
    def left(self) -> float:
        """Seconds until it is over."""
        return self._end - time.monotonic()

    def pause(self, failure: Passing) -> None:
        """Wait before the next try. Raises ServerUnavailable when there is to be none."""
        left, endpoint = self.left, self.remote.endpoint
        if left <= failure.after or left <= 0:
            raise ServerUnavailable(f"{endpoint}: no answer within {endpoint.patience:g} s ({failure})") from None
        wait = min(left, max(failure.after, self._pause * self._jitter.uniform(0.5, 1.0)))
        self.remote.wait(wait, str(failure), left)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


class Answers:
    """What `prefetch` leaves in a batch: answers on their way or, out of a worker process, there.

    It has no `to` and is no collection, so the Trainer and accelerate pass it on as it is.
    """

    def __init__(self, pending: "Sequence[Future[Any] | _Outcome]"):
        self._pending = pending

    def result(self) -> list[Any]:
        """Wait for the answers. Raises ServerUnavailable when one will not come."""
        return [pending.result() for pending in self._pending]

    def settled(self) -> "Answers":
        """Wait here; an error is kept for the one who asks for the result."""
        outcomes = []
        for pending in self._pending:
            try:
                outcomes.append(_Outcome(pending.result()))
            except ServerUnavailable as error:
                outcomes.append(_Outcome(None, str(error)))
        return Answers(outcomes)


@dataclass(frozen=True)
class _Outcome:
    value: Any
    error: str | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise ServerUnavailable(self.error)
        return self.value
