"""Samples: what the student wrote, token by token, as lines of `samples.jsonl` and as a page, `samples.html`."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from kdlm.disk import write_text
from kdlm.losses import IGNORE_INDEX, ReverseKL, kept_rows, teacher_log_probs, token_log_probs, weighted_sum
from kdlm.methods import Readings
from kdlm.methods.method import Batch, Nets
from kdlm.rollouts import SAID, Written
from kdlm.signal import Dense, Hidden, LogProbs, Mixture, Rows, Sampled

KEPT = 60
"""Completions on the page: the newest ones. The lines keep all."""


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        step: optimiser steps done when it was looked at.
        prompt: as text.
        tokens: of the completion, each as text.
        divergence: nats by which student and teacher part at each token: reverse KL over the vocabulary, or, from a
            teacher that scores tokens only, `log q - log p` of the token. With a teacher that has another tokenizer,
            `log q - log p` of the chunk that the token is in, in equal parts on the chunk's tokens; 0 in no chunk.
            Empty without a teacher.
        log_probs: the student's own, of each token, at the temperature that it was drawn at.
        stop: `end` or `length`.
        reward: what the verifier said, None without one.
        version: optimiser steps of the weights that wrote it.
        turns: for each token the number of the turn that it is in, -1 where an environment said it (divergence and
            log-probability are 0 there); None where all of it is one turn.
        feedback: what the verifier or the environment said beside the reward.
    """

    step: int
    prompt: str
    tokens: list[str]
    divergence: list[float]
    log_probs: list[float]
    stop: str
    reward: float | None
    version: int
    turns: list[int] | None = None
    feedback: str | None = None


@dataclass(frozen=True)
class Look:
    """Sampled tokens as student and teacher see them.

    Attributes:
        divergence: of each token, in nats; empty where the teacher cannot tell.
        log_probs: the student's, of each token.
        gap: mean difference, in nats, between them and what the engine gave; None where that is not known.
        compared: tokens whose divergence is known; None for all that have one.
    """

    divergence: list[float]
    log_probs: list[float]
    gap: float | None
    compared: int | None = None

    @property
    def mean(self) -> float:
        """Nats by which the two part at a token that is compared; 0 where that is not known."""
        count = len(self.divergence) if self.compared is None else self.compared
        return math.fsum(self.divergence) / count if count else 0.0


@torch.no_grad()
def look(nets: Nets, batch: Batch, *, temperature: float, vocab: Any) -> Look:
    """Ask student and teacher about the sampled tokens of a batch; `temperature` is what they were drawn at."""
    rows = kept_rows(batch["input_ids"].where(batch["sampled"], IGNORE_INDEX))
    if nets["student"].mask_id is not None:  # what each step saw of the text is not in the batch
        return Look([], rows.of_labels(batch["log_probs"]).tolist(), None)
    student = nets["student"](batch, rows)
    log_q, _ = token_log_probs(student, rows.labels, temperature=temperature)
    gap = (log_q - rows.of_labels(batch["log_probs"])).abs().mean().item()
    if "chunks" in batch and "teacher" in nets:
        divergence, compared = _apart_by_chunks(nets["teacher"], student, rows, batch)
        return Look(divergence, log_q.tolist(), gap, compared)
    teacher = nets["teacher"](batch, rows) if "teacher" in nets else None
    apart = None
    if isinstance(teacher, LogProbs):
        apart = token_log_probs(student, rows.labels)[0] - teacher.log_probs
    elif teacher is not None and not isinstance(teacher, Sampled):
        apart, _ = weighted_sum([("reverse_kl", ReverseKL(), 1.0)], student, teacher, rows.labels, vocab=vocab)
    return Look([] if apart is None else apart.tolist(), log_q.tolist(), gap)


def _apart_by_chunks(teacher: Any, student: Any, rows: Rows, batch: Batch) -> tuple[list[float], int]:
    """Return log q - log p of the chunks, in equal parts on their tokens, and how many tokens are in one."""
    theirs: Any = batch["theirs"]
    their_rows = kept_rows(theirs["labels"])
    signal = teacher(theirs, their_rows)
    if not isinstance(signal, Hidden | Dense | LogProbs | Mixture):  # a few tokens of a place may lack the text's own
        return [], 0
    chunks, their_chunks = rows.of_labels(batch["chunks"]), their_rows.of_labels(theirs["chunks"])
    both = Readings(rows, student, chunks, their_rows, signal, their_chunks)
    log_q, log_p = token_log_probs(student, rows.labels)[0], teacher_log_probs(signal, their_rows.labels)
    gaps = (both.over_chunks(log_q) - both.over_their_chunks(log_p)) / both.lengths()[0].clamp(min=1)
    return pad(gaps, (0, 1))[chunks].tolist(), int((chunks >= 0).sum())


def described(written: Sequence[Written], seen: Look, step: int, tokenizer: Any) -> list[Sample]:
    """Return each completion with its part of a look at all of them."""
    samples, at = [], 0
    for one in written:
        done = one.completion
        part = slice(at, at := at + one.drawn)
        drawn = [turn != SAID for turn in one.turn_of]
        apart, log_probs = (spread(values[part], drawn) for values in (seen.divergence, seen.log_probs))
        tokens = [tokenizer.decode([token]) for token in done.ids]
        shown = (tokens, apart, log_probs, done.stop, one.reward, done.version, one.turns, one.feedback)
        samples.append(Sample(step, tokenizer.decode(one.prompt), *shown))
    return samples


def spread(values: Sequence[float], drawn: Sequence[bool]) -> list[float]:
    """Give each drawn token its value and the others 0; no values stay none."""
    left = iter(values)
    return [next(left) if own else 0.0 for own in drawn] if values else []


class SampleLog:
    """Keeps the samples of a run in its folder; those of steps that a resumed run makes again are made again."""

    def __init__(self, folder: Path):
        self.lines, self.page = folder / "samples.jsonl", folder / "samples.html"
        self._recent: list[Sample] | None = None

    def add(self, samples: Sequence[Sample]) -> None:
        """Write down samples of one step, and the page anew."""
        if not samples:
            return
        if self._recent is None:
            before = [one for one in self.read() if one.step < samples[0].step]
            write_text(self.lines, "".join(map(_line, before)))
            self._recent = before
        with self.lines.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, samples))
        self._recent = [*self._recent, *samples][-KEPT:]
        write_text(self.page, page(self._recent))

    def read(self) -> list[Sample]:
        """Return what is in the folder, oldest first."""
        if not self.lines.is_file():
            return []
        return [Sample(**json.loads(line)) for line in self.lines.read_text(encoding="utf-8").splitlines()]


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample)) + "\n"


def page(samples: Sequence[Sample]) -> str:
    """Return a page that needs nothing else: newest first, each token the redder the more student and teacher part."""
    return HEAD + "\n".join(_article(one) for one in reversed(samples)) + "\n</main></body></html>\n"


def _article(one: Sample) -> str:
    drawn = len(one.tokens) if one.turns is None else sum(turn != SAID for turn in one.turns)
    mean = f", {math.fsum(one.divergence) / drawn:.3f} nats a token" if one.divergence else ""
    reward = "" if one.reward is None else f", reward {one.reward:g}"
    turns = "" if one.turns is None else f" in {max(one.turns) + 1} turns"
    age = one.step - one.version
    old = f", written {age} steps before" if age else ""
    said = "ended by itself" if one.stop == "end" else "cut"
    feedback = "" if one.feedback is None else f"<p>{html.escape(one.feedback)}</p>"
    return (
        f"<article><h2>step {one.step}: {drawn} tokens{turns}, {said}{reward}{mean}{old}</h2>"
        f"<pre><i>{html.escape(one.prompt)}</i>{_spans(one)}</pre>{feedback}</article>"
    )


def _spans(one: Sample) -> str:
    turns = one.turns or [0] * len(one.tokens)
    shades = one.divergence or [0.0] * len(one.tokens)
    return "".join(
        f"<b>{html.escape(token)}</b>" if turn == SAID else _span(token, shade, log_prob)
        for token, shade, log_prob, turn in zip(one.tokens, shades, one.log_probs, turns, strict=True)
    )


def _span(token: str, divergence: float, log_prob: float) -> str:
    strength = 1 - math.exp(-abs(divergence))  # nothing at 0, half at 0.7 nats, all of it far away
    title = f"{divergence:+.3f} nats, probability {math.exp(log_prob):.3g}"
    colour = "210,40,40" if divergence >= 0 else "40,90,210"
    return f'<span title="{title}" style="background:rgba({colour},{strength:.2f})">{html.escape(token)}</span>'


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What the student wrote</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h2 { font-size: 0.9rem; font-weight: 600; margin: 1.5rem 0 0.3rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8884; border-radius: 4px; padding: 0.6rem; }
i { opacity: 0.6; font-style: normal; }
b { opacity: 0.6; font-weight: normal; border-bottom: 1px dotted; }
:root { color-scheme: light dark; }
</style></head><body><main>
<h1>What the student wrote</h1>
<p>Grey: the prompt; grey and dotted: what an environment said between two turns. A token is red where student and
teacher part: by reverse KL, in nats (from a teacher that scores tokens only, or reads other tokens: by log q - log p of
the token, or of the chunk that it is in; blue where it is negative). Hold the pointer over a token for its figures.</p>
"""
