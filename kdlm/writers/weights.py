"""Weights of this machine: what tells them from others, and prompts as their tokenizer reads them."""

import hashlib
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from kdlm.data.chat import ChatTemplate
from kdlm.data.encoding import leading_tokens
from kdlm.disk import digest_of_file
from kdlm.models import named
from kdlm.writers.writer import Prompt

LEFT_OUT = frozenset({"README.md", ".gitattributes", "training_args.bin"})
"""Files beside weights that say nothing to them."""


def version_of(path: str, revision: str | None) -> str | None:
    """Return the commit of a model on the hub, or a checksum of the files in its folder.

    Raises ValueError where there is no such model.
    """
    source: Any = named(path, **({} if revision is None else {"revision": revision}))
    folder = Path(source.location()).expanduser()
    if not folder.is_dir():
        return source.config()._commit_hash
    files = sorted(one for one in folder.iterdir() if one.is_file() and one.name not in LEFT_OUT)
    told = "".join(f"{one.name} {_content(one, one.stat().st_size, one.stat().st_mtime_ns)}\n" for one in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _content(path: Path, size: int, changed: int) -> str:
    return digest_of_file(path)


class PromptIds:
    """Prompts as token ids: text after the beginning that the tokenizer puts, messages by its chat template."""

    def __init__(self, tokenizer: Any, template_args: dict[str, Any]):
        self.tokenizer, self.template_args = tokenizer, template_args
        self.leading = leading_tokens(tokenizer)

    def __call__(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return [*self.leading, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        return self.tokenizer(self._chat.text(prompt, None, prompt=True), add_special_tokens=False)["input_ids"]

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, None, self.template_args)
