"""Pool: worker processes that judge in time, or are killed and started again.

A worker is a fresh Python that runs `worker.py`: nothing is forked, since the process that trains has threads, whose
locks a fork would take along. It leads a process group, so that what it started goes with it. One thread drives all
workers: no call here waits for one of them for longer than its time.
"""

import contextlib
import json
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from kdlm.verifiers.verifier import LimitedSection, Verdict

CHUNK = 64
"""Items that a worker is handed at once, at most."""
START_LIMIT = 120.0
"""Seconds that a worker may take to start: to import what the verifier needs."""
LOST_IN_A_ROW = 32
"""Workers that may be lost, by a timeout or a crash, without one completion judged in between: more than the samples of
one odd prompt, and few enough to be waited for."""
BOOT = "import sys; sys.path[:] = sys.argv[1:]; from kdlm.verifiers.worker import main; main()"


class Pool:
    """Judges items in `section.workers` processes. Raises ValueError when the verifier cannot be made in them."""

    def __init__(self, section: LimitedSection):
        self._section = section
        self._workers = [Worker(section) for _ in range(section.workers)]
        self._lost = 0
        try:
            for worker in self._workers:
                worker.start()
            while any(worker.starting for worker in self._workers):
                self._turn()
        except BaseException:
            self.close()
            raise

    def judge(self, items: Sequence[bytes], done: Callable[[int, Verdict], None]) -> None:
        """Call `done(number, verdict)` for every item (a pickled completion, reference and row), in any order.

        Raises RuntimeError after `LOST_IN_A_ROW` items that all cost a worker.
        """
        waiting, left = deque(range(len(items))), len(items)
        size = min(CHUNK, math.ceil(len(items) / len(self._workers)))
        try:
            while left:
                for worker in self._workers:
                    if waiting and not worker.given:
                        numbers = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                        worker.give(numbers, [items[number] for number in numbers])
                for number, verdict, lost in self._turn():
                    left -= 1
                    done(number, verdict)
                    self._count(verdict, lost)
                for worker in self._workers:
                    if worker.process is None:  # it was lost: what it had not come to is next
                        waiting.extendleft(reversed(worker.given))
                        worker.given.clear()
        finally:
            for worker in self._workers:
                if worker.given:  # interrupted: what it would still say belongs to no batch
                    worker.kill()
                    worker.given.clear()

    def _count(self, verdict: Verdict, lost: bool) -> None:
        self._lost = self._lost + 1 if lost else 0
        if self._lost >= LOST_IN_A_ROW:
            self._lost = 0
            raise RuntimeError(
                f"verifier {self._section.describe()}: {LOST_IN_A_ROW} completions in a row ended its process (the last"
                f": {verdict.reason}), so nothing is learned from it; mend it or raise its `timeout` of "
                f"{self._section.timeout:g} s"
            )

    def _turn(self) -> list[tuple[int, Verdict, bool]]:
        """Wait until a worker says something, can be told more or is out of time; return what was said of items."""
        busy = [worker for worker in self._workers if worker.deadline < math.inf]
        poll = select.poll()
        for descriptor, event in (each for worker in busy for each in worker.awaits()):
            poll.register(descriptor, event)
        rest = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        ready = {descriptor for descriptor, _ in poll.poll(math.ceil(rest * 1000))}
        return [said for worker in busy for said in worker.attend(ready)]

    def close(self) -> None:
        """End the workers; to judge again would start them again."""
        for worker in self._workers:
            worker.kill()


class Worker:
    """One process, and what it was given to judge.

    Attributes:
        process: None where it is to be started.
        starting: whether it has yet to say that it can judge.
        given: numbers of the items that it has, in their order.
        deadline: when it must have said something, in seconds of `time.monotonic`; infinite when nothing is expected.
    """

    def __init__(self, section: LimitedSection):
        self._section = section
        self.process: subprocess.Popen[bytes] | None = None
        self.starting = False
        self.given: deque[int] = deque()
        self.deadline = math.inf
        self._outbox = memoryview(b"")
        self._inbox = b""

    def start(self) -> None:
        """Start the process; it is ready when it has said so."""
        self.process = process = subprocess.Popen(
            [sys.executable, "-c", BOOT, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, process, os.getpid())  # also when Python ends
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        self.starting, self._inbox = True, b""
        self._outbox = memoryview(pickle.dumps(self._section))
        self.deadline = time.monotonic() + START_LIMIT

    def give(self, numbers: Sequence[int], items: Sequence[bytes]) -> None:
        """Hand items over, to a worker that has none. A process that ended since the last ones is replaced."""
        if self.process is None or os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.kill()
            self.start()
        else:
            self.deadline = time.monotonic() + self._section.patience
        self.given.extend(numbers)
        self._outbox = memoryview(bytes(self._outbox) + pickle.dumps(list(items)))

    def awaits(self) -> Iterator[tuple[int, int]]:
        """Descriptors to wait for, each with what is to happen there."""
        yield self._descriptor("stdout"), select.POLLIN
        if self._outbox:
            yield self._descriptor("stdin"), select.POLLOUT

    def attend(self, ready: set[int]) -> Iterator[tuple[int, Verdict, bool]]:
        """Write and read where that is possible, and end the process if it is out of time.

        Yields (number, verdict, whether the process is lost). Raises ValueError when it cannot start.
        """
        if self._outbox and self._descriptor("stdin") in ready:
            with contextlib.suppress(BrokenPipeError):  # reading will tell that it is gone
                self._outbox = self._outbox[os.write(self._descriptor("stdin"), self._outbox) :]
        answers = self._descriptor("stdout")
        if answers in ready or (time.monotonic() >= self.deadline and _readable(answers)):
            if not (said := os.read(answers, 1 << 16)):
                yield from self._lose(timed_out=False)
            *lines, self._inbox = (self._inbox + said).split(b"\n")
            for line in lines:
                yield from self._hear(Verdict(*json.loads(line)))
        elif time.monotonic() >= self.deadline:
            yield from self._lose(timed_out=True)

    def _hear(self, verdict: Verdict) -> Iterator[tuple[int, Verdict, bool]]:
        if not self.starting:
            yield self.given.popleft(), verdict, False
        elif verdict.outcome != "judged":
            self.kill()
            raise ValueError(f"verifier {self._section.describe()}: {verdict.reason}")
        self.starting = False
        self.deadline = time.monotonic() + self._section.patience if self.given else math.inf

    def _lose(self, timed_out: bool) -> Iterator[tuple[int, Verdict, bool]]:
        """End the process, for which the item that it was at is to blame."""
        starting, limit = self.starting, START_LIMIT if self.starting else self._section.patience
        code = self.kill()
        # killed just now, not ended before; or it was quicker to end itself
        over = (timed_out and code == -signal.SIGKILL) or code == -signal.SIGALRM
        if over:
            reason = f"not done after {limit:g} s"
        else:
            reason = f"ended its process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        if starting:
            raise ValueError(f"verifier {self._section.describe()}: {reason} while it was imported and made")
        yield self.given.popleft(), Verdict(0.0, "timed_out" if over else "raised", reason), True

    def kill(self) -> int:
        """End the process and all of its group; return its exit code. Does nothing where there is none."""
        code = self._end() if self.process is not None else None
        self.process, self.starting, self.deadline, self._outbox = None, False, math.inf, memoryview(b"")
        return code or 0

    def _descriptor(self, stream: Literal["stdin", "stdout"]) -> int:
        return getattr(self.process, stream).fileno()


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _end(process: subprocess.Popen[bytes], owner: int) -> int:
    if os.getpid() != owner:  # a fork of the process that trains, a data worker, is leaving
        return 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # before it is waited for: until then nobody else gets its number
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    return process.wait()
