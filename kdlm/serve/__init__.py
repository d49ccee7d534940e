"""`kdlm serve`: a model's hidden states for students on other machines."""

import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from kdlm import __version__
from kdlm.connections import is_loopback
from kdlm.models import AnySource, device_of, named
from kdlm.server_options import key_in

GRACE = 10
"""Seconds that requests under way get when the server is told to stop."""


def serve(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    engine: Literal["transformers", "vllm"] = "transformers",
    engine_options: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int = 8100,
    key_env: str | None = None,
    max_batch_tokens: int = 8192,
    max_queue: int = 64,
) -> int:
    """Load a model and answer until told to stop; return the exit code.

    Args:
        model: hub id, folder, or `sandbox:code-teacher`.
        dtype: of the weights; `auto` takes the checkpoint's own.
        device: `cuda:1`, `cpu`, or `auto`, the first GPU if there is one.
        engine: what runs the model; vllm chooses its device itself.
        engine_options: handed to `vllm.LLM`.
        host, port: where to listen; port 0 takes a free one.
        key_env: name of the environment variable with the key that clients must send.
        max_batch_tokens: most tokens, padding among them, that the model reads at once.
        max_queue: requests that may wait; further ones are told to come again.

    Raises ValueError for an address that others reach without a key, and for what cannot be served; OSError when the
    address is taken.
    """
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ImportError(f"kdlm serve needs {' and '.join(missing)}: pip install 'kdlm[serve]'")
    key = None if key_env is None else key_in(key_env, "--key-env")
    if key is None and not is_loopback(host):
        raise ValueError(
            f"--host {host}: others could reach this server: give it a key, --key-env NAME with the key in the "
            "environment variable NAME, or keep to 127.0.0.1"
        )
    listening = listen(host, port)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # not at once: the folder is to be removed
    try:
        with listening, tempfile.TemporaryDirectory(prefix="kdlm-serve-") as folder:
            reader = _reader(named(model, dtype=dtype), device, engine, dict(engine_options or {}))
            _run(named(model, dtype=dtype), reader, listening, key, max_batch_tokens, max_queue, Path(folder))
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _run(
    source: AnySource,
    reader: Any,
    listening: socket.socket,
    key: str | None,
    max_batch_tokens: int,
    max_queue: int,
    folder: Path,
) -> None:
    import uvicorn

    from kdlm.serve.app import make_app
    from kdlm.serve.batching import Batcher
    from kdlm.serve.metrics import Metrics
    from kdlm.serve.scoring import Scorer
    from kdlm.teachers.wire import vocabulary_digest

    scorer = Scorer(reader, max_batch_tokens, folder / "head.safetensors")
    about = scorer.about() | {
        "kdlm": __version__,
        "model": source.describe(),
        "tokenizer": vocabulary_digest(source.tokenizer()),
    }
    metrics = Metrics()
    batcher = Batcher(scorer, max_batch_tokens, max_queue, metrics)
    app = make_app(batcher, about, scorer, key, metrics)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=4 * max_queue + 64,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    where = listening.getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    print(
        f"serving {about['model']} ({about['vocab_size']} ids, hidden size {about['hidden_size']}, {about['dtype']}) "
        f"on http://{shown}:{where[1]}",
        flush=True,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        batcher.close()


def _reader(source: AnySource, device: str, engine: str, options: dict[str, Any]) -> Any:
    """Load the model into what runs it."""
    if engine == "vllm":
        from kdlm.serve.engine import EngineReader

        return EngineReader(source, options)
    if options:
        raise ValueError(f"--engine-option {next(iter(options))}: these are for --engine vllm")
    from transformers.utils import logging as hf_logging

    from kdlm.serve.scoring import ModelReader

    hf_logging.disable_progress_bar()
    place = device_of(device)
    loaded: Any = source.load()
    return ModelReader(loaded.to(place))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises OSError in words when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Asyncio switches Nagle's delay off only where the socket says that it is TCP: 40 ms an answer otherwise.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed is started again
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise OSError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port or --host"
        ) from error
    return listening
