"""Support: what of a jail this machine can build, and which files its Python needs inside."""

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

from kdlm.jail.filters import ARCHITECTURES, REFUSED

LANDLOCK_CREATE_RULESET = 444
LANDLOCK_CREATE_RULESET_VERSION = 1
SECCOMP_GET_ACTION_AVAIL = 2
ERRNO_ACTION = ctypes.c_uint32(0x00050000)

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE = 1 << 13, 1 << 14
SCRATCH = (
    WRITE_FILE | READ_FILE | READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
)

PYTHON = (sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8")
"""No site-packages, no folder of a script in the path, no bytecode written."""

LOOK = """
import importlib.machinery, json, os, sys
for folder in filter(os.path.isdir, sys.path):
    for file in os.listdir(folder):
        name, _, suffix = file.partition(".")
        if "." + suffix in importlib.machinery.EXTENSION_SUFFIXES and not name.startswith(("_test", "_xx", "xx")):
            try:
                __import__(name)
            except BaseException:
                pass
try:
    __import__("ctypes").CDLL("libgcc_s.so.1")  # what ends a thread
except BaseException:
    pass
with open("/proc/self/maps") as maps:
    files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
print(json.dumps([sys.path, sorted(file for file in files if ".so" in os.path.basename(file))]))
"""


def missing() -> list[str]:
    """Return what this machine lacks to keep a program in, in words; nothing where it can."""
    if sys.platform != "linux":
        return [f"Linux (this is {platform.system()})"]
    lacks = []
    if platform.machine() not in ARCHITECTURES:
        lacks.append(f"a processor of {' or '.join(ARCHITECTURES)} (this is {platform.machine()})")
    elif _syscall(
        getattr(REFUSED["seccomp"], platform.machine()), SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(ERRNO_ACTION)
    ):
        lacks.append("seccomp filters (CONFIG_SECCOMP_FILTER)")
    if landlock_version() < 1:
        lacks.append("Landlock (Linux 5.13, and `landlock` among the kernel's `lsm=`; containers may forbid it)")
    return lacks


def landlock_version() -> int:
    """Return the version of Landlock's interface that runs here, 0 or less where there is none."""
    return _syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)


def handled(version: int) -> tuple[int, int, int]:
    """Return the rights on files, on the network and the scopes that this version can take away: all it knows."""
    files = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    return (1 << files) - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0


@cache
def readable(version: int) -> list[tuple[str, int]]:
    """Return what a jailed Python may read: (path, rights).

    The standard library, entry by entry without site-packages; the shared libraries that its extension modules load;
    the loader's list of libraries; /dev/null and /dev/urandom. Names below the standard library's folder can be listed,
    in site-packages too: Landlock's rights reach down.
    """
    run = subprocess.run(
        [*PYTHON, "-c", LOOK], stdin=subprocess.DEVNULL, capture_output=True, check=True, env=environment("/")
    )
    path, libraries = json.loads(run.stdout.splitlines()[-1])
    rules = [("/dev/null", READ_FILE | WRITE_FILE), ("/dev/urandom", READ_FILE), ("/etc/ld.so.cache", READ_FILE)]
    rules += [(library, READ_FILE) for library in libraries]
    for place in path:
        if os.path.isdir(place):
            rules.append((place, READ_DIR))
            rules += _entries(place)
        else:
            rules.append((place, READ_FILE))
    allowed = handled(version)[0]
    return [(place, rights & allowed) for place, rights in rules if os.path.exists(place)]


def _entries(folder: str) -> Iterator[tuple[str, int]]:
    for entry in os.scandir(folder):
        if entry.name not in ("site-packages", "dist-packages"):
            yield entry.path, READ_FILE | (READ_DIR if entry.is_dir() else 0)


def environment(scratch: str) -> dict[str, str]:
    """Return all that a jailed program finds in its environment."""
    loader = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # what finds libpython
    return {"HOME": scratch, "TMPDIR": scratch, "PYTHONHASHSEED": "0", **loader}


def _syscall(*words: object) -> int:
    return ctypes.CDLL(None, use_errno=True).syscall(*words)
