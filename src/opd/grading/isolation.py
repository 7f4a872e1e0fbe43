"""What a process gives up before it touches model text. Runs inside the sandbox; standard library only.

Each layer is tried on its own and reported by name when it took hold, so that a missing one is visible:

    user namespace      capabilities of the machine are out of reach (Linux)
    network namespace   no interface but a dead loopback (Linux)
    rlimits             address space, CPU seconds, file size, open files, threads, no core dumps
    tmpfs               the working folder is a small file system of its own, gone with the process (Linux)
    no new privileges   set-user-id programs gain nothing (Linux)
    capabilities        all dropped (Linux)
    landlock            reads: the interpreter and its packages; writes: the working folder (Linux 5.13)
    seccomp             no sockets, processes, signals, tracing, changes of mode or owner (x86_64 and aarch64 Linux)
    audit hook          the same in Python: a readable error, and the only guard where the kernel has none

Without landlock and seccomp (macOS) the audit hook stops ordinary Python, but not code that reaches for C. What no
layer stops: using the CPU and memory it was given, and reading files under the interpreter's own folders.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterable

GIB = 1 << 30
ADDRESS_SPACE = 2 * GIB  # bytes; reasoning_gym with its imports maps about 1 GiB
FILE_SIZE = 16 << 20  # bytes in one file
FOLDER_SIZE = 64 << 20  # bytes in the whole working folder, where tmpfs can be mounted
OPEN_FILES = 64
THREADS = 64  # the kernel does not hold root to it; there the address space bounds them

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _check(_libc.syscall(ctypes.c_long(number), *arguments))


def _prctl(option: int, *arguments: int) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    _check(_libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(a) for a in padded)))


def _layers(attempts: Iterable[tuple[str, Callable[[], None]]]) -> list[str]:
    """Names of the attempts that worked; one the system does not know or allow is left out."""
    names = []
    for name, attempt in attempts:
        try:
            attempt()
        except (OSError, ValueError, AttributeError):
            continue
        names.append(name)
    return names


# ---- namespaces -------------------------------------------------------------------------------------------------

_NEWNS, _NEWIPC, _NEWUSER, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000


def enter_namespaces() -> list[str]:
    """Leaves the machine's users, network and System V memory behind. For the worker, while it has one thread."""

    def user() -> None:
        uid, gid = os.getuid(), os.getgid()
        _check(_libc.unshare(_NEWUSER))
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)

    def network() -> None:
        _check(_libc.unshare(_NEWNET | _NEWIPC))

    return _layers([("user namespace", user), ("network namespace", network)])


# ---- one answer -------------------------------------------------------------------------------------------------


def confine(folder: str, readable: Iterable[str], seconds: float, *, namespaces: Iterable[str]) -> list[str]:
    """Shuts the calling process in `folder` for good; returns the layers that hold, outermost first.

    readable    folders and files that stay readable besides it.
    seconds     CPU seconds until the kernel ends the process, rounded up, plus one.
    namespaces  what `enter_namespaces` returned in the parent process.
    """
    namespaces = list(namespaces)
    os.chdir(folder)
    return namespaces + _layers(
        [
            ("rlimits", lambda: _set_limits(seconds, threads="user namespace" in namespaces)),
            ("tmpfs", lambda: _mount_tmpfs(folder)),
            ("no new privileges", lambda: _prctl(38, 1)),
            ("capabilities", _drop_capabilities),
            ("landlock", lambda: _landlock(folder, readable)),
            ("seccomp", _seccomp),
            ("audit hook", lambda: _audit(folder)),
        ]
    )


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when `parent` (its parent's id) ends. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        _prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)


def _set_limits(seconds: float, *, threads: bool) -> None:
    cpu = math.ceil(seconds) + 1
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_AS, ADDRESS_SPACE),
    ]
    if threads:  # counted per user namespace; outside one, all processes of the user would count
        limits.append((resource.RLIMIT_NPROC, THREADS))
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))


def _mount_tmpfs(folder: str) -> None:
    nosuid_nodev, private_recursive = 2 | 4, (1 << 18) | 0x4000
    _check(_libc.unshare(_NEWNS))
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(private_recursive), None))
    options = f"size={FOLDER_SIZE},nr_inodes=4096,mode=700".encode()
    _check(_libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(nosuid_nodev), options))
    os.chdir(folder)  # the old working folder is the one underneath


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    _check(_libc.capset(header, bytes(24)))


# ---- landlock: which files (linux/landlock.h) -------------------------------------------------------------------

_EXECUTE, _WRITE, _READ, _LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE = 1 << 14
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_DEVICES = (1 << 6) | (1 << 11) | (1 << 15)  # making device nodes, device ioctls


def _landlock(folder: str, readable: Iterable[str]) -> None:
    create, add_rule, restrict = 444, 445, 446
    abi = _syscall(create, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    files = _ALL_BY_ABI.get(abi, (1 << 16) - 1)
    tcp = 0b11 if abi >= 4 else 0
    scoped = 0b11 if abi >= 6 else 0  # abstract Unix sockets; signals
    attribute = struct.pack("=QQQ", files, tcp, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _syscall(create, attribute, ctypes.c_size_t(len(attribute)), ctypes.c_uint(0))
    grants = [(path, _READ | _LIST) for path in readable]
    grants += [(path, _READ) for path in ("/dev/zero", "/dev/random", "/dev/urandom")]
    grants += [("/dev/null", _READ | _WRITE | _TRUNCATE), (folder, files & ~_EXECUTE & ~_DEVICES)]
    for path, access in grants:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this machine, or not for us
            continue
        if not os.path.isdir(path):
            access &= _READ | _WRITE | _TRUNCATE
        rule = struct.pack("=Qi", access & files, opened)
        _syscall(add_rule, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(opened)
    _syscall(restrict, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)


# ---- seccomp: which system calls --------------------------------------------------------------------------------

# (name, number on x86_64, number on aarch64); None where the architecture has no such call.
DENIED_CALLS: tuple[tuple[str, int | None, int | None], ...] = (
    ("socket", 41, 198), ("connect", 42, 203), ("bind", 49, 200), ("io_uring_setup", 425, 425),
    ("fork", 57, None), ("vfork", 58, None), ("execve", 59, 221), ("execveat", 322, 281),
    ("kill", 62, 129), ("tkill", 200, 130), ("tgkill", 234, 131), ("rt_sigqueueinfo", 129, 138),
    ("rt_tgsigqueueinfo", 297, 240), ("pidfd_send_signal", 424, 424), ("pidfd_open", 434, 434),
    ("pidfd_getfd", 438, 438), ("ptrace", 101, 117), ("process_vm_readv", 310, 270),
    ("process_vm_writev", 311, 271), ("process_madvise", 440, 440), ("perf_event_open", 298, 241),
    ("bpf", 321, 280), ("userfaultfd", 323, 282), ("unshare", 272, 97), ("setns", 308, 268), ("mount", 165, 40),
    ("umount2", 166, 39), ("pivot_root", 155, 41), ("chroot", 161, 51), ("open_tree", 428, 428),
    ("move_mount", 429, 429), ("fsopen", 430, 430), ("name_to_handle_at", 303, 264),
    ("open_by_handle_at", 304, 265), ("chmod", 90, None), ("fchmod", 91, 52), ("fchmodat", 268, 53),
    ("fchmodat2", 452, 452), ("chown", 92, None), ("fchown", 93, 55), ("lchown", 94, None), ("fchownat", 260, 54),
    ("utime", 132, None), ("utimes", 235, None), ("futimesat", 261, None), ("utimensat", 280, 88),
    ("setxattr", 188, 5), ("lsetxattr", 189, 6), ("fsetxattr", 190, 7), ("removexattr", 197, 14),
    ("lremovexattr", 198, 15), ("fremovexattr", 199, 16), ("setxattrat", 463, 463), ("removexattrat", 466, 466),
    ("prlimit64", 302, 261), ("setpriority", 141, 140), ("ioprio_set", 251, 30), ("sched_setparam", 142, 118),
    ("sched_setscheduler", 144, 119), ("sched_setaffinity", 203, 122), ("sched_setattr", 314, 274),
    ("shmget", 29, 194), ("semget", 64, 190), ("msgget", 68, 186), ("mq_open", 240, 180), ("add_key", 248, 217),
    ("request_key", 249, 218), ("keyctl", 250, 219),
)  # fmt: skip


def _seccomp() -> None:
    """Installs the filter: what is denied fails with EPERM, the rest goes on. Needs no_new_privs."""
    column, audit_arch, clone, socketpair = {
        "x86_64": (1, 0xC000003E, 56, 53),
        "aarch64": (2, 0xC00000B7, 220, 199),
    }.get(platform.machine(), (0, 0, 0, 0))
    if not column or sys.platform != "linux":
        raise OSError("no filter is written for this architecture")
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, deny, unknown = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38
    first_argument, clone3, clone_thread, datagram = 16, 435, 0x00010000, 2
    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4), (equal, 1, 0, audit_arch), (give, 0, 0, kill),  # a foreign architecture numbers calls anew
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill),  # so does x32
        (equal, 0, 1, clone3), (give, 0, 0, unknown),  # its flags lie in memory; the C library falls back to clone
        # a thread is fine, a process is not
        (equal, 0, 4, clone), (load, 0, 0, first_argument),
        (any_bit, 1, 0, clone_thread), (give, 0, 0, deny), (give, 0, 0, allow),
        # a connected pair is fine (asyncio needs it); a datagram pair could address other programs' sockets
        (equal, 0, 4, socketpair), (load, 0, 0, first_argument + 8),
        (any_bit, 0, 1, datagram), (give, 0, 0, deny), (give, 0, 0, allow),
    ]  # fmt: skip
    for call in DENIED_CALLS:
        if (number := call[column]) is not None:
            program += [(equal, 0, 1, number), (give, 0, 0, deny)]
    program.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filter_ = struct.pack("@HP", len(program), ctypes.addressof(code))
    _check(_libc.prctl(22, ctypes.c_ulong(2), filter_, ctypes.c_ulong(0), ctypes.c_ulong(0)))


# ---- the same rules in Python -----------------------------------------------------------------------------------

_FORBIDDEN = frozenset(
    [
        *(
            "os.exec",
            "os.fork",
            "os.forkpty",
            "os.posix_spawn",
            "os.spawn",
            "os.system",
            "subprocess.Popen",
            "pty.spawn",
        ),
        *("os.kill", "os.killpg", "os.chmod", "os.chown", "os.setxattr", "os.removexattr", "os.utime", "os.chflags"),
        *("socket.bind", "socket.connect", "socket.sendmsg", "socket.sendto", "socket.getaddrinfo"),
        *("socket.gethostbyaddr", "socket.gethostbyname", "syslog.openlog", "resource.setrlimit", "resource.prlimit"),
    ]
)
_CHANGES = frozenset(["os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"])


def _audit(folder: str) -> None:
    inside = os.path.realpath(folder)
    realpath, text = os.path.realpath, os.fsdecode
    write_flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def outside(path: object) -> bool:
        if not isinstance(path, (str, bytes)):
            return False  # an open file
        place = realpath(text(path))
        return place != "/dev/null" and place != inside and not place.startswith(inside + os.sep)

    def hook(event: str, arguments: tuple) -> None:
        if event in _FORBIDDEN:
            raise PermissionError(f"{event} is not available while an answer is graded")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & write_flags
        if (writes or event in _CHANGES) and any(outside(a) for a in arguments[: 1 if writes else 2]):
            raise PermissionError(f"{event} outside the working folder while an answer is graded")

    sys.addaudithook(hook)
