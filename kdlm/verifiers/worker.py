"""Worker: the process in which verifiers run that may hang or crash.

It speaks over its standard input and output, which it takes away from the verifier: what that prints goes to standard
error. In come pickles, first the Section, then chunks of pickled items; out goes one line of JSON for the start and one
for every item, `[score, outcome, reason]`. The parent reads no pickle, whatever the verifier does to this process.
"""

import contextlib
import json
import os
import pickle
import signal
from typing import BinaryIO

from kdlm.verifiers.verifier import LimitedSection, Verdict, verdict_of

ORPHANED = 1.0
"""Seconds beyond the timeout after which a worker ends itself: its parent, which may have been killed, has not."""


def main() -> None:
    """Judge what comes until the input ends."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends this process: no lock or C code can be in the way
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as badness:
        badness.write("1000")  # where memory runs out, this process goes before the one that trains
    section: LimitedSection = pickle.load(incoming)
    try:
        verifier = section.verifier()
    except (Exception, SystemExit) as error:
        # a ValueError is written for the user; anything else came out of the code that was imported
        _say(outgoing, Verdict(0.0, "raised", str(error) if isinstance(error, ValueError) else repr(error)))
        return
    _say(outgoing, Verdict(0.0))
    with contextlib.suppress(EOFError):
        while True:
            for item in pickle.load(incoming):
                signal.setitimer(signal.ITIMER_REAL, section.patience + ORPHANED)
                _say(outgoing, verdict_of(lambda item=item: verifier(*pickle.loads(item))))
            signal.setitimer(signal.ITIMER_REAL, 0)


def _say(outgoing: BinaryIO, verdict: Verdict) -> None:
    outgoing.write(json.dumps([verdict.score, verdict.outcome, verdict.reason]).encode() + b"\n")
    outgoing.flush()
