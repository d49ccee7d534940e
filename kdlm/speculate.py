"""`kdlm speculate`: what a draft saves a target on given prompts, decoded here."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kdlm.data import Source
from kdlm.data.encoding import leading_tokens
from kdlm.data.forms import read_messages
from kdlm.data.report import Unusable
from kdlm.data.sources import open_source
from kdlm.data.vocabulary import shared_vocabulary
from kdlm.models import named
from kdlm.speculation import measure


@dataclass(frozen=True)
class Prompt:
    """The token ids that a text begins with, and the place they came from."""

    place: str
    ids: list[int]


def speculate(
    target: str,
    draft: str,
    prompts: str,
    *,
    limit: int = 32,
    prompt_tokens: int = 32,
    dtype: str = "auto",
    device: str = "auto",
    as_json: bool = False,
    **options: Any,
) -> int:
    """Measure a pair of models and print the report; return the exit code.

    Args:
        target, draft: hub id, folder, or `sandbox:code-teacher`.
        prompts: file, folder, hub id, or `sandbox:code/eval`; columns `prompt` (text or messages), `messages` (an
            answer at the end is left off) or `text` (its beginning is the prompt).
        limit: most prompts to read, from the first on.
        prompt_tokens: tokens taken from a row of `text`.
        dtype: of the weights of both; `auto` takes each checkpoint's own.
        device: `cuda:1`, `cpu`, or `auto`, the first GPU if there is one.
        as_json: print one JSON object instead of lines for people.
        options: see `measure`.

    Raises ValueError when a model or the prompts cannot be opened, the two models do not share a tokenizer, or what
    was asked cannot be measured.
    """
    sources = {"target": named(target, dtype=dtype), "draft": named(draft, dtype=dtype)}
    tokenizers = {name: source.tokenizer() for name, source in sources.items()}
    heads = {name: source.config().get_text_config().vocab_size for name, source in sources.items()}
    require_one_tokenizer(tokenizers["target"], tokenizers["draft"], heads["target"], heads["draft"])
    read = read_prompts(prompts, tokenizers["target"], limit, prompt_tokens)
    place = _device(device)
    models = {name: source.load().to(device=place) for name, source in sources.items()}
    report = measure(models["target"], models["draft"], [prompt.ids for prompt in read], **options)
    if as_json:
        about = {"target": target, "draft": draft, "prompts_from": prompts, "device": str(place), "dtype": dtype}
        print(json.dumps(about | report.to_dict(), indent=2))
    else:
        print(f"target: {target}\ndraft: {draft}")
        for line in report.lines():
            print(line)
    return 0


def require_one_tokenizer(
    target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, target_rows: int, draft_rows: int
) -> None:
    """Raise ValueError when the draft's tokens are not the target's, or its head lacks some that the target writes."""
    shared = shared_vocabulary(draft, target, draft_rows, target_rows)
    if shared.conflicts:
        why = "; ".join(shared.conflicts).replace("the student", "the draft").replace("the teacher", "the target")
        raise ValueError(f"target and draft do not share a tokenizer: {why}. Take a draft of the target's family")
    if beyond := sorted(i for i in target.get_vocab().values() if draft_rows <= i < target_rows):
        token = target.convert_ids_to_tokens(beyond[0])
        raise ValueError(
            f"the draft's head has {draft_rows} rows, and the target writes tokens from id {beyond[0]} ({token!r}) on: "
            "resize the draft's embeddings"
        )


def read_prompts(path: str, tokenizer: PreTrainedTokenizerBase, limit: int, prompt_tokens: int) -> list[Prompt]:
    """Return the first prompts of a source; rows without one are said on stderr."""
    source = open_source(Source(path=path), stream=True)
    column = next((name for name in ("prompt", "messages", "text") if name in source.columns), None)
    if column is None:
        raise ValueError(
            f"prompts {path!r}: expected a column `prompt`, `messages` or `text`; its columns are "
            f"{', '.join(map(repr, source.columns))}"
        )
    skipped = []

    def usable() -> Iterator[Prompt]:
        for place, row in source.read([column]):
            try:
                yield Prompt(place, _ids(column, row.get(column), tokenizer, prompt_tokens))
            except Unusable as why:
                skipped.append(f"{place} ({why.reason})")

    found = list(islice(usable(), limit))
    if skipped:
        print(f"kdlm: {len(skipped)} rows without a prompt, the first: {skipped[0]}", file=sys.stderr)
    if len(found) < 2:
        raise ValueError(
            f"prompts {path!r}: {len(found)} of them, expected at least 2: standard errors are over prompts"
        )
    return found


def _ids(column: str, value: Any, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> list[int]:
    if isinstance(value, list):
        messages = read_messages(value, column)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise Unusable("only answers")
        if not tokenizer.chat_template:
            raise ValueError(f"prompts of messages need a chat template; {tokenizer.name_or_path!r} has none")
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not isinstance(value, str) or not value.strip():
        raise Unusable("empty" if value in (None, "") or isinstance(value, str) else "not text")
    ids = [*leading_tokens(tokenizer), *tokenizer(value, add_special_tokens=False, verbose=False)["input_ids"]]
    return ids[:prompt_tokens] if column == "text" else ids


def _device(name: str) -> torch.device:
    """Return the device of that name. Raises ValueError when there is none here."""
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return place
