"""Inside: the jailed process. It gives up what it may do, then runs the program and its tests.

It imports nothing of kdlm, and little at all, for it is started anew for every program: `signal` and `typing` alone
would take a third of its time. The order comes as one marshalled mapping over standard input. What becomes of it is
written to the descriptor named by the first argument, line by line: a nonce, a word, the number of a test and a text in
hex.
"""

import ctypes
import marshal
import os
import resource
import struct
import sys

RESULTS = 3
LONGEST = 1 << 16
"""Characters of a text that are sent."""
SIGKILL = 9
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_RULE_PATH_BENEATH = 1
SECCOMP_SET_MODE_FILTER = 1
CAPABILITY_VERSION_3 = 0x20080522


def main() -> None:
    with open(0, "rb", closefd=False) as incoming:
        order = marshal.loads(incoming.read())
    say = _teller(int(sys.argv.pop()), order.pop("nonce"))
    try:
        lock(order)
    except OSError as error:
        say("refused", text=f"{error.filename or ''} {error.strerror}".strip())
        return
    say("ready")
    program, tests = order["program"], order["tests"]
    order.clear()
    perform(program, tests, say)


def lock(order: dict) -> None:
    """Give up, for good and in this order: descriptors, capabilities, resources, files, system calls."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(RESULTS + 1, os.sysconf("SC_OPEN_MAX"))
    if (lockdown := order["lock"]) is not None:
        call = _Calls()
        call("prctl", lockdown["prctl"], PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        if os.getppid() != order["owner"]:
            os._exit(1)  # it was gone before that
        call("prctl", lockdown["prctl"], PR_SET_DUMPABLE, 0, 0, 0, 0)
        call("prctl", lockdown["prctl"], PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call("capset", lockdown["capset"], struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    for kind, value in order["limits"]:
        hard = resource.getrlimit(getattr(resource, kind))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, kind), (value, value))
    if lockdown is not None:
        call("Landlock", LANDLOCK_RESTRICT_SELF, _ruleset(call, lockdown), 0)
        os.closerange(RESULTS + 1, RESULTS + 16)
        steps = lockdown["filter"]
        kept = ctypes.create_string_buffer(steps, len(steps))
        program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(kept))
        call("seccomp", lockdown["seccomp"], SECCOMP_SET_MODE_FILTER, 0, program)


def _ruleset(call: "_Calls", lockdown: dict) -> int:
    attributes = struct.pack("=QQQ", *lockdown["handled"])[: lockdown["size"]]
    ruleset = call("Landlock", LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    for path, rights in lockdown["rules"]:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, file)
        call(f"Landlock, {path}", LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        os.close(file)
    return ruleset


class _Calls:
    """System calls by number. Raises OSError naming what failed."""

    def __init__(self):
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long

    def __call__(self, name: str, number: int, *words: object) -> int:
        got = self._call(ctypes.c_long(number), *(ctypes.c_long(w) if isinstance(w, int) else w for w in words))
        if got < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
        return got


def _teller(descriptor: int, nonce: str):
    os.dup2(descriptor, RESULTS)

    def say(word: str, number: int = 0, text: str = "") -> None:
        line = f"{nonce} {word} {number} {text[:LONGEST].encode(errors='replace').hex()}\n".encode()
        while line:
            line = line[os.write(RESULTS, line) :]

    return say


def perform(program: str, tests: list[tuple[str, bool]], say) -> None:
    """Run the program, as `__main__` where nothing is tested; then each test in its names, if it did not raise."""
    module = type(sys)("program" if tests else "__main__")
    sys.modules[module.__name__] = module
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
        say("ran")
    except BaseException as error:
        if tests or not isinstance(error, SystemExit) or error.code not in (None, 0):
            say("raised", text=_told(error))
            return
        say("ran")
    for number, (source, is_call) in enumerate(tests):
        try:
            code = compile(source, "<test>", "eval" if is_call else "exec")
            value = repr(eval(code, module.__dict__)) if is_call else (exec(code, module.__dict__), "")[1]
            say("passed", number, value)
        except BaseException as error:
            say("failed", number, _told(error))


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".rstrip(": ")
    except BaseException:  # its text is the program's own
        return type(error).__name__


if __name__ == "__main__":
    main()
