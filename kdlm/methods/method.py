"""Method: what one training step computes, with the networks and the schedule state it owns.

A batch goes to a method; the method asks the student and the teacher's signal; losses turn the two into named terms;
the trainer does the rest. A method never opens a file, never reads the recipe, never touches the optimiser.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kdlm.data import TensorRows
from kdlm.losses import count_kept
from kdlm.roles import EmaOf, Role, Trainable
from kdlm.rollouts import Written
from kdlm.signal import weights_of

Batch = dict[str, Tensor]
"""Of images: `pixel_values` `[batch, channels, height, width]`, `labels` (the class, or IGNORE_INDEX) and `index`, the
number of the row in its split. Of anything else that a denoiser makes: `samples` `[batch, ...]` in their place.

Of texts with a class: `input_ids`, `attention_mask`, `labels` `[batch]` (the class, or IGNORE_INDEX) and `index`.

Of text: `input_ids`, `labels`, and `attention_mask` or `position_ids`. Where the student wrote some of the text there
is, for each token (`[batch, length]`, see `Rows.of_labels`): `sampled`, whether the student drew it; `log_probs`, what
its engine gave it (0 elsewhere); `sequence`, the number of its sequence in the batch; and for each sequence
`truncated`, whether it was cut, and `reward` where there is a verifier (else NaN). Of several turns, `turn` is the
number of the turn in which a token was drawn (-1 elsewhere; `sampled` is false where an environment spoke), and
`turn_rewards` `[sequences, most turns]` has the reward of each (NaN where there is none). `index`, where rows have it,
is that of the row whose prompt a completion follows: equal for completions of one prompt.

`weight` `[sequences]`, where rows have it, is as how many copies of itself each of them counts: in every sum over its
tokens, and in the count that the sum is divided by. Of preferences, `rejected` says of each sequence whether it is the
one to avoid; the one before it is what is preferred, and both have one `index`.

Where a teacher is told more than the student, `informed` says of each sequence whether it is, and `theirs` is the batch
that it reads (see `kdlm.data.contexts`).

Of text with images, beside what the model's processor makes of them: `visual` `[batch, length]`, the number of the
image in the batch that a token belongs to, and -1 at tokens of text; and `theirs`, where the teacher reads images in
another way: its own batch of the same rows."""
Nets = Mapping[str, Any]
"""Role name -> network: a `Predictor` where the role is a language model, else the module itself. `teacher` is one."""


@dataclass(frozen=True)
class After:
    """Words that follow a completion: a teacher told so has read it, and then these, before it reads it again.

    Its prompt is the student's, the tokens that the student drew, and what stands between two turns with the words.
    """

    words: str


Told = str | list[int] | After
"""What a teacher reads beside the prompt: text, words after the completion, or the token ids of a whole prompt."""


def rows_in(batch: Batch) -> Tensor:
    """Return how many rows a batch of images or samples has, on its device: a count for `Method.counts`."""
    return torch.tensor(len(batch["index"]), device=batch["index"].device)


@dataclass(frozen=True)
class Step:
    """Where a run stands.

    Attributes:
        index: optimiser steps done.
        total: how many there will be.
        epoch: whole passes over the data that are done.
        seed: of the run, for what is drawn at random in a step.
        epochs: passes that the run will begin in all.
    """

    index: int
    total: int
    epoch: int = 0
    seed: int = 0
    epochs: int = 1

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return min(1.0, self.index / max(1, self.total))


@dataclass(frozen=True)
class Term:
    """One differentiable part of the loss.

    Attributes:
        sum: scalar, summed over this micro-batch's items (not averaged).
        unit: what the sum is divided by: the number of these in the whole optimiser step, over all ranks.
        weight: factor on the term's mean.
    """

    sum: Tensor
    unit: str = "tokens"
    weight: float = 1.0


@dataclass(frozen=True)
class Terms:
    """What one step computed.

    Attributes:
        terms: the loss, by name: `sum_name weight * sum / count[unit]`.
        metrics: detached scalar sums to log beside the loss, each with its unit.
        followed: as metrics, for the method's own `stepped` alone.
        more: another `Terms` follows once this one's gradient is taken (its graph is freed in between).
    """

    terms: dict[str, Term]
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    followed: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    more: bool = False

    def readings(self) -> dict[str, tuple[Tensor, str]]:
        """Return what is logged: the metrics, and the terms by name where there are several."""
        named = {name: (term.sum, term.unit) for name, term in self.terms.items()} if len(self.terms) > 1 else {}
        return named | self.metrics

    def given_out(self, sums: Mapping[str, Tensor]) -> "Terms":
        """Return these terms with their sums as a wrapper gave them out, its hooks in their graph."""
        return replace(self, terms={name: replace(term, sum=sums[name]) for name, term in self.terms.items()})


@dataclass(frozen=True)
class Preparation:
    """What a method makes training rows of, before the first step.

    Attributes:
        nets: as a step has them, in eval mode; the student as it begins.
        rows: the training rows as they were given.
        collate: rows -> batch.
        seed: of the run. torch's own generators begin with it too, and are put back afterwards.
        device: where the networks are.
        batch_size: how many rows the networks take at once in this run, without gradients.
    """

    nets: Nets
    rows: Any
    collate: Callable[[list[Any]], Batch]
    seed: int
    device: torch.device
    batch_size: int

    def batch(self, numbers: Iterable[int]) -> Batch:
        """Return the given rows of these numbers as a batch on the device."""
        batch = self.collate([self.rows[number] for number in numbers])
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}


class Method:
    """Base of all methods. A subclass gives `losses`; the rest has defaults that fit a single trained student."""

    paper: ClassVar[str] = ""
    needs: frozenset[str] = frozenset()
    """What must be there. Of the teacher: `teacher` (any signal over tokens), `teacher.layers` (its hidden layers),
    `teacher.classes` (a classifier), `teacher.embeddings` (of images and texts), `teacher.masked` (a masked
    autoencoder), `teacher.denoiser`. Of the data: `labels` (tokens to predict), `images`, `texts` (each with a class),
    `pairs` (of image and text), `preferences` (two answers to a prompt, one rejected: rows that no other method takes),
    `samples` (of what a denoiser makes), `visual` (images between the tokens). `unmasking`, `teacher.unmasking`:
    student and teacher are masked language models. `rollouts`: the student's own text, `turns`: several of its turns,
    `reward`: what a verifier says of it, `context`: prompts that the teacher can be told more in (`data.context`),
    `informed`: that the student was told it as it wrote (`rollouts.informed`)."""
    any_text_model: bool = False
    """Whether the student may be a causal language model, a masked one or a classifier of texts. Else `unmasking` among
    its needs says which of the first two it is for."""
    computes: tuple[str, ...] = ()
    """Names of terms that some step of a run has to compute; a run in which none did ends in an error."""
    weighs: bool = False
    """Whether rows count by their `weight`, a row of weight w as w copies of it; a run refuses such rows otherwise. Not
    inherited by a class with `losses` of its own, which has to say it again."""
    by_rows: bool = False
    """Whether its loss is a sum over kept rows of what the networks say at each of them, and looks at no sequence as a
    whole: ranks may then have a part of every sequence each. Not inherited by a class that says anew what it sums,
    counts or asks; that has to say this again too."""
    paced_by: str = "tokens"
    """The unit whose number per second is the pace of a run."""
    ema: float | None = None
    """Decay of an average of the student, the role `average`, which a finished run hands out; None keeps none."""
    runs_parts: bool = False
    """Whether it runs parts of a layer by themselves: of layers in shards (FSDP2) nobody gathers those."""
    follows: tuple[str, ...] = ()
    """Names of the terms, metrics or `followed` sums whose global mean `stepped` wants after every optimiser step."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "losses" in vars(cls) and "weighs" not in vars(cls):
            cls.weighs = False  # who sums anew may have forgotten the weights: nothing is ignored in silence
        if {"losses", "counts", "ask_teacher", "compare"} & vars(cls).keys() and "by_rows" not in vars(cls):
            cls.by_rows = False

    @property
    def roles(self) -> dict[str, Role]:
        average: dict[str, Role] = {} if self.ema is None else {"average": EmaOf("student", self.ema)}
        return {"student": Trainable(), **average}

    @property
    def exported(self) -> str:
        """The role whose weights a finished run hands out: the student, or an average that follows it."""
        return "student" if self.ema is None else "average"

    def active(self, step: int) -> frozenset[str]:
        """Return the roles that update at this optimiser step. A rule of the step alone, the same on every rank."""
        return frozenset(name for name, role in self.roles.items() if isinstance(role, Trainable))

    @property
    def alternates(self) -> bool:
        """Whether `active` changes over the run: each role then counts its learning-rate schedule in its own steps."""
        return type(self).active is not Method.active

    @property
    def leaves_unused(self) -> bool:
        """Whether a step may leave trainable parameters without a gradient, which DDP must be told."""
        return self.alternates

    def text(self, step: Step, draw: float) -> Literal["data", "student", "both"]:
        """Say whose text an optimiser step trains on: the data's, the student's own, or both of them in one batch.

        `draw` is uniform in [0, 1), from the run's seed and the step, and so the same on every rank.
        """
        return "data"

    def told(self, written: Sequence[Written]) -> Sequence[Told] | None:
        """Return what the teacher is told about each completion of the student, beside its prompt.

        Text is written into the prompt by `data.context`; token ids are a whole prompt; `After` makes one of the
        completion itself; "" is nothing. None leaves all to what the data's rows have as `context`. All completions of
        a prompt are there, one after another.
        """
        return None

    def trained_on(self, written: Sequence[Written]) -> None:
        """Take note of the completions that the coming steps train on, once for each round and after `told`.

        They are those of all ranks, in the order of the ranks, so that what is kept of them is the same on each. What
        evaluation draws is not among them.
        """

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return how many items of each unit the batch holds, by their weights, known before any forward pass."""
        return {"tokens": count_kept(batch["labels"], weights_of(batch))}

    def prepare(self, context: Preparation) -> TensorRows | None:
        """Make the rows that the run trains on of the given ones: pairs of the teacher, trajectories of experts.

        Called once, before the first step, on one process; the others and a resumed run read what it made. The rows
        stand in for the training rows (evaluation rows stay as they are) and have what `losses` asks of a batch:
        `index`, and the columns of the given rows that still hold. None: the given rows are trained on.
        """
        return None

    def losses(self, nets: Nets, batch: Batch, active: frozenset[str], step: Step) -> Terms | Iterator[Terms]:
        """Compute one step on one micro-batch. May be a generator of several `Terms`, one backward pass each."""
        raise NotImplementedError

    def evaluate(self, nets: Nets, batch: Batch, step: Step) -> Terms:
        """Compute what evaluation reports on one batch, without gradients and without touching the state."""
        raise NotImplementedError

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        """Return what evaluation reports, from the means over all rows of all ranks: here the means themselves."""
        return means

    def stepped(self, step: Step, means: dict[str, Tensor]) -> None:
        """Move the schedule state after an optimiser step; `means` (of `follows`) is equal on all ranks."""

    def sampler(self) -> Any:
        """Return how a student that is a denoiser writes samples, for evaluation; None for any other student."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the schedule state as tensors, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""


def phases(start: Callable[[], Terms | Iterator[Terms]]) -> Callable[[], Terms]:
    """Return a function that gives a method's `Terms` one by one, each computed when it is asked for."""
    produced: list[Iterator[Terms]] = []

    def advance() -> Terms:
        if produced:
            return next(produced[0])
        first = start()
        if isinstance(first, Terms):
            return first
        produced.append(first)
        return next(first)

    return advance
