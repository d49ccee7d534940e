"""A verifier that does what the completion says, for tests of what becomes of it. Workers import it by its name."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

HANGS = {"sleep", "loop", "backtrack"}
"""Completions that take for ever: in C, in Python, and in C that holds the interpreter's lock."""
SAID: dict[str, Any] = {
    "right": True,
    "wrong": False,
    "half": 0.5,
    "mapping": {"score": 0.25, "reason": "so so"},
    "nan": float("nan"),
    "infinite": float("inf"),
    "text": "1",
    "nothing": None,
    "function": lambda: 1,
    "no score": {"points": 1},
    "huge": 10**400,
}
"""What is returned for these completions."""


def judge(completion: str, reference: Any, row: dict[str, Any], **options: Any) -> Any:
    """Misbehave."""
    match completion:
        case "sleep":
            time.sleep(60)
        case "loop":
            while True:
                pass
        case "backtrack":
            re.fullmatch(r"(a+)+$", "a" * 60 + "b")
        case "raise":
            raise KeyError("no such thing")
        case "sys.exit":
            sys.exit(3)
        case "os._exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "print":
            print("[0, null, null]", flush=True)
            os.write(1, b"[1, 2")
            return True
        case "read":
            return float(sys.stdin.read() == "")
        case "alarm":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # takes away what ends an orphan
            time.sleep(60)
        case "pid":
            return os.getpid()
        case "child and sleep":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            with open(reference, "w") as file:
                file.write(str(child.pid))
            time.sleep(60)
        case "modules":
            return {"score": 1, "reason": ",".join(sys.modules)}
        case "echo":
            return {"score": 1, "reason": f"{reference} {row} {options}"}
        case "thread":
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            return True
    return SAID[completion]


class Loaded:
    """A verifier with something that is made once."""

    def __init__(self, words: list[str]):
        self.words, self.calls = set(words), 0

    def __call__(self, completion: str, reference: Any, row: dict[str, Any]) -> float:
        self.calls += 1
        return self.calls if completion == "calls" else completion in self.words
