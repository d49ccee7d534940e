"""Judge: runs a verifier over a batch, in time, and counts what went wrong."""

import logging
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from kdlm.verifiers.pool import Pool
from kdlm.verifiers.verifier import LimitedSection, Verdict, VerifierSection, verdict_of

logger = logging.getLogger(__name__)

KINDS = 16
"""Kinds of failure that are told apart and shown, at most: the first of each, and all others as `others`."""
SHOWN = 120
"""Characters of a completion, reference or row in a message."""


class Judge:
    """A verifier at work. It may be called from any thread; calls wait for each other.

    Verifiers that cannot hang run here; the others in worker processes, which start with the Judge. Raises ValueError
    when the verifier cannot be made: a package is missing, `target` cannot be imported, a file is not there.

    Attributes:
        counts: how many completions were `judged`, `raised` and `timed_out` so far.
        kinds: how many failed in which way: the name of the exception, or what became of the process.
        examples: a message about the first failure of each kind, at most `KINDS`; each was logged as a warning.
    """

    def __init__(self, section: VerifierSection):
        self._name = section.describe()
        self._column = section.column
        self._pool = Pool(section) if isinstance(section, LimitedSection) else None
        self._verifier = section.verifier() if self._pool is None else None
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter(judged=0, raised=0, timed_out=0)
        self.kinds: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def judge(
        self,
        completions: Sequence[str],
        references: Sequence[Any] | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
        *,
        told: Callable[[int, Verdict], None] = lambda number, verdict: None,
    ) -> list[Verdict]:
        """Return one verdict per completion, in their order.

        Args:
            completions: texts after the prompt.
            references: for each what the reference column holds; may be left out where the verifier has no column.
            rows: for each the other columns of its row, of types that can be pickled.
            told: called with the number of a completion and its verdict as soon as it is there, in any order.

        Raises ValueError for lists of different lengths or missing references, RuntimeError when completion after
        completion ends the verifier's process.
        """
        if references is None and self._column is not None and completions:
            raise ValueError(f"verifier {self._name}: no references, expected those of the column {self._column!r}")
        references = [None] * len(completions) if references is None else references
        rows = [{}] * len(completions) if rows is None else rows
        if not len(completions) == len(references) == len(rows):
            raise ValueError(
                f"verifier {self._name}: {len(completions)} completions, {len(references)} references and {len(rows)} "
                "rows, expected as many of each"
            )
        items = list(zip(completions, references, rows, strict=True))
        verdicts: dict[int, Verdict] = {}

        def done(number: int, verdict: Verdict) -> None:
            verdicts[number] = verdict
            self.counts[verdict.outcome] += 1
            if verdict.outcome != "judged":
                self._note(verdict, number, items[number])
            told(number, verdict)

        with self._lock:
            if self._pool is not None:
                self._pool.judge([pickle.dumps(item) for item in items], done)
            else:
                for number, item in enumerate(items):
                    done(number, verdict_of(lambda item=item: self._verifier(*item)))  # type: ignore[misc]
        return [verdicts[number] for number in range(len(items))]

    def _note(self, verdict: Verdict, number: int, item: tuple[str, Any, Mapping[str, Any]]) -> None:
        kind = "timed out" if verdict.outcome == "timed_out" else (verdict.reason or "").partition(":")[0]
        if kind not in self.kinds and len(self.kinds) >= KINDS - 1:
            kind = "others"
        self.kinds[kind] += 1
        if self.kinds[kind] == 1:
            completion, reference, row = (_shown(each) for each in item)
            self.examples[kind] = (
                f"verifier {self._name} {verdict.outcome.replace('_', ' ')} on completion {number}: {verdict.reason}; "
                f"completion {completion}, reference {reference}, row {row}"
            )
            logger.warning("%s. Such completions get score 0 and are counted", self.examples[kind])

    def close(self) -> None:
        """End the worker processes; to judge again would start them again."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shown(value: Any) -> str:
    """Both ends of a value: the answer stands at the end of a completion."""
    if isinstance(value, str) and len(value) > 2 * SHOWN:
        value = f"{value[:SHOWN]} ... {value[-SHOWN:]}"
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN // 2]} ... {shown[-SHOWN // 2 :]}"
