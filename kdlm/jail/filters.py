"""Filters: the system calls that a jailed program may not make, as a seccomp program (Linux, x86_64 and aarch64).

A jailed program is one process with threads: it starts no other, changes to no other program, opens no socket, signals,
traces and reschedules nobody, leaves no memory behind in the kernel, and does not touch what Landlock does not guard:
modes, owners, times and attributes of files. What is refused gets EPERM. Calls newer than Linux 5.1 get ENOSYS, for
which C libraries have an older way: io_uring, pidfd_getfd, clone3 and all that is still to come.
"""

import errno
import fcntl
import os
import socket
import struct
import termios
from typing import NamedTuple


class Numbers(NamedTuple):
    """A system call's number on each machine, None where that has none."""

    x86_64: int | None
    aarch64: int | None


ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machines by `platform.machine()`, with the kernel's name for their calls (AUDIT_ARCH_*)."""

REFUSED = {
    # sockets
    "socket": Numbers(41, 198),
    "connect": Numbers(42, 203),
    "bind": Numbers(49, 200),
    "listen": Numbers(50, 201),
    "accept": Numbers(43, 202),
    "accept4": Numbers(288, 242),
    "sendmsg": Numbers(46, 211),
    "sendmmsg": Numbers(307, 269),
    "setsockopt": Numbers(54, 208),
    # other processes: started, signalled, read, rescheduled
    "fork": Numbers(57, None),
    "vfork": Numbers(58, None),
    "execve": Numbers(59, 221),
    "execveat": Numbers(322, 281),
    "tkill": Numbers(200, 130),
    "rt_sigqueueinfo": Numbers(129, 138),
    "rt_tgsigqueueinfo": Numbers(297, 240),
    "ptrace": Numbers(101, 117),
    "process_vm_readv": Numbers(310, 270),
    "process_vm_writev": Numbers(311, 271),
    "kcmp": Numbers(312, 272),
    "setpriority": Numbers(141, 140),
    "ioprio_set": Numbers(251, 30),
    "sched_setaffinity": Numbers(203, 122),
    "sched_setscheduler": Numbers(144, 119),
    "sched_setparam": Numbers(142, 118),
    "sched_setattr": Numbers(314, 274),
    "migrate_pages": Numbers(256, 238),
    "move_pages": Numbers(279, 239),
    # memory that outlives a process or is not counted as its own
    "shmget": Numbers(29, 194),
    "shmat": Numbers(30, 196),
    "shmctl": Numbers(31, 195),
    "semget": Numbers(64, 190),
    "semop": Numbers(65, 193),
    "semctl": Numbers(66, 191),
    "semtimedop": Numbers(220, 192),
    "msgget": Numbers(68, 186),
    "msgsnd": Numbers(69, 189),
    "msgrcv": Numbers(70, 188),
    "msgctl": Numbers(71, 187),
    "mq_open": Numbers(240, 180),
    "mq_unlink": Numbers(241, 181),
    "memfd_create": Numbers(319, 279),
    "io_setup": Numbers(206, 0),
    # files, past Landlock (which guards truncate from its third version on)
    "truncate": Numbers(76, 45),
    "chmod": Numbers(90, None),
    "fchmod": Numbers(91, 52),
    "fchmodat": Numbers(268, 53),
    "chown": Numbers(92, None),
    "fchown": Numbers(93, 55),
    "lchown": Numbers(94, None),
    "fchownat": Numbers(260, 54),
    "utime": Numbers(132, None),
    "utimes": Numbers(235, None),
    "futimesat": Numbers(261, None),
    "utimensat": Numbers(280, 88),
    "setxattr": Numbers(188, 5),
    "lsetxattr": Numbers(189, 6),
    "fsetxattr": Numbers(190, 7),
    "removexattr": Numbers(197, 14),
    "lremovexattr": Numbers(198, 15),
    "fremovexattr": Numbers(199, 16),
    "getxattr": Numbers(191, 8),
    "lgetxattr": Numbers(192, 9),
    "fgetxattr": Numbers(193, 10),
    "listxattr": Numbers(194, 11),
    "llistxattr": Numbers(195, 12),
    "flistxattr": Numbers(196, 13),
    "name_to_handle_at": Numbers(303, 264),
    "open_by_handle_at": Numbers(304, 265),
    "inotify_init": Numbers(253, None),
    "inotify_init1": Numbers(294, 26),
    "fanotify_init": Numbers(300, 262),
    "sync": Numbers(162, 81),
    "syncfs": Numbers(306, 267),
    # the kernel and its keys, namespaces and mounts
    "seccomp": Numbers(317, 277),
    "bpf": Numbers(321, 280),
    "perf_event_open": Numbers(298, 241),
    "userfaultfd": Numbers(323, 282),
    "add_key": Numbers(248, 217),
    "request_key": Numbers(249, 218),
    "keyctl": Numbers(250, 219),
    "unshare": Numbers(272, 97),
    "setns": Numbers(308, 268),
    "mount": Numbers(165, 40),
    "umount2": Numbers(166, 39),
    "pivot_root": Numbers(155, 41),
    "chroot": Numbers(161, 51),
    "swapon": Numbers(167, 224),
    "swapoff": Numbers(168, 225),
    "reboot": Numbers(169, 142),
    "sethostname": Numbers(170, 161),
    "setdomainname": Numbers(171, 162),
    "init_module": Numbers(175, 105),
    "delete_module": Numbers(176, 106),
    "finit_module": Numbers(313, 273),
    "kexec_load": Numbers(246, 104),
    "kexec_file_load": Numbers(320, 294),
    "acct": Numbers(163, 89),
    "settimeofday": Numbers(164, 170),
    "clock_settime": Numbers(227, 112),
    "adjtimex": Numbers(159, 171),
    "clock_adjtime": Numbers(305, 266),
    "syslog": Numbers(103, 116),
    "quotactl": Numbers(179, 60),
    "personality": Numbers(135, 92),
    "vhangup": Numbers(153, 58),
    "iopl": Numbers(172, None),
    "ioperm": Numbers(173, None),
    "modify_ldt": Numbers(154, None),
}

KILL, TGKILL, PRLIMIT64 = Numbers(62, 129), Numbers(234, 131), Numbers(302, 261)
CLONE, SOCKETPAIR, SENDTO = Numbers(56, 220), Numbers(53, 199), Numbers(44, 206)
PRCTL, IOCTL, FCNTL = Numbers(157, 167), Numbers(16, 29), Numbers(72, 25)
OPEN, OPENAT, CAPSET = Numbers(2, None), Numbers(257, 56), Numbers(126, 91)

NEWEST = 424
"""The first number that is the same everywhere, of Linux 5.1: from here on no call is made."""
A_THREAD = 0x50F00
"""What every C library asks `clone` for in a thread: CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM."""
PR_SET_NAME = 15
TCGETS2 = 0x802C542A
F_SETSIG, F_SETOWN_EX, F_SETLEASE = 10, 15, 1024

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, KILL_PROCESS = 0x7FFF0000, 0x80000000
REFUSE, ABSENT = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

Instruction = tuple[int, int, int, int]
"""Code, how many instructions to skip if true and if false, operand: a `struct sock_filter`."""


def seccomp_filter(machine: str, process: int) -> bytes:
    """Return the `struct sock_filter[]` for a process of this number on this machine."""
    program: list[Instruction] = [
        (LOAD, 0, 0, 4),  # the architecture: a 32-bit call has other numbers
        (EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, 0),  # the number
        (AT_LEAST, 0, 1, NEWEST),  # and those of x32, which have bit 30
        (RETURN, 0, 0, ABSENT),
    ]
    of_any_file = termios.TCGETS, TCGETS2, termios.TIOCGWINSZ, termios.FIONREAD
    for numbers, block in (
        *((numbers, [(RETURN, 0, 0, REFUSE)]) for numbers in REFUSED.values()),
        (KILL, _one_of(0, process)),
        (TGKILL, _one_of(0, process)),
        (PRLIMIT64, _one_of(0, 0, process)),
        (
            CLONE,
            [_load(0), (AND, 0, 0, A_THREAD), (EQUAL, 1, 0, A_THREAD), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)],
        ),
        (SOCKETPAIR, _one_of(0, socket.AF_UNIX)),  # of asyncio; it stays a pair, since `connect` is refused
        (SENDTO, [*_zero(4), (RETURN, 0, 0, ALLOW)]),  # to the other end of a pair
        (PRCTL, _one_of(0, PR_SET_NAME)),
        (IOCTL, _one_of(1, *of_any_file, termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX)),
        # signals to whoever, and leases, which hold up who wants to write
        (FCNTL, _none_of(1, fcntl.F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE)),
        # before its third version Landlock takes this for reading, and mode 3 for nothing at all
        (OPEN, _none_of(1, os.O_TRUNC, os.O_TRUNC | 3, mask=os.O_TRUNC | 3)),
        (OPENAT, _none_of(2, os.O_TRUNC, os.O_TRUNC | 3, mask=os.O_TRUNC | 3)),
    ):
        if (number := getattr(numbers, machine)) is not None:
            program += [(EQUAL, 0, len(block), number), *block]
    program.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _load(argument: int) -> Instruction:
    return (LOAD, 0, 0, 16 + 8 * argument)  # the low half: both machines are little endian, what is read here is int


def _one_of(argument: int, *values: int) -> list[Instruction]:
    found = [step for value in values for step in ((EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW))]
    return [_load(argument), *found, (RETURN, 0, 0, REFUSE)]


def _none_of(argument: int, *values: int, mask: int = 0xFFFFFFFF) -> list[Instruction]:
    found = [step for value in values for step in ((EQUAL, 0, 1, value), (RETURN, 0, 0, REFUSE))]
    return [_load(argument), (AND, 0, 0, mask), *found, (RETURN, 0, 0, ALLOW)]


def _zero(argument: int) -> list[Instruction]:
    """Refuse unless all 64 bits are zero."""
    halves = (16 + 8 * argument, 20 + 8 * argument)
    return [step for half in halves for step in ((LOAD, 0, 0, half), (EQUAL, 1, 0, 0), (RETURN, 0, 0, REFUSE))]
