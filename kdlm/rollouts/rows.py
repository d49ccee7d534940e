"""Rows: from a row of data to a prompt, and from a prompt and its completion to a row that is trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdlm.rollouts.engine import Completion
from kdlm.signal import IGNORE_INDEX, answers

Row = dict[str, Any]

SAID = -1
"""The turn of a token that an environment said, or that was given."""


@dataclass(frozen=True)
class Opaque:
    """Rows on their way from the loader; no collection to the Trainer and accelerate, who pass it on as it is."""

    rows: list[Row]


@dataclass(frozen=True)
class Written:
    """A completion beside the data row whose prompt it follows.

    Attributes:
        row: the data's.
        prompt: what the student was given.
        completion: what it wrote; of several turns everything after the prompt, with what an environment said between
            them (log-probability 0).
        text: the completion as text, without special tokens.
        reward: what the verifier or the environment said, None without one.
        context: text that the teacher is told beside the prompt, in place of the row's own; "" tells it nothing.
        context_prompt: the whole prompt that the teacher reads, as token ids, in place of one with `context`.
        turns: for each token of the completion the number of the turn in which the student drew it, SAID where the
            environment said it; None where all of it is turn 0.
        turn_rewards: of each turn; empty where there is one.
        feedback: what was said beside the reward, which the student has not read.
        talk: of each turn its text, and what the environment said to it; empty where there is one.
    """

    row: Row
    prompt: list[int]
    completion: Completion
    text: str = ""
    reward: float | None = None
    context: str | None = None
    context_prompt: list[int] | None = None
    turns: list[int] | None = None
    turn_rewards: list[float] = field(default_factory=list)
    feedback: str | None = None
    talk: list[list[str]] = field(default_factory=list)

    @property
    def turn_of(self) -> list[int]:
        """For each token of the completion the number of its turn, SAID where the student did not draw it."""
        return [0] * len(self.completion.ids) if self.turns is None else self.turns

    @property
    def drawn(self) -> int:
        """How many tokens the student drew."""
        return sum(turn != SAID for turn in self.turn_of)

    @property
    def rewards(self) -> list[float]:
        """One for each turn; NaN where nothing judged it."""
        return self.turn_rewards or [math.nan if self.reward is None else self.reward]


def prompt_of(row: Row, leading: int | None) -> list[int]:
    """Return the tokens before the last answer of a row: its last run of trained tokens.

    Of a row with the reading of a teacher that has another tokenizer, it is the last answer which both readings have:
    either may have been cut. Plain text has no prompt, since all of it is trained on: its first `leading` tokens are
    taken. Of a preference it is that of both sides. Raises ValueError where that number is wanted and not given, or the
    text is not longer.
    """
    if "rejected" in row:
        chosen = slice(int(row["seq_lengths"][0]))
        row = {name: row[name][chosen] for name in ("input_ids", "labels")}
    ids = list(map(int, row["input_ids"]))
    first = _last_answer(row)
    if first is None:
        return ids  # a prompt alone
    if first > 1:  # the first token of a text is never trained on
        return ids[:first]
    if leading is None:
        raise ValueError(
            "rollouts.prompt_tokens: the data hold plain text, which has no prompt: say how many of its first tokens "
            "are given, or use data with prompts"
        )
    return ids[: min(leading, len(ids) - 1)]


def their_prompt_of(row: Row) -> list[int] | None:
    """Return the tokens before the same answer in the reading of a teacher with another tokenizer.

    None where the row has no such reading, or is plain text, of which the prompt is the same text for both.
    """
    first = _last_answer(row)
    if "their_ids" not in row or (first is not None and first <= 1):
        return None
    return list(map(int, row["their_ids"][: _last_answer(row, "their_labels")]))


def _last_answer(row: Row, of: str = "labels") -> int | None:
    """Return where the last answer that every reading of the row has begins in one of them; None without answers."""
    starts = {name: answers(row[name]) for name in ("labels", "their_labels") if name in row}
    count = min(map(len, starts.values()))
    return int(starts[of][count - 1]) if count else None


def as_row(written: Written, *, masked: bool) -> Row:
    """Return prompt and completion as a row; `masked` trains on none of it, and nothing on what an environment said.

    Its number, domain and weight are those of the data's row.

    Where a teacher with another tokenizer will read it, the row also says what that teacher reads before and after the
    completion: `their_prompt`, and `their_closing`, which is empty after a completion that was cut.
    """
    row, done = written.row, written.completion
    labels = [
        IGNORE_INDEX if masked or turn == SAID else token for token, turn in zip(done.ids, written.turn_of, strict=True)
    ]
    prompt, theirs = their_prompt_of(row), {}
    if prompt is not None:
        theirs["their_prompt"] = prompt
    if "their_closing" in row:
        theirs["their_closing"] = [] if done.stop == "length" else list(map(int, row["their_closing"]))
    told = {key: row[key] for key in ("asked", "context", "contexts", "bad_context") if key in row}
    if "asked" in row:  # the teacher may be told more, see kdlm.data.contexts
        told["prompt_length"] = len(written.prompt)
        if written.context is not None:
            told["context"] = written.context
        if written.context_prompt is not None:
            told["context_prompt"] = written.context_prompt
    return {
        **told,
        **{key: row[key] for key in ("index", "domain", "weight") if key in row},
        "input_ids": [*written.prompt, *done.ids],
        "labels": [IGNORE_INDEX] * len(written.prompt) + labels,
        **theirs,
    }


def beside(batch: dict[str, Tensor], values: Sequence[Sequence[float]], dtype: torch.dtype, fill: float = 0) -> Tensor:
    """Lay out one number per token as the batch lays out its tokens: padded on the right with `fill`, or end to end."""
    shape = batch["input_ids"].shape
    if (shape[0] == 1 and len(values) != 1) or ("position_ids" in batch and "attention_mask" not in batch):
        return torch.tensor([number for row in values for number in row], dtype=dtype)[None]
    out = torch.full(shape, fill, dtype=dtype)
    for place, row in enumerate(values):
        out[place, : len(row)] = torch.tensor(row, dtype=dtype)
    return out


def describe(batch: dict[str, Tensor], rows: Sequence[Row], written: Sequence[Written | None]) -> dict[str, Tensor]:
    """Return what a batch says of the student's own text beside the tokens; None stands for a row of the data."""
    sizes = [len(row["input_ids"]) for row in rows]
    starts = [len(one.prompt) if one else size for one, size in zip(written, sizes, strict=True)]
    drawn = [one.completion.log_probs if one else [] for one in written]
    logs = [[0.0] * start + own for start, own in zip(starts, drawn, strict=True)]
    turns = [[SAID] * start + (one.turn_of if one else []) for start, one in zip(starts, written, strict=True)]
    sampled = [[turn != SAID for turn in row] for row in turns]
    numbers = [[place] * size for place, size in enumerate(sizes)]
    rewards = [torch.tensor(one.rewards if one else [torch.nan]) for one in written]
    return {
        "sampled": beside(batch, sampled, torch.bool),
        "turn": beside(batch, turns, torch.int64, SAID),
        "log_probs": beside(batch, logs, torch.float32),
        "sequence": beside(batch, numbers, torch.int64),
        "truncated": torch.tensor([bool(one) and one.completion.stop == "length" for one in written]),
        "reward": torch.tensor([one.reward if one and one.reward is not None else torch.nan for one in written]),
        "turn_rewards": pad_sequence(rewards, batch_first=True, padding_value=torch.nan),
    }
