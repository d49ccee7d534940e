"""A server with OpenAI's API whose texts depend on prompt and seed alone, and which fails as a test wants."""

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from loopback import Threaded

Step = Callable[[dict[str, Any]], Any]
"""What answers a request instead of the server; None lets it answer."""


class Server:
    """What it was asked is in `asked`; `script` holds what answers the next requests, `every` what looks at each."""

    url = ""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.script: list[Step | float] = []
        self.every: Step = lambda data: None
        self.seconds = 0.0
        self.under_way = self.most_under_way = 0

    async def answer(self, request: Request, chat: bool) -> Any:
        data = await request.json()
        self.asked.append(data)
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        try:
            step = self.script.pop(0) if self.script else None
            await asyncio.sleep(step if isinstance(step, float) else self.seconds)
            said = step(data) if callable(step) else None
            return said or self.every(data) or completion(data, chat)
        finally:
            self.under_way -= 1


@contextmanager
def openai_server() -> Iterator[Server]:
    server, app = Server(), FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await server.answer(request, True)

    @app.post("/v1/completions")
    async def text(request: Request) -> Any:
        return await server.answer(request, False)

    threaded = Threaded(app)
    server.url = threaded.url
    try:
        yield server
    finally:
        threaded.stop()


def completion(data: dict[str, Any], chat: bool = False, **changes: Any) -> dict[str, Any]:
    """Answer a request; `changes` are those of every choice."""
    prompt = data["messages"][-1]["content"] if chat else data["prompt"]
    choices = []
    for index in range(data["n"]):
        drawn = random.Random(f"{prompt} {data['seed'] + index} {data['temperature']}")
        words = [f"w{drawn.randrange(100)}" for _ in range(drawn.randrange(1, 5))]
        choice: dict[str, Any] = {"index": index, "finish_reason": "stop", "text": " ".join(words)}
        if chat:
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
        if data.get("logprobs") is not None:
            values = [-drawn.random() for _ in words]
            choice["logprobs"] = (
                {"content": [{"logprob": value} for value in values]} if chat else {"token_logprobs": values}
            )
        choices.append(choice | changes)
    usage = {"prompt_tokens": 3, "completion_tokens": 4 * len(choices)}
    return {"choices": choices[::-1], "usage": usage}


def refusal(status: int, reason: str = "as scripted", **headers: str) -> Step:
    """Return a step that refuses."""
    return lambda data: JSONResponse({"error": {"message": reason}}, status, headers)


def body(content: bytes) -> Step:
    """Return a step that answers with these bytes."""
    return lambda data: Response(content, media_type="application/json")
