"""Connections: what one process has open to a server, and a single try to ask it."""

import contextlib
import ipaddress
import json
import os
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from io import BufferedRandom, BytesIO
from typing import Any
from urllib.parse import urlsplit

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not meet."""


class ServerUnavailable(ConnectionError):
    """A server that gives no answer: it stayed away for longer than the patience, or it refuses."""


class ServerRefused(ServerUnavailable):
    """A request that a server does not take, with the status that it says so by."""

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


class Passing(Exception):
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
        place: the key of the recipe that names it; errors begin with it.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    patience: float = 300.0
    concurrency: int = 8
    place: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.url}" if self.place else self.url


@dataclass
class Connections:
    """What one process has open to an endpoint: sockets, threads, and the event that ends pauses."""

    endpoint: Endpoint
    pid: int
    client: Any
    pool: ThreadPoolExecutor
    stopped: threading.Event
    sockets: "weakref.WeakSet[socket.socket]" = field(default_factory=weakref.WeakSet)

    def ask(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: dict[str, str],
        sink: BytesIO | BufferedRandom,
        limit: int,
        left: float,
    ) -> None:
        """Write the answer to one try into `sink`, in the seconds that are left.

        Raises Passing when another try may help, ServerUnavailable when none will.
        """
        import httpx2

        seconds = min(self.endpoint.timeout, left)
        timeout = httpx2.Timeout(seconds, connect=min(seconds, 10.0))
        until = time.monotonic() + seconds
        url, said = self.endpoint.url + path, f"{self.endpoint}{path}"
        try:
            stream = self.client.stream(
                method, url, content=content, headers=headers, timeout=timeout, extensions={"trace": self.note}
            )
            with stream as response:
                for chunk in response.iter_raw():
                    sink.write(chunk)
                    if time.monotonic() > until:
                        raise Passing(f"the answer took longer than {seconds:g} s")
                    if sink.tell() > limit:
                        raise ServerUnavailable(f"{said}: an answer of more than {limit} bytes, which none should have")
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:  # ours to mend
            raise ServerUnavailable(f"{self.endpoint}: {type(error).__name__}") from None
        except httpx2.TransportError as error:
            raise Passing(str(error) or type(error).__name__) from None
        if response.is_success:
            return
        sink.seek(0)
        reason = f"{response.status_code} {response.reason_phrase}: {_reason(sink.read(65536))}"
        if response.status_code in PASSING:
            raise Passing(reason, _retry_after(response.headers.get("retry-after")))
        raise ServerRefused(f"{said}: refused, {reason}", response.status_code)

    def note(self, event: str, told: Any) -> None:
        """Remember a connection that the client opens: a trace of httpx."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            found = told["return_value"].get_extra_info("socket")
            if isinstance(found, socket.socket):
                self.sockets.add(found)

    def close(self) -> None:
        """End the pauses of requests under way and these themselves, drop those that wait, and hang up."""
        self.stopped.set()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._hang_up()
        self.client.close()

    def _hang_up(self) -> None:
        """End what is read in other threads: to close a socket does not wake who waits for it, and Python waits for
        them before it ends."""
        for each in list(self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    @classmethod
    def opened(cls, endpoint: Endpoint) -> "Connections":
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
        pool = ThreadPoolExecutor(endpoint.concurrency, "kdlm-remote")
        return cls(endpoint, os.getpid(), client, pool, threading.Event())


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
