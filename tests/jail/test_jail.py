"""What the jail promises: a program does its work, and none of what it tries beside that."""

import os
import platform
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import attempts
import pytest

from kdlm.jail import Limits, missing, run, support
from kdlm.jail.filters import NEWEST, REFUSED
from kdlm.jail.scratch import size
from kdlm.jail.values import same

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {', '.join(missing())}")

SHORT = Limits(seconds=1)
PATIENT = Limits(seconds=60)


def done(program: str, **options) -> str:
    """Run a program that has to end well; return what it printed."""
    found = run(program, limits=options.pop("limits", PATIENT), **options)
    assert (found.outcome, found.reason) == ("done", None), found
    return found.output


def is_running(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def outside(tmp_path):
    """A folder, servers and a signal that a program could reach; names for it, and what they have seen."""
    for name in ("secret", "spare", "spare2", "spare4"):
        (tmp_path / name).write_text("secret")
    seen: list[object] = []
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    path, datagrams = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    name = socket.socket(socket.AF_UNIX)
    path.bind(f"{tmp_path}/socket")
    datagrams.bind(f"{tmp_path}/datagrams")
    name.bind(f"\0kdlm-{tmp_path}")
    path.listen()
    name.listen()
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.append("signal"))
    names = {
        "FOLDER": str(tmp_path),
        "HOME": str(Path.home()),
        "REPOSITORY": __file__,
        "SITE": sysconfig.get_path("purelib"),
        "TCP": tcp.getsockname()[1],
        "UDP": udp.getsockname()[1],
        "NAME": f"kdlm-{tmp_path}",
    }
    sockets = {"TCP": tcp, "UDP": udp, "path": path, "name": name, "datagrams": datagrams}

    def look() -> list[object]:
        for known, each in sockets.items():
            each.setblocking(False)
            try:
                each.recv(1) if each.type == socket.SOCK_DGRAM else each.accept()[0].close()
                seen.append(known)
            except BlockingIOError:
                pass
        files = sorted(tmp_path.iterdir())
        return [*seen, *((each.name, each.stat().st_size, each.stat().st_mode) for each in files)]

    yield "".join(f"{known} = {value!r}\n" for known, value in names.items()), look
    signal.signal(signal.SIGUSR2, before)
    for each in sockets.values():
        each.close()


def each_of(kind: dict[str, str]):
    return pytest.mark.parametrize("attempt", kind.values(), ids=kind.keys())


def refused_inside_and_possible_outside(attempt, outside) -> None:
    names, look = outside
    program = attempts.PREAMBLE + names + "try:\n    {}\nexcept {}:\n    print('refused')\n"
    before = look()
    assert done(program.format(attempt, "OSError")) == "refused\n"
    assert look() == before
    assert "refused" not in done(program.format(attempt, "ZeroDivisionError"), isolation="limits_only")


@each_of(attempts.READS)
def test_nothing_is_read_outside_its_folder(attempt, outside):
    refused_inside_and_possible_outside(attempt, outside)


@each_of(attempts.WRITES)
def test_nothing_is_changed_outside_its_folder(attempt, outside):
    refused_inside_and_possible_outside(attempt, outside)


@each_of(attempts.NETWORK)
def test_no_socket_reaches_anybody(attempt, outside):
    refused_inside_and_possible_outside(attempt, outside)


@each_of(attempts.PROCESSES)
def test_no_process_is_started_or_touched(attempt, outside):
    refused_inside_and_possible_outside(attempt, outside)


def test_no_name_is_looked_up():
    assert done("import socket\ntry:\n    socket.getaddrinfo('localhost', 80)\nexcept OSError:\n    print('no')") in (
        "no\n",
    )


CALL = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def answer(number, *words):
    ctypes.set_errno(0)
    got = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, words))
    return errno.errorcode.get(ctypes.get_errno(), got) if got < 0 else got
"""


def test_every_refused_call_is_refused_when_made_by_number():
    numbers = {name: getattr(each, platform.machine()) for name, each in REFUSED.items()}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    said = done(f"{CALL}\nprint({{name: answer(n, 0, 0, 0, 0, 0, 0) for name, n in {numbers!r}.items()}})")
    assert eval(said) == dict.fromkeys(numbers, "EPERM")


def test_calls_of_later_kernels_are_absent():
    said = done(f"{CALL}\nprint({{answer(n, 0, 0, 0, 0, 0, 0) for n in range({NEWEST}, 600)}})")
    assert eval(said) == {"ENOSYS"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86_64 alone has other sets of calls")
def test_a_call_by_the_numbers_of_x32_is_absent_and_a_32_bit_call_ends_the_process():
    assert done(f"{CALL}\nprint(answer(0x40000000 + 39))") == "ENOSYS\n"
    code = "b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3'"  # mov eax, 20; int 0x80; ret: getpid of 32 bits
    program = f"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write({code})
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print('called')
"""
    found = run(program, limits=PATIENT)
    assert (found.outcome, found.reason, found.output) == ("killed", "ended by SIGSYS", "")


@pytest.mark.parametrize(
    "header, machine",
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "x86_64"), ("/usr/include/asm-generic/unistd.h", "aarch64")],
)
def test_the_numbers_are_those_of_the_kernel(header, machine):
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    lines = [line.split() for line in Path(header).read_text().splitlines() if line.startswith("#define __NR")]
    known = {line[1]: line[2] for line in lines if len(line) > 2}
    from kdlm.jail import filters

    others = (
        "KILL",
        "TGKILL",
        "PRLIMIT64",
        "CLONE",
        "SOCKETPAIR",
        "SENDTO",
        "PRCTL",
        "IOCTL",
        "FCNTL",
        "CAPSET",
        "OPEN",
        "OPENAT",
    )
    ours = REFUSED | {name.lower(): getattr(filters, name) for name in others}
    for name, numbers in ours.items():
        number = getattr(numbers, machine)
        written = known.get(f"__NR_{name}")
        assert known.get(str(written), written) == (None if number is None else str(number)), name


@pytest.mark.parametrize(
    "attempt",
    [
        "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    ],
)
def test_limits_are_not_raised_again(attempt):
    program = f"import resource\ntry:\n    {attempt}\nexcept (ValueError, OSError):\n    print('refused')"
    assert done(program) == "refused\n"


def test_a_thread_has_all_in_common_with_its_process():
    number, files = (56 if platform.machine() == "x86_64" else 220), 0x50F00 & ~0x400
    assert done(f"{CALL}\nprint(answer({number}, {files}, 0, 0, 0, 0))") == "EPERM\n"


FORGED = """
import os, sys
frame = sys._getframe()
while 'say' not in frame.f_locals: frame = frame.f_back
nonce = [cell.cell_contents for cell in frame.f_locals['say'].__closure__][0].encode()
def tell(line): os.write(3, nonce + b' ' + line + b'\\n')
"""


def test_a_program_that_knows_the_nonce_cannot_break_who_reads_it():
    program = FORGED + "for line in (b'passed x 00', b'', b'failed 0 zz', b'passed 0 ff'): tell(line)"
    found = run(program, [{"call": "1", "result": "2"}], limits=PATIENT)
    assert found.outcome == "done" and found.passed == (False,)


def test_of_forged_results_no_more_is_kept_than_there_are_tests():
    """And they are heard in time: a longer text than a test gives, and words and numbers that there are not."""
    program = (
        FORGED
        + """
for number in range(2, 20000): tell(b'passed %d 00' % number)
for number in range(20000): tell(b'word%d 0 00' % number)
tell(b'passed 0 ' + b'31' * 2**22)
"""
    )
    from kdlm.jail.watching import Watch

    heard = []
    said = Watch._said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "_said", lambda self, tests: heard.append(said(self, tests)) or heard[-1])
        found = run(program, [{"call": "1", "result": "1.5"}], limits=PATIENT)
    assert found.results == ("1",) and set(heard[0]) == {("ready", 0), ("ran", 0), ("passed", 0)}


def test_a_long_number_is_compared_in_time():
    begin = time.process_time()
    assert not same("1" * 2**19, "1.5") and same("1" * 2**16 + "x1.5", "1" * 2**16 + "x1.5000000000000002")
    assert time.process_time() - begin < 5  # a guard: by the square of the length it takes minutes


def test_it_cannot_untie_itself_from_its_parent_or_get_a_capability_back():
    program = f"""{CALL}
import struct
prctl, capset, capget = {(157, 126, 125) if platform.machine() == "x86_64" else (167, 91, 90)}
print(answer(prctl, 1, 0, 0, 0, 0))
header, data = struct.pack('=Ii', 0x20080522, 0), struct.pack('=6I', *[2**32 - 1] * 6)
libc.syscall.argtypes = None
had = ctypes.create_string_buffer(24)
libc.syscall(capget, header, had)
print(any(had.raw), libc.syscall(capset, header, data))
"""
    assert done(program) == "EPERM\nFalse -1\n"


def test_it_finds_no_environment_no_input_and_no_descriptor_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLM_SECRET", "secret")
    (tmp_path / "open").write_text("secret")
    with open(tmp_path / "open") as file:
        os.set_inheritable(file.fileno(), True)
        said = done("""
import os, sys
print(sorted(os.environ), repr(sys.stdin.read()))
there = []
for number in range(4096):
    try:
        os.fstat(number)
        there.append(number)
    except OSError:
        pass
print(there)
try:
    os.read(3, 1)
except OSError:
    print('3 is for writing')
""")
    environment, descriptors, results = said.splitlines()
    assert set(eval(environment.removesuffix(" ''"))) <= {
        *("HOME", "TMPDIR", "PYTHONHASHSEED", "LD_LIBRARY_PATH"),
        "LC_CTYPE",  # Python's own, where the locale is C
    }
    assert descriptors == "[0, 1, 2, 3]" and results == "3 is for writing"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal, time\nfor n in set(signal.Signals) - {9, 19}:\n"
        "    signal.signal(n, signal.SIG_IGN)\ntime.sleep(1000)",
        "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()",
        "import atexit, time; atexit.register(time.sleep, 1000)",
        "import os, time; os.close(1); os.close(2); time.sleep(1000)",
        "import os\ntry: os.setsid()\nexcept OSError: pass\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "'a' * 10 ** 8 in 'b' * 1000 or sum(range(10 ** 12))",
        "import re; re.match('(a+)+b', 'a' * 60)",
    ],
)
def test_whatever_takes_too_long_is_ended_with_its_process(program):
    begin = time.monotonic()
    found = run(f"import os\nprint(os.getpid(), flush=True)\n{program}", limits=SHORT)
    assert (found.outcome, found.reason) == ("timed_out", "not done after 1 s")
    assert time.monotonic() - begin < 60  # a guard
    assert not is_running(int(found.output))


def test_it_dies_with_its_parent(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", "from kdlm.jail import *; run('import os, time\\nprint(os.getpid())\\n"
         "open(\"pid\", \"w\").write(str(os.getpid()))\\ntime.sleep(1000)', limits=Limits(seconds=1000))"],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (found := [path.read_text() for path in tmp_path.glob("*/pid")]) or not found[0]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert is_running(int(found[0]))
    parent.kill()
    parent.wait()
    while is_running(int(found[0])):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "program",
    [
        "x = 'x' * 10**10",
        "x = []\nwhile True: x.append(bytearray(10**6))",
        "import mmap; x = mmap.mmap(-1, 10**10)",
        "import ctypes\nx = ctypes.create_string_buffer(10**10)",
    ],
)
def test_memory_ends_where_it_should(program):
    found = run(program, limits=Limits(seconds=60, memory=256))
    assert found.outcome == "raised" and ("MemoryError" in found.reason or "allocate memory" in found.reason)


def test_threads_are_counted():
    program = "import threading, time\nthreading.stack_size(65536)\nfor _ in range(2000):\n    "
    found = run(program + "threading.Thread(target=time.sleep, args=(50,)).start()", limits=PATIENT)
    assert found.outcome == "killed" and found.reason == "more than 64 threads"


@pytest.mark.parametrize("stream", [1, 2])
def test_endless_output_is_cut_and_ends_it(stream):
    found = run(f"import os\nwhile True: os.write({stream}, b'x' * 65536)", limits=Limits(seconds=60, output=8))
    assert (found.outcome, found.reason, found.output) == ("killed", "printed more than 8 KiB", "x" * 8192)


def test_endless_results_end_it():
    found = run("import os\nwhile True: os.write(3, b'x' * 65536)", limits=PATIENT)
    assert found.outcome == "killed" and found.reason.startswith("results of more than")


@pytest.mark.parametrize(
    "program",
    [
        "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(bytes(2**18))",
        "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').close()",
        "while True:\n    os.mkdir('d')\n    os.chdir('d')",
    ],
)
def test_a_full_folder_ends_it_and_is_removed(program, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = run(f"import os\n{program}", limits=Limits(seconds=60, disk=4))
    assert found.outcome == "killed" and found.reason == "more than 4 MiB in its folder"
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_longer_than_the_folder_may_be():
    found = run("open('x', 'wb').write(bytes(2**23))", limits=Limits(seconds=60, disk=4))
    assert found.reason in ("OSError: [Errno 27] File too large", "more than 4 MiB in its folder")


def test_what_vanishes_while_it_is_looked_at_hides_nothing(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(bytes(2**16))
    whole, scan = size(str(tmp_path), 2**30), os.scandir
    real = [entry for entry in scan(tmp_path)]

    class Gone:
        def stat(self, **_):
            raise FileNotFoundError

    class Entries(list):
        __enter__, __exit__ = lambda self: self, lambda self, *_: None

    monkeypatch.setattr(os, "scandir", lambda place: Entries([Gone(), *real]))
    assert size(str(tmp_path), 2**30) == whole > 3 * 2**16


def test_a_folder_that_may_be_written_and_not_listed_is_too_much(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError

    assert size(str(tmp_path / "nothing"), 1) == 0
    monkeypatch.setattr(os, "open", closed)  # to root no folder is closed
    assert size(str(tmp_path), 1) == float("inf")


def test_the_folder_is_removed_whatever_is_left_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = tmp_path.parent / f"{tmp_path.name}-kept"
    kept.mkdir()
    (kept / "file").write_text("stays")
    program = f"""
import os
os.symlink({str(kept)!r}, 'link')
os.mkdir('closed')
open('closed/file', 'w').close()
os.mkdir('none', 0)
for _ in range(200):
    os.mkdir('d' * 100)
    os.chdir('d' * 100)
"""
    assert run(program, limits=PATIENT).outcome in ("done", "killed")  # it may be seen how deep it digs
    assert not list(tmp_path.iterdir()) and (kept / "file").read_text() == "stays"


LEGAL = {
    "json": "import json; assert json.loads(json.dumps({'a': [1, None]})) == {'a': [1, None]}",
    "re": "import re; assert re.findall('[a-z]+', 'ab1c') == ['ab', 'c']",
    "math": "import math, cmath, statistics, fractions, decimal; assert math.isqrt(17) == 4",
    "collections": "import collections, heapq, bisect, itertools, functools; collections.Counter('aab')",
    "dataclasses": "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\nassert A() == A(1)",
    "enum": "import enum, typing, abc\nclass E(enum.Enum):\n    A = 1",
    "pickle": "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
    "tempfile": "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('x'); f.flush()",
    "folders": "import os, shutil\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.rename('a/b/c', 'a/c')\n"
    "assert open('a/c').read() == 'x' and os.listdir('.') == ['a']\nshutil.rmtree('a')",
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 1\nassert asyncio.run(f()) == 1",
    "threads": "import threading, concurrent.futures\nwith concurrent.futures.ThreadPoolExecutor(4) as pool:\n"
    "    assert list(pool.map(abs, [-1, 2])) == [1, 2]",
    "deep recursion": "import sys, threading\nsys.setrecursionlimit(20000)\nthreading.stack_size(2**26)\n"
    "f = lambda n: n and f(n - 1)\nt = threading.Thread(target=f, args=(15000,)); t.start(); t.join()",
    "libraries": "import ctypes, hashlib, sqlite3, zlib, bz2, lzma, ssl, uuid, secrets, random\n"
    "sqlite3.connect(':memory:').execute('select 1'); hashlib.sha256(b''); random.random(); uuid.uuid4()",
    "its own signals": "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *_: None)\n"
    "os.kill(os.getpid(), signal.SIGUSR1); signal.raise_signal(signal.SIGUSR1)",
    "time": "import time, datetime, calendar; time.sleep(0.001); datetime.datetime.now(); time.localtime()",
    "text": "import textwrap, difflib, string, unicodedata; print('\\N{SNOWMAN}'); 'x'.encode('utf-16')",
    "main": "if __name__ == '__main__':\n    print('main')\nelse:\n    raise RuntimeError",
    "exit": "import sys; sys.exit(0)",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test_one(self): self.assertEqual(1, 1)\n"
    "unittest.main()",
}


@pytest.mark.parametrize("program", LEGAL.values(), ids=LEGAL.keys())
def test_a_program_that_minds_its_own_business_runs(program):
    done(program)


def test_tests_pass_fail_and_compare_results_that_the_program_does_not_know():
    program = "def double(x):\n    if x == 7: raise KeyError(x)\n    return 2 * x\n"
    program += "if __name__ == '__main__': raise RuntimeError"
    tests = [
        "assert double(2) == 4",
        "assert double(2) == 5",
        {"call": "double('ab')", "result": "'abab'"},
        {"call": "double(0.1)", "result": "0.20000000000000004"},
        {"call": "double(1)", "result": "2.0"},
        {"call": "double(7)", "result": "14"},
        "not python",
    ]
    found = run(program, tests, limits=PATIENT)
    assert found.passed == (True, False, True, True, False, False, False)
    assert found.outcome == "done" and found.reason == "test 1: AssertionError"


@pytest.mark.parametrize(
    "program, outcome, reason",
    [
        ("def f(:", "raised", "SyntaxError"),
        ("1 / 0", "raised", "ZeroDivisionError: division by zero"),
        ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "raised", "E"),
        ("import os; os._exit(0)", "raised", "ended with exit code 0"),
        ("import os; os._exit(3)", "raised", "ended with exit code 3"),
        ("import sys; sys.exit(0)", "raised", "SystemExit: 0"),
        ("import ctypes; ctypes.string_at(0)", "killed", "ended by SIGSEGV"),
        ("import os\nos.write(3, b'passed 0 \\n0 passed 0 \\n')\nos._exit(0)", "raised", "ended with exit code 0"),
        ("print('\\0' * 99 + 'passed 0')\nraise SystemExit", "raised", "SystemExit"),
        ("x = '\\ud800'\nraise ValueError(x)", "raised", "ValueError: ?"),
    ],
)
def test_what_ends_before_its_tests_passes_none(program, outcome, reason):
    found = run(program, ["pass"], limits=PATIENT)
    assert found.outcome == outcome and found.reason.startswith(reason) and found.passed == (False,)


def test_tests_before_the_one_that_hangs_count():
    found = run("def f(x):\n    while x: pass", ["f(0)", "f(1)", "f(0)"], limits=SHORT)
    assert found.passed == (True, False, False) and found.outcome == "timed_out"


def test_runs_do_not_meet():
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: done(f"import os; print({n}, os.listdir('.'))")}))
        for n in range(4)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {n: f"{n} []\n" for n in range(4)}


def test_a_machine_that_cannot_isolate_says_what_it_lacks_unless_limits_are_enough(monkeypatch):
    monkeypatch.setattr(support, "missing", lambda: ["Landlock"])
    with pytest.raises(RuntimeError, match=r"it lacks Landlock.*limits_only"):
        run("print(1)")
    assert done("print(1)", isolation="limits_only") == "1\n"


def test_a_jail_that_is_not_finished_runs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(support, "handled", lambda version: (2**40 - 1, 3, 3))
    with pytest.raises(RuntimeError, match="the jail was not built, and the program not run: Landlock"):
        run(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


def test_limits_hold_without_isolation_too():
    assert run("while True: pass", limits=SHORT, isolation="limits_only").outcome == "timed_out"
    assert "MemoryError" in run("x = 'x' * 10**10", limits=PATIENT, isolation="limits_only").reason


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_older_kernels_keep_it_in_as_well(version, monkeypatch, outside):
    monkeypatch.setattr(support, "landlock_version", lambda: version)
    names, look = outside
    lines = [*attempts.READS.values(), *attempts.WRITES.values(), *attempts.NETWORK.values()]
    tries = "".join(f"try:\n    {line}\n    print({line!r})\nexcept OSError:\n    pass\n" for line in lines)
    before = look()
    assert done(attempts.PREAMBLE + names + tries) == ""
    assert look() == before


@pytest.mark.parametrize(
    "one, other, alike",
    [
        ("1", "1", True),
        ("1", "1.0", False),
        ("1", "True", False),
        ("0.3", "0.30000000000000004", True),
        ("0.3", "0.3001", False),
        ("[1, (2.0, 'x')]", "[1, (2.0000000000000004, 'x')]", True),
        ("[1, 2]", "[1, 2, 3]", False),
        ("{'a': 1.0}", "{'a': 1.0000000000000002}", True),
        ("nan", "nan", True),
        ("Fraction(1, 2)", "Fraction(1, 2)", True),
        ("Fraction(1, 2)", "Fraction(1, 3)", False),
        ("(" * 5000, "1", False),
        ("'1.5'", "'1.50'", False),
        ("1e-07", "1.0000000000000001e-07", True),
        ("inf", "1.0", False),
    ],
)
def test_same_values(one, other, alike):
    assert same(one, other) is alike
