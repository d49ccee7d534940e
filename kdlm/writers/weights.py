"""Weights of this machine: what tells them from others, and prompts as their tokenizer reads them."""

import hashlib
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from kdlm.data.chat import ChatTemplate
from kdlm.data.encoding import leading_tokens
from kdlm.data.report import Unusable
from kdlm.disk import digest_of_file
from kdlm.models import named, telling_files
from kdlm.writers.writer import Asked, Prompt, Refused, begun


def version_of(path: str, revision: str | None) -> str | None:
    """Return the commit of a model on the hub, or a checksum of the files in its folder.

    Raises ValueError where there is no such model.
    """
    source: Any = named(path, **({} if revision is None else {"revision": revision}))
    folder = Path(source.location()).expanduser()
    if not folder.is_dir():
        return source.config()._commit_hash
    files = [(one, one.stat()) for one in telling_files(folder)]
    told = "".join(f"{one.name} {_content(one, stat.st_size, stat.st_mtime_ns)}\n" for one, stat in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _content(path: Path, size: int, changed: int) -> str:
    return digest_of_file(path)


class Prompts:
    """Prompts as a model of this machine reads them: text after the beginning that the tokenizer puts, messages by its
    chat template, and after that the beginning of an answer to go on with."""

    def __init__(self, tokenizer: Any, template_args: dict[str, Any]):
        self.tokenizer, self.template_args = tokenizer, template_args
        self.leading = leading_tokens(tokenizer)

    def ids(self, asked: Iterable[tuple[int, Asked]], context: int) -> tuple[dict[int, list[int]], dict[int, Refused]]:
        """Return prompts as token ids, by their places, and why others are refused: too long for a context, or a
        conversation that the chat template does not take.
        """
        found, refused = {}, {}
        for place, one in asked:
            try:
                leading, text = self.read(one.prompt)
            except Unusable as why:
                refused[place] = Refused(str(why))
                continue
            ids = [*leading, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
            if 0 < len(ids) < context:
                found[place] = ids
            else:
                refused[place] = Refused(f"{len(ids)} tokens, and the model reads {context}")
        return found, refused

    def read(self, prompt: Prompt) -> tuple[list[int], str]:
        """Return a prompt as text, and the tokens that go before it; a template writes its own.

        Raises Unusable where the template does not take a conversation.
        """
        if isinstance(prompt, str):
            return self.leading, prompt
        messages, beginning = begun(prompt)
        return [], self._chat.text(messages, None, prompt=True) + beginning

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, None, self.template_args)
