"""A teacher on another machine, served by `kdlm serve`: exact over the whole vocabulary, a few kilobytes a token."""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.models import AnySource
from kdlm.remote import Answers, Remote, ServerUnavailable
from kdlm.server_options import ServerOptions
from kdlm.signal import Head, Hidden, Rows
from kdlm.teachers.local import own_reading
from kdlm.teachers.sequences import question_of
from kdlm.teachers.wire import (
    Question,
    WireError,
    decode_answer,
    digest_of,
    encode_question,
    read_head,
    vocabulary_digest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUEST_TOKENS = 4096
"""Most tokens of a request: a batch goes out in pieces, which the server may answer side by side."""


class ServedTeacher:
    """Answers a batch with hidden states from a `kdlm serve`; the head is fetched once and kept beside the student.

    `prefetch` sends the requests where the batch is made, so that they are answered while the student computes.

    Args:
        remote: asks the server.
        device: where the student trains.

    Raises ServerUnavailable when the server cannot be reached or refuses.
    """

    provides = frozenset({"teacher"})
    signals = frozenset({Hidden})

    def __init__(self, remote: Remote, device: torch.device | str = "cpu"):
        self.remote = remote
        try:
            self.about = self._about()
            self._tokens = min(REQUEST_TOKENS, int(self.about["max_request_tokens"]))
            self._head = self._fetch_head(torch.device(device))
        except BaseException:
            remote.close()
            raise

    @property
    def vocab_size(self) -> int:
        """The number of ids it scores: the rows of its head, padding among them."""
        return self._head.vocab_size

    def fingerprint(self) -> str:
        """Return the digest of the head that is served."""
        return str(self.about["head"])

    @property
    def hidden_size(self) -> int:
        return self._head.weight.shape[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the head out: a worker process only asks, and must not touch the student's device."""
        return self.__dict__ | {"_head": None}

    def prefetch(self, batch: dict[str, Tensor]) -> Answers:
        """Ask for the hidden states of a batch's kept rows; `Answers.result` gives them, on the CPU, piece by piece."""
        return self.remote.ask([partial(self.hidden, part) for part in question_of(batch).split(self._tokens)])

    def __call__(self, batch: dict[str, Any], rows: Rows) -> Hidden:
        """Return the signal at the kept rows, on their device. Raises ServerUnavailable when the server stays away."""
        if "theirs" in batch:
            batch, rows = own_reading(batch, rows)
        answers = batch["teacher"] if "teacher" in batch else self.prefetch(batch)
        parts: list[Tensor] = [self._head.weight.new_empty(0, self.hidden_size, device="cpu"), *answers.result()]
        hidden = torch.cat(parts)
        if len(hidden) != len(rows):
            raise ValueError(f"the server was asked for {len(hidden)} rows of a batch that has {len(rows)}")
        device = rows.index.device
        self._head = self._head.to(device)
        return Hidden(hidden.to(device), self._head)

    def hidden(self, question: Question) -> Float[Tensor, "rows hidden"]:
        """Ask for the last hidden states at a question's rows, on the CPU."""
        (hidden,) = self._ask("/v1/hidden", question, {"hidden": (len(question.rows), int(self.about["hidden_size"]))})
        return hidden

    def scores(
        self, question: Question, asked: Int[Tensor, "rows k"]
    ) -> tuple[Float[Tensor, "rows k"], Float[Tensor, "rows"]]:
        """Ask for the log-probabilities of `asked` ids at a question's rows, and the logits' log-sum-exp there."""
        rows = len(question.rows)
        question = Question(question.ids, question.lengths, question.rows, asked)
        log_probs, total = self._ask(
            "/v1/scores", question, {"log_probs": (rows, asked.shape[1]), "log_sum_exp": (rows,)}
        )
        return log_probs, total

    def close(self) -> None:
        """End the threads and connections."""
        self.remote.close()

    def _ask(self, path: str, question: Question, expected: dict[str, tuple[int, ...]]) -> list[Tensor]:
        """Put a question and return the tensors of the answer. Raises ServerUnavailable when they are not sound."""
        numbers = sum(torch.Size(shape).numel() for shape in expected.values())
        url = f"{self.remote.endpoint}{path}"
        body = self.remote.request("POST", path, content=encode_question(question), limit=8 * numbers + 65536)
        try:
            parts, head = decode_answer(body)
        except WireError as error:
            raise ServerUnavailable(f"{url}: {error}") from error
        if head != self.about["head"]:
            raise ServerUnavailable(
                f"{url}: serves another model than when this run began (its head is {head[:12]}, it was "
                f"{self.about['head'][:12]}); start it again with {self.about['model']} in {self.about['dtype']}"
            )
        got = {name: tuple(part.shape) for name, part in parts.items()}
        if got != expected:
            raise ServerUnavailable(f"{url}: expected {expected}, got {got}")
        if bad := [name for name, part in parts.items() if not bool(part.isfinite().all())]:
            raise ServerUnavailable(
                f"{url}: {', '.join(bad)} has values that are not finite: look at the server's dtype"
            )
        return [parts[name] for name in expected]

    def _about(self) -> dict[str, Any]:
        """Return what the server says of itself."""
        url = f"{self.remote.endpoint}/v1/info"
        try:
            about = json.loads(self.remote.request("GET", "/v1/info", limit=1 << 20))
            missing = {"model", "dtype", "head", "head_bytes", "hidden_size", "max_request_tokens"} - about.keys()
        except (ValueError, AttributeError) as error:
            raise ServerUnavailable(f"{url}: not the answer of a `kdlm serve` ({error})") from error
        if missing:
            raise ServerUnavailable(f"{url}: not the answer of a `kdlm serve`: no {', '.join(sorted(missing))}")
        return about

    def _fetch_head(self, device: torch.device) -> Head:
        with tempfile.TemporaryDirectory(prefix="kdlm-head-") as folder:
            path = Path(folder) / "head.safetensors"
            with open(path, "w+b") as file:
                self.remote.request("GET", "/v1/head", limit=int(self.about["head_bytes"]), into=file)
            if digest_of(path) != self.about["head"]:
                raise ServerUnavailable(f"{self.remote.endpoint}/v1/head: damaged on its way (digest differs)")
            return read_head(path, device)


class ServedTeacherSection(ServerOptions):
    """A frozen model behind a `kdlm serve`, on this machine or another: exact hidden states over the line."""

    provides: ClassVar[frozenset[str]] = ServedTeacher.provides
    signals: ClassVar[frozenset[type]] = ServedTeacher.signals

    name: Literal["served"] = "served"
    of: AnySource = Field()
    """The model that is served. Only its tokenizer and configuration are opened here, to compare the vocabularies."""

    def build(self, device: torch.device) -> ServedTeacher:
        """Reach the server and fetch its head; `device` is where the student trains.

        Raises ValueError when the server's tokenizer is not the one of `of`.
        """
        teacher = ServedTeacher(self.remote(), device)
        theirs = teacher.about.get("tokenizer")
        if theirs is not None and theirs != vocabulary_digest(self.tokenizer()):
            teacher.close()
            raise ValueError(
                f"teacher.of: {self.of.describe()} has another tokenizer than the served {teacher.about['model']}"
            )
        return teacher

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.of.tokenizer()

    def config(self) -> Any:
        return self.of.config()

    def describe(self) -> str:
        """Return the name a reader knows this teacher by."""
        return f"{self.of.describe()} at {self.url}"

    def look(self) -> str:
        """Say what the server is, asked once and briefly. Raises ServerUnavailable or ValueError when it cannot be."""
        remote = self.remote(timeout=2.0, patience=0.1, place="")
        try:
            about = json.loads(remote.request("GET", "/v1/info", limit=1 << 20))
            return f"serves {about['model']} in {about['dtype']}"
        finally:
            remote.close()
