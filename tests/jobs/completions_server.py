"""A server with OpenAI's completions and chat API over a model of transformers, as vLLM answers: for tests."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from loopback import Threaded


def make_app(model: Any, tokenizer: Any, name: str, key: str | None) -> FastAPI:
    app = FastAPI()
    app.state.asked = []

    def refused(request: Request) -> JSONResponse | None:
        app.state.asked.append((request.url.path, request.headers.get("authorization")))
        wrong = key is not None and request.headers.get("authorization") != f"Bearer {key}"
        return JSONResponse({"error": {"message": "wrong key"}}, 401) if wrong else None

    @app.get("/v1/models")
    async def models(request: Request) -> Any:
        room = model.config.max_position_embeddings
        return refused(request) or {"data": [{"id": name, "root": "tiny", "max_model_len": room}]}

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        said = await request.json()
        prompts = said["prompt"] if isinstance(said["prompt"][0], list) else [said["prompt"]]
        answer = echoed if said.get("echo") else written
        choices = [{"index": place, **answer(prompt, said)} for place, prompt in enumerate(prompts)]
        return refused(request) or {"choices": choices}

    @app.post("/v1/chat/completions")
    async def talk(request: Request) -> Any:
        said = await request.json()
        ids = tokenizer.apply_chat_template(said["messages"], add_generation_prompt=True, return_dict=False)
        choices = [{"index": 0, "message": {"role": "assistant", "content": written(ids, said)["text"]}}]
        return refused(request) or {"choices": choices}

    @torch.no_grad()
    def echoed(ids: list[int], said: dict[str, Any]) -> dict[str, Any]:
        """Return the log-probability of each token of the prompt, and of one more, with the best at each place."""
        logs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        ids = [*ids, int(logs[-1].argmax())]
        own = [None, *(float(logs[place, token]) for place, token in enumerate(ids[1:]))]
        best = [None, *({int(row.argmax()): float(row.max())} for row in logs)]
        return {"logprobs": {"token_logprobs": own, "top_logprobs": best}}

    @torch.no_grad()
    def written(ids: list[int], said: dict[str, Any]) -> dict[str, Any]:
        made = model.generate(torch.tensor([ids]), max_new_tokens=said["max_tokens"], do_sample=False)
        text = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        for end in filter(None, said["stop"]):
            text = text.partition(end)[0]
        return {"text": text}

    return app


@contextlib.contextmanager
def served(model: Any, tokenizer: Any, name: str = "tiny", key: str | None = None) -> Iterator[Any]:
    """Serve a model; the server has `url`, and in `asked` the paths and keys of its requests."""
    app = make_app(model, tokenizer, name, key)
    server = Threaded(app)
    server.asked = app.state.asked
    try:
        yield server
    finally:
        server.stop()
