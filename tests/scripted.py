"""Servers that behave as a test wants: a script of refusals, and OpenAI's API in front of a real model."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from loopback import Threaded


class Scripted:
    """An ASGI application that first answers as its script says, then as the one behind it.

    A step is a status, a status with headers, or the number of seconds (a float) that it keeps silent.
    """

    def __init__(self, app: Any, path: str):
        self.app, self.path = app, path
        self.script: list[Any] = []
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == self.path:
            self.asked += 1
            if self.script:
                step = self.script.pop(0)
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, bytes):
                    await Response(step)(scope, receive, send)
                    return
                else:
                    status, headers = step if isinstance(step, tuple) else (step, {})
                    await JSONResponse({"detail": "as scripted"}, status, headers)(scope, receive, send)
                    return
        await self.app(scope, receive, send)


@contextmanager
def running(app: Any) -> Iterator[str]:
    server = Threaded(app)
    try:
        yield server.url
    finally:
        server.stop()


def openai_api(model: Any, *, most: int = 64, change: Any = None) -> FastAPI:
    """Return vLLM's part of OpenAI's API: /v1/models, and prompt log-probabilities from /v1/completions."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny", "object": "model"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict[str, Any]:
        asked = await request.json()
        assert asked["max_tokens"] == 1 and asked["temperature"] == 0
        if asked["prompt_logprobs"] > most:
            raise HTTPException(400, f"Requested prompt logprobs of {asked['prompt_logprobs']}, greater than {most}")
        said = prompt_logprobs(model, asked["prompt"], asked["prompt_logprobs"])
        return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": change(said) if change else said}]}

    return app


@torch.no_grad()
def prompt_logprobs(model: Any, prompt: Sequence[int], k: int) -> list[dict[str, Any] | None]:
    """Say what vLLM says: the k best of each position and, at any rank, the token that is there; none for the first."""
    log_probs = model(input_ids=torch.tensor([list(prompt)])).logits[0].log_softmax(-1)
    said: list[dict[str, Any] | None] = [None]
    for row, token in zip(log_probs[:-1], prompt[1:], strict=True):
        rank = int((row >= row[token]).sum())
        entries = {str(token): {"logprob": float(row[token]), "rank": rank, "decoded_token": "?"}}
        for place, best in enumerate(row.topk(k).indices.tolist(), 1):
            entries[str(best)] = {"logprob": float(row[best]), "rank": place, "decoded_token": "?"}
        said.append(entries)
    return said
