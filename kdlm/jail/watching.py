"""Watching: a jailed process is heard until it ends or is out of bounds, and what it said is made into a Run."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdlm.jail.limits import MIB, Limits, Outcome, Run, Test
from kdlm.jail.scratch import size
from kdlm.jail.values import same

EVERY = 0.05
"""Seconds between two looks at the folder and the threads of a program."""
THREADS = 64
START_LIMIT = 60.0
"""Seconds that Python may take to start, on a machine that is busy."""
LONGEST = 32 * MIB
"""Bytes of results that are heard."""
WORDS = frozenset({"ready", "refused", "ran", "raised", "passed", "failed"})
LONGEST_TEXT = 8 << 16
"""Digits of a text in hex: what is longer was not written by `inside.py`."""


class Watch:
    """A process with a pipe of output and one of results, whose lines count where they begin with the nonce."""

    def __init__(self, process: subprocess.Popen[bytes], results: int, scratch: str, limits: Limits, nonce: str):
        self._process, self._results, self._scratch, self._limits = process, results, scratch, limits
        self._nonce = nonce.encode()
        self._printed, self._told = bytearray(), bytearray()
        self._outcome: Outcome = "done"
        self._reason: str | None = None

    def wait(self) -> None:
        """Return when the process is over, or has to be."""
        assert self._process.stdout is not None
        kept = {self._process.stdout.fileno(): self._printed, self._results: self._told}
        poll = select.poll()
        for descriptor in kept:
            poll.register(descriptor, select.POLLIN)
        deadline, ready, look = time.monotonic() + START_LIMIT, False, 0.0
        while kept:
            if not (events := poll.poll(1000 * EVERY)) and self._is_over():
                return  # though a fork of this process, made meanwhile, holds its pipes open
            for descriptor, _ in events:
                if said := os.read(descriptor, 1 << 16):
                    kept[descriptor] += said
                else:
                    poll.unregister(descriptor)
                    del kept[descriptor]
            now = time.monotonic()
            if not ready and self._nonce + b" ready" in self._told:
                deadline, ready = now + self._limits.seconds, True
            if now >= deadline:
                seconds = f"{self._limits.seconds:g} s" if ready else f"{START_LIMIT:g} s: Python did not start"
                self._outcome, self._reason = "timed_out", f"not done after {seconds}"
                return
            beyond = self._said_too_much()
            if now >= look and not beyond:
                beyond, look = self._took_too_much(), now + EVERY
            if beyond:
                self._outcome, self._reason = "killed", beyond
                return

    def _is_over(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _said_too_much(self) -> str | None:
        if len(self._printed) > self._limits.output * 1024:
            del self._printed[self._limits.output * 1024 :]
            return f"printed more than {self._limits.output} KiB"
        return f"results of more than {LONGEST // MIB} MiB" if len(self._told) > LONGEST else None

    def _took_too_much(self) -> str | None:
        if size(self._scratch, self._limits.disk * MIB) > self._limits.disk * MIB:
            return f"more than {self._limits.disk} MiB in its folder"
        with contextlib.suppress(OSError):  # no Linux, or over
            threads = (Path("/proc") / str(self._process.pid) / "stat").read_text().rpartition(")")[2].split()[17]
            if int(threads) > THREADS:
                return f"more than {THREADS} threads"
        return None

    def run(self, tests: Sequence[Test]) -> Run:
        """Return what became of the program, whose process is over. Raises RuntimeError where it could not begin."""
        said = self._said(len(tests))
        output = self._printed.decode(errors="replace")
        if ("ready", 0) not in said and self._outcome == "done":
            why = said.get(("refused", 0)) or f"its Python did not start: {output[-500:]}"
            raise RuntimeError(f"the jail was not built, and the program not run: {why}")
        heard = [said.get(("passed", number)) for number in range(len(tests))]
        passed = tuple(map(_passed, tests, heard))
        outcome, reason = self._ending(said)
        if reason is None and not all(passed):
            number = passed.index(False)
            unlike = None if heard[number] is None else f"not the result expected: {heard[number]}"
            reason = f"test {number}: {said.get(('failed', number)) or unlike or 'not reached'}"
        results = tuple(None if isinstance(test, str) else text for test, text in zip(tests, heard, strict=True))
        return Run(outcome, reason, passed, results, output)

    def _said(self, tests: int) -> dict[tuple[str, int], str]:
        """The texts by word and number. A program that found out the nonce may have written anything."""
        said = {}
        for line in bytes(self._told).splitlines():
            if line.startswith(self._nonce):
                with contextlib.suppress(ValueError):
                    _, word, number, text = line.decode().split(" ", 3)
                    if word in WORDS and 0 <= int(number) <= tests and len(text) <= LONGEST_TEXT:
                        said[word, int(number)] = bytes.fromhex(text).decode()
        return said

    def _ending(self, said: Mapping[tuple[str, int], str]) -> tuple[Outcome, str | None]:
        if self._outcome != "done":
            return self._outcome, self._reason
        if ("raised", 0) in said:
            return "raised", said["raised", 0]
        if (code := self._process.returncode) < 0:
            return "killed", f"ended by {signal.Signals(-code).name}"
        if code or ("ran", 0) not in said:
            return "raised", f"ended with exit code {code}"
        return "done", None


def _passed(test: Test, said: str | None) -> bool:
    return said is not None and (isinstance(test, str) or same(said, test["result"]))
