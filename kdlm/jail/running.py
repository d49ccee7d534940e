"""Running: one program in one process, started, fed, watched, ended and cleaned up after."""

import contextlib
import marshal
import math
import os
import platform
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlm.jail import support
from kdlm.jail.filters import CAPSET, PRCTL, REFUSED, seccomp_filter
from kdlm.jail.limits import MIB, Isolation, Limits, Run, Test
from kdlm.jail.scratch import remove
from kdlm.jail.watching import Watch

INSIDE = Path(__file__).with_name("inside.py")
DEFAULT = Limits()


def run(program: str, tests: Sequence[Test] = (), *, limits: Limits = DEFAULT, isolation: Isolation = "full") -> Run:
    """Run a program, and tests in its names, in a process of its own.

    With `full` isolation it reads only Python's standard library, writes only in a folder that is removed afterwards,
    has no network, no other process and no environment. `limits_only` bounds time and memory, no more: the program can
    do what the user can, and what it starts in a session of its own lives on.

    Raises RuntimeError where this machine cannot isolate.
    """
    if isolation == "full" and (lacks := support.missing()):
        raise RuntimeError(
            f"this machine cannot run generated code in isolation, it lacks {' and '.join(lacks)}. `isolation: "
            "limits_only` runs it with bounded time and memory, and with all that you may do: only for code you trust"
        )
    scratch = tempfile.mkdtemp(prefix="kdlm-jail-")
    results, theirs = os.pipe()
    try:
        process = subprocess.Popen(
            [*support.PYTHON, str(INSIDE), str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=scratch,
            env=support.environment(scratch),
            pass_fds=[theirs],
            start_new_session=True,
        )
        with process:
            try:
                os.close(theirs)
                theirs = -1
                nonce = secrets.token_hex(16)
                watched = Watch(process, results, scratch, limits, nonce)
                order = _order(program, tests, limits, scratch, process.pid, isolation)
                _send(process, marshal.dumps({**order, "nonce": nonce}))
                watched.wait()
            finally:
                _end(process)
        return watched.run(tests)
    finally:
        os.close(results)
        if theirs >= 0:
            os.close(theirs)
        with contextlib.suppress(OSError):  # what is left of it says nothing of the program
            remove(scratch)


def _order(
    program: str, tests: Sequence[Test], limits: Limits, scratch: str, process: int, isolation: Isolation
) -> dict[str, Any]:
    cpu = math.ceil(limits.seconds) + 1
    resources = [
        ("RLIMIT_AS", limits.memory * MIB),
        ("RLIMIT_CPU", cpu),
        ("RLIMIT_FSIZE", limits.disk * MIB),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_MEMLOCK", 0),
    ]
    lock = None
    if isolation == "full":
        machine, version = platform.machine(), support.landlock_version()
        handled = support.handled(version)
        lock = {
            "prctl": getattr(PRCTL, machine),
            "capset": getattr(CAPSET, machine),
            "seccomp": getattr(REFUSED["seccomp"], machine),
            "filter": seccomp_filter(machine, process),
            "handled": handled,
            "size": 24 if version >= 6 else 16 if version >= 4 else 8,
            "rules": [*support.readable(version), (scratch, support.SCRATCH & handled[0])],
        }
    return {
        "owner": os.getpid(),
        "limits": resources,
        "lock": lock,
        "program": program,
        "tests": [(test, False) if isinstance(test, str) else (test["call"], True) for test in tests],
    }


def _send(process: subprocess.Popen[bytes], order: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # that it ended is seen where it is read
        view = memoryview(order)
        while view:
            view = view[stdin.write(view) :]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill its group before it is waited for: until then nobody else gets its number."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says so of a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
