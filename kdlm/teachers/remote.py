"""Asking a server: in time, again where that helps, from threads, and with a clear end when it stays away.

A request is tried until it is answered or `patience` is over, with growing, jittered pauses in between. What will not
mend itself (a wrong key, a request that the server does not take) ends at once with the server's own reason. Nothing
is ever left out of an answer: it comes whole, or an error does.
"""

import ipaddress
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import BufferedRandom, BytesIO
from typing import Any
from urllib.parse import urlsplit

from torch.utils.data import get_worker_info

logger = logging.getLogger(__name__)

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not meet."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between tries: doubled from the first to the longest."""
LAST_TRY = 1.0
"""Seconds that the try at the end of the patience has at least."""


class TeacherUnavailable(ConnectionError):
    """A server that gives no answer: it stayed away for longer than the patience, or it refuses."""


class _Passing(Exception):
    """A failure that another try may mend; `after` is how many seconds the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and how it is asked.

    Attributes:
        url: without a path.
        key: sent as a bearer token; None sends none.
        timeout: seconds that one try may take.
        patience: seconds that a request is tried for.
        concurrency: requests that are under way at once.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    patience: float = 300.0
    concurrency: int = 8


class Remote:
    """Asks one server, from a pool of threads. It can be handed to a worker process, which opens its own lines."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._lines: _Lines | None = None
        self._away = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.endpoint,)

    def ask(self, calls: Sequence[Callable[[], Any]]) -> "Answers":
        """Start calls that ask this server, and return what gives their results.

        In a worker process of a data loader it waits for them: what crosses to the trainer is their results.
        """
        answers = Answers([self._here().pool.submit(call) for call in calls])
        return answers if get_worker_info() is None else answers.settled()

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

        Raises TeacherUnavailable when the server stays away for longer than the patience, or refuses.
        """
        headers = {"content-type": "application/octet-stream" if data is None else "application/json"}
        content = content if data is None else json.dumps(data).encode()
        end = time.monotonic() + self.endpoint.patience
        pause = FIRST_PAUSE
        jitter = random.Random()  # its own: the run's random numbers are not to depend on a server
        while True:
            sink = into or BytesIO()
            sink.seek(0)
            sink.truncate()
            try:
                self._try(method, path, content, headers, sink, limit, max(LAST_TRY, end - time.monotonic()))
            except _Passing as failure:
                left = end - time.monotonic()
                if left <= failure.after or left <= 0:
                    raise self._unavailable(str(failure)) from None
                self._say_away(str(failure), left)
                wait = min(left, max(failure.after, pause * jitter.uniform(0.5, 1.0)))
                if self._here().stopped.wait(wait):
                    raise TeacherUnavailable(f"{self.endpoint.url}: the run is over") from None
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._say_back()
                return sink.getvalue() if isinstance(sink, BytesIO) else b""

    def _try(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: dict[str, str],
        sink: BytesIO | BufferedRandom,
        limit: int,
        left: float,
    ) -> None:
        """Make one try. Raises _Passing when another may help, TeacherUnavailable when none will."""
        import httpx2

        seconds = min(self.endpoint.timeout, left)
        timeout = httpx2.Timeout(seconds, connect=min(seconds, 10.0))
        until = time.monotonic() + seconds
        url = self.endpoint.url + path
        try:
            with self._here().client.stream(method, url, content=content, headers=headers, timeout=timeout) as response:
                for chunk in response.iter_raw():
                    sink.write(chunk)
                    if time.monotonic() > until:
                        raise _Passing(f"the answer took longer than {seconds:g} s")
                    if sink.tell() > limit:
                        raise TeacherUnavailable(f"{url}: an answer of more than {limit} bytes, which none should have")
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:  # ours to mend
            raise TeacherUnavailable(f"{self.endpoint.url}: {type(error).__name__}") from None
        except httpx2.TransportError as error:
            raise _Passing(str(error) or type(error).__name__) from None
        if response.is_success:
            return
        sink.seek(0)
        reason = f"{response.status_code} {response.reason_phrase}: {_reason(sink.read(65536))}"
        if response.status_code in PASSING:
            raise _Passing(reason, _retry_after(response.headers.get("retry-after")))
        raise TeacherUnavailable(f"{url}: refused, {reason}")

    def close(self) -> None:
        """End the pauses of requests under way, drop those that wait, and close the lines."""
        if self._lines is not None and self._lines.pid == os.getpid():
            self._lines.stopped.set()
            self._lines.pool.shutdown(wait=False, cancel_futures=True)
            self._lines.client.close()

    def _here(self) -> "_Lines":
        """Return this process's own lines: sockets and threads cannot be shared across a fork."""
        if self._lines is None or self._lines.pid != os.getpid():
            self._lines = _Lines.opened(self.endpoint)
        return self._lines

    def _unavailable(self, reason: str) -> TeacherUnavailable:
        return TeacherUnavailable(f"{self.endpoint.url}: no answer within {self.endpoint.patience:g} s ({reason})")

    def _say_away(self, reason: str, left: float) -> None:
        if not self._away:
            self._away = True
            logger.warning("teacher %s: %s; trying for another %.0f s", self.endpoint.url, reason, left)

    def _say_back(self) -> None:
        if self._away:
            self._away = False
            logger.warning("teacher %s: answers again", self.endpoint.url)


@dataclass
class _Lines:
    """What one process has open: connections, threads, and the event that ends pauses."""

    pid: int
    client: Any
    pool: ThreadPoolExecutor
    stopped: threading.Event

    @classmethod
    def opened(cls, endpoint: Endpoint) -> "_Lines":
        import httpx2

        headers = {"accept-encoding": "identity"}  # what is counted on its way is what it is
        if endpoint.key is not None:
            headers["authorization"] = f"Bearer {endpoint.key}"
        # Redirects are not followed: the key goes to the server that was named, and nowhere else.
        client = httpx2.Client(
            headers=headers,
            limits=httpx2.Limits(max_connections=endpoint.concurrency + 1),
            trust_env=not is_loopback(urlsplit(endpoint.url).hostname or ""),  # no proxy for this machine
        )
        return cls(os.getpid(), client, ThreadPoolExecutor(endpoint.concurrency, "kdlm-teacher"), threading.Event())


class Answers:
    """What `prefetch` leaves in a batch: answers on their way or, out of a worker process, there.

    It has no `to` and is no collection, so the Trainer and accelerate pass it on as it is.
    """

    def __init__(self, pending: "Sequence[Future[Any] | _Outcome]"):
        self._pending = pending

    def result(self) -> list[Any]:
        """Wait for the answers. Raises TeacherUnavailable when one will not come."""
        return [pending.result() for pending in self._pending]

    def settled(self) -> "Answers":
        """Wait here; an error is kept for the one who asks for the result."""
        outcomes = []
        for pending in self._pending:
            try:
                outcomes.append(_Outcome(pending.result()))
            except TeacherUnavailable as error:
                outcomes.append(_Outcome(None, str(error)))
        return Answers(outcomes)


@dataclass(frozen=True)
class _Outcome:
    value: Any
    error: str | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise TeacherUnavailable(self.error)
        return self.value


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(body: bytes) -> str:
    """Return the reason in an error's body: FastAPI's `detail`, OpenAI's `error.message`, or the text."""
    text = body.decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except ValueError:
        return text.strip()[:300] or "no reason given"
    if isinstance(said, dict):
        error = said.get("error")
        said = said.get("detail") or (error.get("message") if isinstance(error, dict) else error) or said.get("message")
    return str(said or text)[:300]


def _retry_after(value: str | None) -> float:
    """Return the seconds of a Retry-After header, which gives them or a date; 0 where there is none."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
