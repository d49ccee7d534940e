"""A teacher that need not be in memory: its signals were captured before, and are read from disk."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlm.section import Section
from kdlm.signal import Head, Rows, Signal, TopK
from kdlm.store import TOKENIZER, AnyFormat, Asked, Store, TopKFormat, of_batch, read_about, rows_of, sequences_of
from kdlm.teachers.calibration import AnyCalibration, Calibration
from kdlm.teachers.local import LocalTeacherSection, SandboxTeacherSection
from kdlm.teachers.openai import OpenAITeacherSection
from kdlm.teachers.served import ServedTeacherSection
from kdlm.teachers.vllm import VLLMTeacherSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Asks = Annotated[
    LocalTeacherSection | SandboxTeacherSection | ServedTeacherSection | OpenAITeacherSection | VLLMTeacherSection,
    Field(discriminator="name"),
]


class CachedTeacher:
    """Answers a batch from a capture (see `kdlm.store`).

    A sequence is found by its tokens, so order, batches, packing and mix may be others than those of the capture. What
    a batch needs is read where the batch is made: with `training.dataloader_num_workers` in worker processes, while
    the student computes.

    Args:
        store: the capture.
        device: where the student trains; the head is kept there.
        calibration: of a top-k signal; without a value of its own, `fit` chooses one.
        made_with: the settings behind the tokens of this run, for the reason that `require` gives.
    """

    provides = frozenset({"teacher"})
    known_text_only = True
    """Methods that train on new text cannot ask it."""

    def __init__(
        self,
        store: Store,
        device: torch.device | str = "cpu",
        *,
        calibration: Calibration | None = None,
        made_with: Mapping[str, Any] | None = None,
    ):
        self.store, self.device, self.made_with = store, torch.device(device), made_with
        self.calibration = calibration
        self._value = None if calibration is None else calibration.value

    @property
    def signals(self) -> frozenset[type]:
        """The kind of signal the capture holds."""
        return frozenset({self.store.format.kind})

    @property
    def vocab_size(self) -> int:
        """The rows of the head that was captured."""
        return self.store.about.vocab_size

    @cached_property
    def _head(self) -> Head | None:
        head = self.store.head()
        return None if head is None else head.to(self.device)

    def prefetch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read what the capture has for the kept rows of a batch, in their order."""
        return self.store.read(of_batch(batch))

    def __call__(self, batch: dict[str, Any], rows: Rows) -> Signal:
        """Return the signal at the kept rows, on their device."""
        record = batch["teacher"] if "teacher" in batch else self.prefetch(batch)
        counts = {len(values) for values in record.values()}
        if counts != {len(rows)}:
            raise ValueError(f"the capture has {counts} rows for a batch with {len(rows)} kept positions")
        there = {name: values.to(rows.index.device, non_blocking=True) for name, values in record.items()}
        signal = self.store.signal(there, self._head)
        if self.calibration is not None and self._value is not None and isinstance(signal, TopK):
            return replace(signal, log_probs=self.calibration.apply(signal.log_probs, self._value))
        return signal

    # The value of a calibration, chosen on held-out rows.

    @property
    def needs_fit(self) -> bool:
        """Whether there is a calibration whose value is still to be chosen."""
        return self.calibration is not None and self._value is None

    def fit(self, batches: Iterable[tuple[dict[str, Any], Rows]], vocab: Any) -> None:
        """Choose the calibration's value on held-out batches. Raises ValueError where there are none."""
        assert self.calibration is not None
        held_out = ((signal, rows.labels) for batch, rows in batches if isinstance(signal := self(batch, rows), TopK))
        self._value, _ = self.calibration.chosen(held_out)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the chosen value."""
        return {} if self._value is None else {"calibration": torch.tensor(self._value, dtype=torch.float64)}

    def readings(self) -> dict[str, float]:
        """Return what was chosen, for the log."""
        return {} if self._value is None else {"teacher_calibration": self._value}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        if "calibration" in state:
            self._value = state["calibration"].item()

    def require(self, rows: Any) -> None:
        """Raise ValueError where the capture does not hold every kept position of these rows, with a likely reason."""
        asked: list[Asked] = [sequence for row in rows_of(rows) for sequence in sequences_of(row)]
        lacking = list(self.store.lacks(asked))
        if lacking:
            number, why = lacking[0]
            raise ValueError(
                f"teacher: {self.store.folder} does not hold {len(lacking)} of these {len(asked)} sequences (sequence "
                f"{number}, of {asked[number].length} tokens: {why}): {self._reason()}; `kdlm capture` with this "
                "recipe adds what is missing"
            )

    def _reason(self) -> str:
        differences = differences_of(self.store.about.data, self.made_with or {})
        return "; ".join(differences) or "other data, or a capture that was not finished"


def differences_of(runs: list[dict[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between the settings now and those of the capture's run that is nearest to them."""
    found = []
    for run in runs:
        changed = [key for key in now if key in run["made_with"] and run["made_with"][key] != now[key]]
        found.append([f"{key} was {run['made_with'][key]!r} and is {now[key]!r}" for key in changed])
    return min(found, key=len, default=[])


class CachedTeacherSection(Section):
    """A teacher whose signals `kdlm capture` wrote to disk: no teacher in memory while the student trains."""

    provides: ClassVar[frozenset[str]] = CachedTeacher.provides
    known_text_only: ClassVar[bool] = CachedTeacher.known_text_only

    name: Literal["cached"] = "cached"
    path: Path
    """Folder of the capture."""
    of: Asks | None = None
    """The teacher that `kdlm capture` asks; training does not need it."""
    format: AnyFormat = Field(default_factory=TopKFormat)  # pyright: ignore[reportArgumentType]
    """What is kept of each position."""
    batch_tokens: int = Field(8192, ge=1)
    """Most tokens, padding among them, that the captured model reads at once."""
    shard_mb: float = Field(64.0, gt=0)
    """Size of a shard, in MiB: what a killed capture does again at most, for each process."""

    calibration: AnyCalibration | None = None
    """Re-calibrate a `top_k` signal as it is read (FIRST, arXiv 2408.12168)."""

    @model_validator(mode="after")
    def _agree(self) -> "CachedTeacherSection":
        if self.calibration is not None and self.format.kind is not TopK:
            raise ValueError(f"calibration: {self.format.name} has no top tokens to re-calibrate; use format top_k")
        if self.of is not None and not self.format.made_from & self.of.signals:
            given = ", ".join(sorted(kind.__name__ for kind in self.of.signals))
            raise ValueError(f"format: {self.format.name} cannot be made of {given}, which is all that `of` gives")
        if self.of is not None and self.of.signals == {TopK} and isinstance(self.format, TopKFormat):
            if (given := getattr(self.of, "k", self.format.k)) < self.format.k:
                raise ValueError(f"format.k: {self.format.k} tokens of a teacher that gives {given}; raise `of.k`")
        return self

    @property
    def signals(self) -> frozenset[type]:
        return frozenset({self.format.kind})

    def build(self, device: torch.device) -> CachedTeacher:
        """Open the capture. Raises ValueError where there is none, or one of another format."""
        store = Store(self.path)
        if store.format != self.format:
            raise ValueError(
                f"teacher.format: {self.path} was captured as {store.format!r}, the recipe says {self.format!r}: "
                "say what was captured, or capture into another folder"
            )
        return CachedTeacher(store, device, calibration=self.calibration)

    def config(self) -> Any:
        """Return what `kdlm check` asks of a model's configuration: the rows of its head."""
        about = read_about(self.path)
        if about is None and self.of is not None:
            return self.of.config()
        from transformers import PretrainedConfig

        return PretrainedConfig(vocab_size=0 if about is None else about.vocab_size)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Open the tokenizer of the model that was, or will be, captured."""
        from transformers import AutoTokenizer

        if (self.path / TOKENIZER).is_dir():
            return AutoTokenizer.from_pretrained(self.path / TOKENIZER)
        if self.of is None:
            raise ValueError(f"teacher.path: there is no capture in {self.path}, and no `of` that says what to capture")
        return self.of.tokenizer()

    def describe(self) -> str:
        """Return the name a reader knows this teacher by."""
        about = read_about(self.path)
        whose = about.teacher if about is not None else self.of.describe() if self.of is not None else "?"
        return f"{whose} ({self.format.name}, from {self.path})"
