"""lms: models as lm-evaluation-harness asks them.

Each counts a text's likelihood from one beginning of sequence on. The harness's own classes let a tokenizer that adds a
beginning put a second one behind theirs, and count it as text.
"""

import logging
from typing import Any


class _Rolling:
    """Reads whole texts without a beginning that the tokenizer adds: the harness puts one there already."""

    add_bos_token: bool | None

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        kept, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)  # pyright: ignore
        finally:
            self.add_bos_token = kept


class _Served(_Rolling):
    """Puts no beginning before one that a chat template wrote already, as the harness's HFLM does not."""

    add_bos_token: bool

    def tok_encode(self, string: Any, *args: Any, **options: Any) -> Any:
        ids = super().tok_encode(string, *args, **options)  # pyright: ignore
        return self._with_one(ids) if isinstance(string, str) else [self._with_one(each) for each in ids]

    def _with_one(self, ids: list[int]) -> list[int]:
        twice = self.add_bos_token and ids[:2] == [self.prefix_token_id] * 2  # pyright: ignore
        return ids[1:] if twice else ids


def hf(model: Any, tokenizer: Any, batch_size: int | str, max_length: int | None) -> Any:
    """Return a loaded model."""
    from lm_eval.models.huggingface import HFLM

    kind: Any = type("InProcess", (_Rolling, HFLM), {})
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def vllm(path: str, **options: Any) -> Any:
    """Return a model in vLLM. Raises ImportError where there is no vLLM."""
    from lm_eval.models.vllm_causallms import VLLM

    kind: Any = type("InEngine", (_Rolling, VLLM), {})
    return kind(pretrained=path, **options)


def server(section: Any, tokenizer: Any, key: str | None, *, max_length: int, batch_size: int | str, seed: int) -> Any:
    """Return a served model: the harness's `local-completions`, or `local-chat-completions`."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # one request's failure is told; not each of the others'
    # Without a header of ours the harness would send a vendor's key, $OPENAI_API_KEY, to any server.
    ours = {"header": {} if key is None else {"Authorization": f"Bearer {key}"}}
    url = section.url.rstrip("/")
    options: dict[str, Any] = {
        "model": section.model,
        "max_length": max_length,
        "seed": seed,
        "num_concurrent": section.concurrency,
        "timeout": round(section.timeout),
        "max_retries": tries(section.patience),
    }
    if section.chat:
        chat: Any = type("Chat", (LocalChatCompletion,), ours)
        return chat(base_url=f"{url}/v1/chat/completions", tokenizer_backend=None, batch_size=1, **options)
    completions: Any = type("Completions", (_Served, LocalCompletionsAPI), ours)
    return completions(
        base_url=f"{url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=tokenizer.location(),
        add_bos_token=adds_beginning(tokenizer.tokenizer()),
        batch_size=1 if batch_size == "auto" else batch_size,
        **options,
    )


def adds_beginning(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a beginning before a text, as HFLM lets it and the harness's API models do not."""
    return bool(tokenizer("").input_ids)


def tries(patience: float) -> int:
    """Return how many tries fit into some seconds with the harness's pauses of 1, 1, 2, 4, 8, 10, 10 ... seconds."""
    made, spent = 1, 0.0
    while spent < patience:
        spent += min(10.0, max(1.0, 0.5 * 2 ** (made - 1)))
        made += 1
    return made
