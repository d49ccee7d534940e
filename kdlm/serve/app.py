"""The HTTP side of `kdlm serve`: who may ask, how much, and what comes back when something is wrong."""

import asyncio
import hmac
import time
from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdlm.serve.batching import Batcher, Full
from kdlm.serve.metrics import Metrics
from kdlm.serve.scoring import Scorer
from kdlm.teachers.wire import MEDIA_TYPE, WireError, decode_question

BODY_SECONDS = 30.0
"""How long a client may take to send its request."""
COME_AGAIN = {"Retry-After": "1"}


def make_app(batcher: Batcher, about: Mapping[str, Any], scorer: Scorer, key: str | None, metrics: Metrics) -> FastAPI:
    """Return the application. All but `/health` asks for the key, where there is one."""
    app = FastAPI(title="kdlm serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Counted, metrics=metrics)
    guarded = [Depends(_guard(key))]

    async def answered(request: Request, *, scores: bool) -> Response:
        body = await _body(request, scorer.limits.max_body(scores=scores))
        question = decode_question(body, scorer.limits, scores=scores)
        try:
            future = batcher.submit(question)
        except Full:
            raise HTTPException(429, "as many requests wait as may: come again", COME_AGAIN) from None
        try:
            answer = await _unless_gone(request, asyncio.wrap_future(future))
            return Response(status_code=499) if answer is None else Response(answer, media_type=MEDIA_TYPE)
        except Exception as error:  # of the model: out of memory, above all
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise HTTPException(500, f"the model failed: {reason}") from error

    @app.post("/v1/hidden", dependencies=guarded)
    async def hidden(request: Request) -> Response:
        return await answered(request, scores=False)

    @app.post("/v1/scores", dependencies=guarded)
    async def scores(request: Request) -> Response:
        return await answered(request, scores=True)

    @app.get("/v1/head", dependencies=guarded)
    async def head(request: Request) -> Response:
        tag = f'"{scorer.digest}"'
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"ETag": tag})
        return FileResponse(scorer.head_file, media_type=MEDIA_TYPE, headers={"ETag": tag})

    @app.get("/v1/info", dependencies=guarded)
    async def info() -> Mapping[str, Any]:
        return about

    @app.get("/metrics", dependencies=guarded)
    async def numbers() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(batcher.waiting), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(WireError)
    async def refused(request: Request, error: WireError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    return app


def _guard(key: str | None) -> Any:
    """Return the dependency that lets in who sends the key. The comparison takes as long for any wrong one."""
    expected = None if key is None else f"Bearer {key}".encode()

    async def guard(request: Request) -> None:
        sent = request.headers.get("authorization", "").encode()
        if expected is not None and not hmac.compare_digest(sent, expected):
            raise HTTPException(401, "wrong key, or none", {"WWW-Authenticate": "Bearer"})

    return guard


async def _body(request: Request, most: int) -> bytes:
    """Read the request's body, no further than is allowed."""
    too_large = HTTPException(413, f"a request may have {most} bytes", {"Connection": "close"})
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the request did not arrive within {BODY_SECONDS:g} s") from None
    return bytes(body)


async def _unless_gone(request: Request, answer: "asyncio.Future[bytes]") -> bytes | None:
    """Wait for an answer; None, and it is not computed if it still waits, when the client has hung up.

    A client that has lost its patience asks again: without this its old questions would pile up before the new one.
    """
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        gone.cancel()
        answer.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Counted:
    """Counts every answer and how long it took, by path."""

    PATHS = frozenset({"/v1/hidden", "/v1/scores", "/v1/head", "/v1/info", "/metrics", "/health"})

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in self.PATHS else "other"
            self.metrics.request(path, status, time.perf_counter() - began)
