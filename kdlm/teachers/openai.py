"""A teacher behind any server with OpenAI's completions API that gives prompt log-probabilities, such as vLLM."""

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from kdlm.models import AnySource
from kdlm.remote import Answers, Remote, ServerUnavailable
from kdlm.server_options import ServerOptions
from kdlm.signal import LogProbs, Rows, TopK
from kdlm.teachers.local import own_reading
from kdlm.teachers.sequences import question_of
from kdlm.teachers.wire import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENTRY_BYTES = 1024
"""More than a server says of one token at one position."""

Best = tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]


class OpenAITeacher:
    """Answers a batch with the k most probable tokens at every kept row; with k 0, with what the text's own token got.

    Every sequence is a request of its own: token ids as the prompt, and `prompt_logprobs`, whose entry at t + 1 is
    what the model said at t. The one token that the API makes a server generate is thrown away.

    Args:
        remote: asks the server.
        model: the name the server knows the model by.
        k: tokens per row; the server's limit (vLLM: `--max-logprobs`) has to allow it. 0 asks for the text's own
            token alone, which is all that methods on sampled tokens want.
        vocab_size: how many ids the model scores.

    Raises ServerUnavailable when the server cannot be reached or refuses, ValueError when it has no such model.
    """

    provides = frozenset({"teacher"})

    def __init__(self, remote: Remote, model: str, k: int, vocab_size: int):
        self.remote, self.model, self.k, self.vocab_size = remote, model, k, vocab_size
        try:
            known = served_models(remote)
            if model not in known:
                raise ValueError(
                    f"teacher.model: {remote.endpoint.url} serves {', '.join(known) or 'nothing'}, not {model}: "
                    "give the name that the server knows it by"
                )
        except BaseException:
            remote.close()
            raise

    @property
    def signals(self) -> frozenset[type]:
        """The kind of signal it answers with."""
        return frozenset({TopK if self.k else LogProbs})

    def fingerprint(self) -> str:
        """Return the name of the model: the server tells no more of it."""
        return self.model

    def prefetch(self, batch: dict[str, Tensor]) -> Answers:
        """Ask for the best tokens at a batch's kept rows; `Answers.result` gives (ids, log_probs) of each sequence."""
        return self.remote.ask([partial(self.best, part) for part in question_of(batch).split(1)])

    def __call__(self, batch: dict[str, Any], rows: Rows) -> TopK | LogProbs:
        """Return the signal at the kept rows, on their device. Raises ServerUnavailable when the server stays away."""
        if "theirs" in batch:
            batch, rows = own_reading(batch, rows)
        answers = batch["teacher"] if "teacher" in batch else self.prefetch(batch)
        parts: list[Best] = answers.result()
        width = max(1, self.k)
        ids = torch.cat([torch.empty(0, width, dtype=torch.int64), *(part[0] for part in parts)])
        log_probs = torch.cat([torch.empty(0, width), *(part[1] for part in parts)])
        if len(ids) != len(rows):
            raise ValueError(f"the server was asked for {len(ids)} rows of a batch that has {len(rows)}")
        if not self.k:
            return LogProbs(log_probs[:, 0].to(rows.index.device))
        return TopK(ids.to(rows.index.device), log_probs.to(rows.index.device))

    def best(self, question: Question) -> Best:
        """Ask for the k best tokens at the rows of one sequence, best first, or for the next one there; on the CPU."""
        ids = question.ids.tolist()
        asked = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.k,
        }
        limit = len(ids) * (self.k + 1) * ENTRY_BYTES + 65536
        body = self.remote.request("POST", "/v1/completions", data=asked, limit=limit)
        try:
            said = json.loads(body)["choices"][0]["prompt_logprobs"]
            if len(said) != len(ids):
                raise ValueError(f"{len(said)} positions for a prompt of {len(ids)} tokens")
            rows = [
                best_of(said[row + 1], self.k, self.vocab_size) if self.k else of_token(said[row + 1], ids[row + 1])
                for row in question.rows.tolist()
            ]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ServerUnavailable(
                f"{self.remote.endpoint}/v1/completions: prompt_logprobs are not as expected: "
                f"{error if isinstance(error, ValueError) else repr(error)}"
            ) from error
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([values for _, values in rows])

    def close(self) -> None:
        """End the threads and connections."""
        self.remote.close()


def best_of(entries: dict[str, dict[str, Any]], k: int, vocab_size: int) -> tuple[list[int], list[float]]:
    """Return the k most probable ids of one position, best first, and their log-probabilities.

    The server lists the prompt's own token too, wherever it ranks: it counts only when it is one of the best.

    Raises ValueError when fewer than k are there, or a value is not one of a log-probability.
    """
    found = sorted(
        (-float(entry["logprob"]), int(entry.get("rank") or 0), int(token)) for token, entry in entries.items()
    )
    if len(found) < k:
        raise ValueError(f"{len(found)} tokens at a position, {k} were asked for: raise the server's limit, or lower k")
    ids, values = [token for _, _, token in found[:k]], [-value for value, _, _ in found[:k]]
    if len(set(ids)) < k or min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"ids {ids} are not {k} distinct ones below {vocab_size}")
    _check_log_probs(values)
    return ids, values


def of_token(entries: dict[str, dict[str, Any]], token: int) -> tuple[list[int], list[float]]:
    """Return a token and its log-probability, as lists of one. Raises ValueError where the server does not give it."""
    if str(token) not in entries:
        raise ValueError(f"token {token} of the prompt is not among those at its place: {', '.join(entries)}")
    values = [float(entries[str(token)]["logprob"])]
    _check_log_probs(values)
    return [token], values


def _check_log_probs(values: list[float]) -> None:
    if not all(math.isfinite(value) and value <= 1e-3 for value in values):
        raise ValueError(f"{values} are no log-probabilities")


def served_models(remote: Remote) -> list[str]:
    """Return the names of the models that a server has. Raises ServerUnavailable."""
    try:
        return [entry["id"] for entry in json.loads(remote.request("GET", "/v1/models", limit=1 << 20))["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ServerUnavailable(f"{remote.endpoint}/v1/models: not a list of models ({error!r})") from error


class OpenAITeacherSection(ServerOptions):
    """A model behind a server with OpenAI's API that gives prompt log-probabilities: vLLM and its kin."""

    provides: ClassVar[frozenset[str]] = OpenAITeacher.provides

    name: Literal["openai"] = "openai"
    model: str
    """The name that the server knows the model by."""
    of: AnySource
    """The same model as a hub id or folder: its tokenizer and configuration are opened here, its weights are not."""
    k: int = Field(20, ge=0)
    """Tokens per position. vLLM gives 20 at most unless it is started with a larger `--max-logprobs`. 0 asks for the
    text's own token alone: enough for methods on sampled tokens, such as `reverse_kl_advantage`, and for `alm`."""

    @property
    def signals(self) -> frozenset[type]:
        """The kind of signal it answers with."""
        return frozenset({TopK if self.k else LogProbs})

    def build(self, device: torch.device) -> OpenAITeacher:
        """Reach the server and look for the model; `device` is where the student trains."""
        vocab_size = self.config().get_text_config().vocab_size
        return OpenAITeacher(self.remote(), self.model, self.k, vocab_size)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.of.tokenizer()

    def config(self) -> Any:
        return self.of.config()

    def describe(self) -> str:
        """Return the name a reader knows this teacher by."""
        return f"{self.model} at {self.url} ({f'top {self.k}' if self.k else 'own tokens'})"

    def look(self) -> str:
        """Say what the server is, asked once and briefly. Raises ServerUnavailable or ValueError when it cannot be."""
        remote = self.remote(timeout=2.0, patience=0.1, place="")
        try:
            return f"serves {', '.join(served_models(remote))}"
        finally:
            remote.close()
