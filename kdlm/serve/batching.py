"""Dynamic batching: what arrives while the model computes is its next batch."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from kdlm.serve.metrics import Metrics
from kdlm.teachers.wire import Question

logger = logging.getLogger(__name__)


class Full(Exception):
    """As many requests wait as may."""


class Batcher:
    """Answers questions in a thread of its own, as many at once as fit into a budget of tokens.

    Args:
        answer: questions -> the body of each answer.
        max_batch_tokens: questions are put together up to this; a larger one goes alone.
        max_queue: questions that may wait.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], list[bytes]],
        max_batch_tokens: int,
        max_queue: int,
        metrics: Metrics,
    ):
        self._answer, self._budget, self._metrics = answer, max_batch_tokens, metrics
        self._waiting: queue.Queue[tuple[Question, Future[bytes]] | None] = queue.Queue(max_queue)
        self._held: tuple[Question, Future[bytes]] | None = None  # taken from the queue, too large for the last batch
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kdlm-serve-model", daemon=True)
        self._thread.start()

    def submit(self, question: Question) -> "Future[bytes]":
        """Queue a question. Raises Full when as many wait as may."""
        future: Future[bytes] = Future()
        try:
            self._waiting.put_nowait((question, future))
        except queue.Full:
            raise Full from None
        return future

    @property
    def waiting(self) -> int:
        return self._waiting.qsize()

    def close(self) -> None:
        """End the thread after the batch it is at; what waits is not answered."""
        self._closed.set()
        try:
            self._waiting.put_nowait(None)  # wakes it
        except queue.Full:
            pass
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            batch = [(question, future) for question, future in self._take() if future.set_running_or_notify_cancel()]
            if batch:
                self._work(batch)

    def _take(self) -> "list[tuple[Question, Future[bytes]]]":
        """Wait for a question, and take what waits behind it as far as the budget goes."""
        first = self._held or self._waiting.get()
        self._held = None
        if first is None:
            return []
        taken, tokens = [first], first[0].tokens
        while tokens < self._budget:
            try:
                following = self._waiting.get_nowait()
            except queue.Empty:
                break
            if following is None:
                break
            tokens += following[0].tokens
            if tokens > self._budget:
                self._held = following
                break
            taken.append(following)
        return taken

    def _work(self, batch: "list[tuple[Question, Future[bytes]]]") -> None:
        questions = [question for question, _ in batch]
        try:
            answers = self._answer(questions)
        except Exception as error:
            if len(batch) > 1:  # one of them may be to blame: the others are not to suffer
                for one in batch:
                    self._work([one])
                return
            logger.exception("a request of %d tokens failed", questions[0].tokens)
            batch[0][1].set_exception(error)
            return
        self._metrics.batch(len(questions), sum(q.tokens for q in questions), sum(len(q.rows) for q in questions))
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)
