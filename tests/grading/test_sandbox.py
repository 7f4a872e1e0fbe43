"""The walls around graded code, tried from inside (pen-test list, item 11), and the workers' own life."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opd.errors import OpdError
from opd.grading.sandbox import Sandbox

PASS = {"answer": "def f(x): return 2 * x", "tests": "assert f(2) == 4"}
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's walls are Linux's")


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox("python", workers=2, timeout=2.0)
    yield made
    made.close()


def verdict(sandbox, answer, tests="assert True"):
    return sandbox.run([{"answer": answer, "tests": tests}])[0]


def native(call):
    """Code whose f() makes a call through C, past every Python guard, and returns what the kernel said."""
    return f"import ctypes\nC = ctypes.CDLL(None, use_errno=True)\ndef f(): return {call}"


@ON_LINUX
def test_the_walls_of_this_machine_are_named(sandbox):
    assert {"rlimits", "no new privileges", "audit hook"} <= set(sandbox.layers)
    assert set(sandbox.network_isolation.split(", ")) <= set(sandbox.layers)


def test_right_and_wrong_code(sandbox):
    assert verdict(sandbox, **PASS) == (1.0, "")
    score, reason = verdict(sandbox, "def f(x): return 3", "assert f(2) == 4, 'two'")
    assert score == 0 and "AssertionError: two" in reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("import os; os._exit(0)", "exit code 0"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("x = bytearray(100 << 30)", "MemoryError"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("(" * 9999, "SyntaxError"),
        ("import os; os.abort()", "ended its process with SIG"),
    ],
)
def test_S_11_code_that_ends_its_process_scores_0_with_the_reason(sandbox, answer, reason):
    score, why = verdict(sandbox, answer)
    assert score == 0 and reason in why


@pytest.mark.parametrize(
    "answer",
    [
        "print(1.0, '')\nimport os\nfor i in range(3): os.write(i, b'1.0')",
        "import os\nreply = b'?' + bytes(16) + b'\\0\\0\\0\\x09[1.0, \"\"]'\n"
        "for i in range(3, 64):\n try: os.write(i, reply)\n except OSError: pass",
        "import os, time\nfor part in (b'?', bytes(16) + b'\\0\\0\\0\\x09[1.0, \"\"]'):\n"
        " for i in range(3, 64):\n  try: os.write(i, part)\n  except OSError: pass\n time.sleep(0.1)",
        "import os\nfor i in range(3, 64):\n try: os.write(i, b'\\0\\0\\0\\x09[1.0, \"\"]')\n except OSError: pass",
        "import os\nos.closerange(0, 64)",
        "import gc\nfor o in gc.get_objects():\n if isinstance(o, dict) and 'verdict' in o: o['verdict'] = (1.0, '')",
        "import builtins\nbuiltins.AssertionError = None\nbuiltins.abs = lambda x: 7",
        "import sys\nsys.settrace(None)\nfor m in list(sys.modules): sys.modules[m] = None",
    ],
)
def test_S_11_a_grade_is_not_forged_by_writing_or_patching(sandbox, answer):
    assert verdict(sandbox, answer, "assert abs(-1) == 7")[0] == 0
    assert verdict(sandbox, **PASS) == (1.0, "")


@ON_LINUX
@pytest.mark.parametrize(
    "call",
    [
        "C.fork()",
        "C.syscall(435, None, 0)",
        "C.execv(b'/bin/true', None)",
        "C.socket(2, 1, 0)",
        "C.socket(1, 1, 0)",
        "C.socketpair(1, 2, 0, (ctypes.c_int * 2)())",
        "C.kill(OWN_PID, 0)",
        "C.kill(-1, 0)",
        "C.ptrace(16, OWN_PID, 0, 0)",
        "C.chmod(b'.', 0)",
        "C.unshare(0x10000000)",
        "C.mount(b'none', b'/', None, 0x4000, None)",
        "C.syscall(425, 1, None)",
    ],
)
def test_S_11_the_kernel_refuses(sandbox, call):
    call = call.replace("OWN_PID", str(os.getpid()))  # not in the test's name: that must be the same in every process
    assert verdict(sandbox, native(call), "assert f() < 0\nassert ctypes.get_errno() in (1, 38)") == (1.0, "")


@ON_LINUX
def test_S_11_no_file_is_read_or_written_outside_the_working_folder(sandbox, tmp_path):
    secret, canary = tmp_path / "secret", tmp_path / "canary"
    secret.write_text("key")
    secret.chmod(0o666)
    home = Path.home() / ".opd-test-canary"
    for path, flags in ((secret, os.O_RDONLY), (secret, os.O_WRONLY), (canary, 65), (home, 65), ("/etc/passwd", 0)):
        call = f"C.open({os.fsencode(path)!r}, {int(flags)}, 0o666)"
        assert verdict(sandbox, native(call), "assert f() == -1") == (1.0, ""), path
    assert verdict(sandbox, native(f"C.unlink({os.fsencode(secret)!r})"), "assert f() == -1") == (1.0, "")
    assert secret.read_text() == "key" and not canary.exists() and not home.exists()


def test_the_working_folder_is_empty_for_every_answer_and_bounded(sandbox):
    write = (
        "open('a', 'w').write('x')\nimport os, tempfile\ntempfile.TemporaryFile().write(b'x')\nf = lambda: os.listdir()"
    )
    for _ in range(2):
        assert verdict(sandbox, write, "assert f() == ['a']") == (1.0, "")
    assert list(Path(sandbox._home).iterdir()) == []
    assert "File too large" in verdict(sandbox, "open('a', 'wb').write(bytes(20 << 20))")[1]
    if "tmpfs" in sandbox.layers:
        fill = "for i in range(9): open(str(i), 'wb').write(bytes(15 << 20))"
        assert "No space left" in verdict(sandbox, fill)[1]


def test_graded_code_sees_an_empty_environment_and_hidden_pipes(sandbox, monkeypatch):
    monkeypatch.setenv("OPD_TEST_SECRET", "1")
    answer = "import os, sys\nenv = dict(os.environ)"
    tests = "assert not {'OPD_TEST_SECRET', 'PATH', 'HOME'} & set(env)\nassert 'torch' not in sys.modules"
    made = Sandbox("python", workers=1, timeout=2.0)
    assert made.run([{"answer": answer, "tests": tests}]) == [(1.0, "")]
    made.close()


def test_threads_and_asyncio_work_for_honest_code(sandbox):
    answer = (
        "import asyncio, threading\nasync def g(): return 1\nt = threading.Thread(target=print)\nt.start(); t.join()"
    )
    assert verdict(sandbox, answer, "assert asyncio.run(g()) == 1") == (1.0, "")


def test_S_11_network_is_refused_through_python(sandbox):
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    server.settimeout(0.2)
    assert verdict(sandbox, f"import socket\nsocket.create_connection({address})")[0] == 0
    assert verdict(sandbox, "import urllib.request\nurllib.request.urlopen('http://example.org')")[0] == 0
    with pytest.raises(TimeoutError):
        server.accept()
    server.close()


def test_a_timeout_costs_no_other_answer_its_grade():
    made = Sandbox("python", workers=2, timeout=0.5)
    loop, sleep = (
        {"answer": code, "tests": "assert 1"} for code in ("while True: pass", "import time; time.sleep(99)")
    )
    tasks = [PASS, loop, PASS, sleep, PASS, PASS]
    start = time.monotonic()
    assert [score for score, _ in made.run(tasks)] == [1, 0, 1, 0, 1, 1]
    assert time.monotonic() - start < 5
    assert "0.5 s" in made.run([loop])[0][1]
    made.close()


@ON_LINUX
def test_S_11_a_fork_bomb_leaves_nothing_behind(sandbox):
    before = _children_of(os.getpid())
    bomb = "import os, ctypes\nC = ctypes.CDLL(None)\nfor i in range(200): C.fork()\nos.fork()"
    score, reason = verdict(sandbox, bomb)
    assert score == 0 and "os.fork" in reason
    assert _children_of(os.getpid()) == before


def _children_of(root):
    """Ids of all processes below `root`, workers included."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = entry.read_text()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def test_a_dead_worker_is_replaced():
    made = Sandbox("python", workers=1, timeout=30.0)
    assert made.run([PASS]) == [(1.0, "")]
    for worker in made._pool:
        os.kill(worker.process.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert made.run([PASS]) == [(1.0, "")]
    slow = {"answer": "import time; time.sleep(20)", "tests": "assert 1"}
    pid = made._pool[0].process.pid
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    (first, second) = made.run([slow, PASS])
    assert first == (0.0, "the grader process died while it graded this answer") and second == (1.0, "")
    made.close()


def test_E_09_runs_in_a_thread_that_is_not_the_main_one(sandbox):
    verdicts = []
    threads = [threading.Thread(target=lambda: verdicts.extend(sandbox.run([PASS] * 3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [(1.0, "")] * 9


@ON_LINUX
def test_workers_end_with_us_even_when_we_are_killed(tmp_path):
    code = (
        "import sys, time, threading; from opd.grading.sandbox import Sandbox\n"
        "s = Sandbox('python', workers=1, timeout=60.0); s.layers\n"
        "threading.Thread(target=s.run, args=([{'answer': 'while True: pass', 'tests': ''}],), daemon=True).start()\n"
        "time.sleep(0.3); print(s._pool[0].process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    family = {worker, *_children_of(worker)}
    assert len(family) == 2, "the worker and the answer it grades"
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while (alive := {pid for pid in family if _running(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive
    assert list(tmp_path.iterdir()) == []


def _running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_close_removes_the_folder_and_the_workers():
    made = Sandbox("python", workers=1, timeout=2.0)
    made.run([PASS])
    (worker,) = made._pool
    made.close()
    assert worker.process.poll() is not None and not Path(made._home).exists()


def test_a_worker_that_cannot_start_is_an_error():
    with pytest.raises(OpdError, match="KeyError"):
        Sandbox("poetry", workers=1, timeout=1.0).run([{}])


def test_the_audit_hook_alone_stops_ordinary_python(tmp_path):
    """What is left where the kernel has neither landlock nor seccomp."""
    code = f"""
import os, socket, subprocess, sys
from opd.grading.isolation import _audit
os.chdir({str(tmp_path)!r}); os.mkdir("in"); os.chdir("in")
_audit(os.getcwd())
open("a", "w").write("x"); os.rename("a", "b"); os.mkdir("c"); open("/dev/null", "w"); open(os.__file__).read()
attempts = [
    lambda: os.system("true"), lambda: subprocess.run(["true"]), os.fork, lambda: os.kill(1, 0),
    lambda: open("../x", "w"), lambda: os.symlink("..", "up"), lambda: open("c/../../x", "w"),
    lambda: os.rename("b", "../b"), lambda: os.remove("../y"), lambda: os.chmod("b", 0),
    lambda: os.open("../x", os.O_CREAT), lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: socket.getaddrinfo("example.org", 80),
]
for number, attempt in enumerate(attempts):
    try:
        attempt()
    except PermissionError:
        continue
    raise SystemExit(f"attempt {{number}} went through")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
