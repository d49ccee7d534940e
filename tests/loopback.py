"""A `kdlm serve` on this machine for tests: in a thread of this process, or in a process that can be killed."""

import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from forks import start

from kdlm.models import Sandbox
from kdlm.serve import listen
from kdlm.serve.app import make_app
from kdlm.serve.batching import Batcher
from kdlm.serve.metrics import Metrics
from kdlm.serve.scoring import ModelReader, Scorer


@cache
def source(model: str = "code-teacher-tiny") -> Sandbox:
    return Sandbox(model=model)


class Threaded:
    """Any ASGI application on a free port of this machine, in a thread."""

    def __init__(self, app: Any):
        self.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, lifespan="off")
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@contextlib.contextmanager
def served(
    model: Any, /, *, key: str | None = None, max_batch_tokens: int = 512, max_queue: int = 64, **about: Any
) -> Iterator[Any]:
    """Serve a model; the yielded server has `url`, `scorer`, `batcher` and `metrics`."""
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer(ModelReader(model), max_batch_tokens, Path(folder) / "head.safetensors")
        metrics = Metrics()
        batcher = Batcher(scorer, max_batch_tokens, max_queue, metrics)
        app = make_app(batcher, scorer.about() | {"model": "tiny", "tokenizer": None} | about, scorer, key, metrics)
        server = Threaded(app)
        server.scorer, server.batcher, server.metrics = scorer, batcher, metrics
        try:
            yield server
        finally:
            server.stop()
            batcher.close()


class Killable:
    """`kdlm serve` in a process of its own."""

    def __init__(self, *words: str, port: int = 0):
        if not port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
        self.words = ["serve", "--model", "sandbox:code-teacher-tiny", "--port", str(port), *words]
        self.url = f"http://127.0.0.1:{port}"
        self.process: Any = None

    def start(self) -> "Killable":
        self.process = start(*self.words, daemon=True)
        return self

    def wait(self) -> "Killable":
        """Wait until it answers."""
        import httpx2

        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", trust_env=False).is_success:
                    return self
            time.sleep(0.02)
        raise AssertionError("the server does not come up")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
