"""What a served model answers: hidden states and log-probabilities at the rows of many questions at once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kdlm.models import Predictor
from kdlm.models.prediction import head
from kdlm.signal import Head, Hidden, Rows
from kdlm.teachers.wire import Limits, Question, encode_answer, write_head

SCORED_ROWS = 256
"""Rows whose logits over the vocabulary are in memory at once."""


@runtime_checkable
class Reader(Protocol):
    """A frozen model that gives hidden states of sequences.

    Attributes:
        head: what turns them into logits.
        input_ids: how many ids it reads.
        longest: tokens of the longest sequence that it reads, None where there is no limit.
    """

    head: Head
    input_ids: int
    longest: int | None

    def __call__(self, sequences: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Float[Tensor, "rows hidden"]]:
        """Return the last hidden states of sequences, given by ids and the rows that are asked, both on the CPU."""
        ...


class ModelReader:
    """Runs a transformers model, sequences padded on the right.

    Raises ValueError when the model's logits are not `head(hidden)`.
    """

    def __init__(self, model: Any):
        self.model = model.eval().requires_grad_(False)
        self._predict = Predictor(self.model)
        if not self._predict.reads_hidden:
            raise ValueError(f"{type(model).__name__} cannot be served: its logits are not head(hidden)")
        self.head = head(self.model)
        self.input_ids = self.model.get_input_embeddings().weight.shape[0]
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def __call__(self, sequences: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        longest = max(len(ids) for ids, _ in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, (own, _) in enumerate(sequences):
            ids[number, : len(own)] = own
            mask[number, : len(own)] = 1
        index = torch.cat([number * longest + rows for number, (_, rows) in enumerate(sequences)])
        device = self.model.device
        batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        index = index.to(device)
        signal = self._predict(batch, Rows(index, index))  # which tokens follow is not looked at
        assert isinstance(signal, Hidden)
        return signal.hidden.split([len(rows) for _, rows in sequences])


class Scorer:
    """Answers questions with what a reader gives.

    Sequences of all questions are sorted by length and read in pieces of at most `max_batch_tokens` tokens, padding
    among them (or one sequence), so that neither a long neighbour nor a large question fills the memory.

    Args:
        reader: the frozen model.
        max_batch_tokens: most tokens, padding among them, that the model reads at once.
        head_file: where the head is written, to be handed out.
    """

    def __init__(self, reader: Reader, max_batch_tokens: int, head_file: Path):
        self._read, self._head = reader, reader.head
        self.max_batch_tokens, self.head_file = max_batch_tokens, head_file
        self.digest = write_head(self._head, head_file)
        longest = reader.longest or max_batch_tokens
        self.limits = Limits(
            input_ids=reader.input_ids,
            scored_ids=self._head.vocab_size,
            max_length=longest,
            max_tokens=max(longest, max_batch_tokens),
        )

    def about(self) -> dict[str, Any]:
        """Return what a client has to know beforehand."""
        return {
            "dtype": str(self._head.weight.dtype).removeprefix("torch."),
            "vocab_size": self._head.vocab_size,
            "hidden_size": self._head.weight.shape[1],
            "max_length": self.limits.max_length,
            "max_request_tokens": self.limits.max_tokens,
            "head": self.digest,
            "head_bytes": self.head_file.stat().st_size,
        }

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[bytes]:
        """Return the body of the answer to each question."""
        return [
            encode_answer(
                {"hidden": hidden} if question.asked is None else self._scores(hidden, question.asked), self.digest
            )
            for question, hidden in zip(questions, self.hidden(questions), strict=True)
        ]

    def hidden(self, questions: Sequence[Question]) -> list[Float[Tensor, "rows hidden"]]:
        """Return the last hidden states at each question's rows, on the model's device."""
        sequences = [
            (number, ids, rows)
            for number, question in enumerate(questions)
            for ids, rows in question.sequences()
            if len(rows)
        ]
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        for piece in pieces([len(ids) for _, ids, _ in sequences], self.max_batch_tokens):
            states = self._read([sequences[at][1:] for at in piece])
            for at, state in zip(piece, states, strict=True):
                found[at] = state
        by_question: list[list[Tensor]] = [[] for _ in questions]
        for (number, _, _), state in zip(sequences, found, strict=True):
            by_question[number].append(state)
        return [torch.cat(states) for states in by_question]

    def _scores(self, hidden: Float[Tensor, "rows hidden"], asked: Int[Tensor, "rows k"]) -> dict[str, Tensor]:
        asked = asked.to(hidden.device)
        totals, values = [], []
        for at in range(0, len(hidden), SCORED_ROWS):
            logits = self._head.logits(hidden[at : at + SCORED_ROWS]).float()
            totals.append(logits.logsumexp(-1))
            values.append(logits.gather(-1, asked[at : at + SCORED_ROWS]) - totals[-1][:, None])
        return {"log_probs": torch.cat(values), "log_sum_exp": torch.cat(totals)}


def pieces(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield groups of sequences of like length whose padded size is within the budget, or that are alone."""
    piece: list[int] = []
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if piece and (len(piece) + 1) * lengths[at] > budget:
            yield piece
            piece = []
        piece.append(at)
    if piece:
        yield piece
