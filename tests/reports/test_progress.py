from __future__ import annotations

import io
import math
import re
import sys
import time

import pytest
from rich.console import Console

from opd.reports import progress
from opd.reports.progress import RunView
from tests.reports.parts import HOSTILE, plain_console, terminal

EVAL = {"task": "sort", "mean": 0.852, "low": 0.82, "high": 0.881, "step": 4}


def play(view: RunView, steps: int = 7) -> None:
    with view:
        view.start(steps, ["student  tiny"])
        for step in range(1, steps + 1):
            view.phase("sampling", 3, 8)
            view.phase("training")
            view.step({"step": step, "reverse_kl": 0.5 / step, "loss": 9.0, "tokens_per_second": 12_345.0})
        view.eval(EVAL)
        view.message("note")


def test_plain_lines_one_for_log_every_steps_and_one_for_the_last():
    console, raw = plain_console()
    play(RunView(log_every=3, console=console))
    lines = raw.getvalue().decode().splitlines()
    assert lines[0] == "student  tiny"
    assert re.fullmatch(r"step 3/7  reverse KL 0\.1667  12\.3k tokens/s  \d+ s left", lines[1])
    assert lines[2].startswith("step 6/7") and lines[3] == "step 7/7  reverse KL 0.07143  12.3k tokens/s"
    assert lines[4] == "eval sort: student at step 4 85.2 % [82.0, 88.1]"
    assert lines[5] == "note"
    assert lines[6].startswith("7/7 steps in 0 s") and len(lines) == 7
    assert re.fullmatch(rb"[\x20-\x7e\n]*", raw.getvalue()), "ASCII, no control codes"


def test_a_reward_is_told_with_the_distance():
    console, raw = plain_console()
    with RunView(console=console) as view:
        view.start(1)
        view.step({"step": 1, "reverse_kl": 0.5, "reward_mean": 0.25})
    assert "step 1/1  reverse KL 0.5  reward 0.25" in raw.getvalue().decode()


def test_terminal_draws_bars_and_leaves_only_lines():
    console, raw = terminal()
    with RunView(console=console) as view:
        view.start(7)
        view.step({"step": 3, "loss": 0.25, "tokens_per_second": 950.0})
        view.eval(EVAL)
        view.phase("sampling", 3, 8)
        canvas = Console(file=io.StringIO(), width=80)
        canvas.print(view._picture())
    drawn = canvas.file.getvalue().splitlines()
    assert re.fullmatch(r"steps +[━╸╺]+ +3/7 +\d+ s left *", drawn[0])
    assert re.fullmatch(r"sampling +[━╸╺]+ +3/8 *", drawn[1])
    assert drawn[2].rstrip() == "loss 0.25  950 tokens/s   sort 85.2 % [82.0, 88.1]"
    assert all(len(line) <= 80 for line in drawn)
    out = raw.getvalue().decode()
    assert "\x1b[?25l" in out and out.rstrip().rindex("\x1b[?25h") > out.rindex("━"), "cursor back, bars gone"


def test_narrow_ascii_terminal_draws_without_error():
    console, raw = terminal("ascii")
    console.width = 30
    with RunView(console=console) as view:
        view.start(100_000)
        view.phase("student takes a task with a long name", 3, 8)
        view.step({"step": 3, "loss": 0.25, "tokens_per_second": 950.0})
    assert b"steps" in raw.getvalue()


def test_unknown_total_after_a_known_one_pulses_instead_of_lying():
    console, _ = terminal()
    with RunView(console=console) as view:
        view.start(2)
        view.phase("sampling", 3, 8)
        view.phase("training")
        assert [task.total for task in view._bars.tasks] == [2, None]


@pytest.mark.parametrize("make", [plain_console, terminal])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_S_6_hostile_names_and_prompts_do_nothing(make, encoding):
    console, raw = make(encoding)
    with RunView(console=console) as view:
        view.start(2, [HOSTILE])
        view.phase(HOSTILE, 1, 2)
        view.eval({**EVAL, "task": HOSTILE, "model": HOSTILE})
        view.eval({**EVAL, "task": HOSTILE})
        view.step({"step": 1, "loss": 1.0})
        view.message(HOSTILE)
        console.print(view._picture())
    out = raw.getvalue().decode(encoding)
    for harm in ("\x1b[31mred", "\x1b]0;", "\u202e", "\u2066", "\x07", "\U000e0041", "😄"):
        assert harm not in out
    assert "[bold]x[/bold] [/] :smile:" in out and r"\x1b[31mred" in out


def test_skipped_step_is_always_said_and_bad_numbers_do_not_break():
    console, raw = plain_console()
    with RunView(log_every=100, console=console) as view:
        view.start(3)
        view.step({"step": 1, "applied": False, "loss": math.nan, "tokens_per_second": math.inf})
        view.step({"step": 3, "loss": math.nan, "tokens_per_second": math.nan})
    lines = raw.getvalue().decode().splitlines()
    assert "inf" not in "".join(lines)
    assert lines[0] == "step 1 skipped: its loss or gradient was not finite"
    assert lines[1] == "step 3/3  loss nan"


def test_long_phase_shows_signs_of_life_in_a_log(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, raw = plain_console()
    view = RunView(console=console)
    view.start(0)
    for second in range(100):
        clock[0] = float(second)
        view.phase("eval sort", second, 100)
    view.finish()
    assert raw.getvalue().decode().splitlines() == ["eval sort 31/100", "eval sort 62/100", "eval sort 93/100"]


def test_time_left_counts_the_steps_of_this_process_only(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console, raw = plain_console()
    view = RunView(console=console)
    view.start(100, done=90)
    clock[0] = 8.0
    view.step({"step": 94, "loss": 1.0})
    assert "12 s left" in raw.getvalue().decode()


def test_finish_twice_and_after_an_error_says_how_far_it_came():
    console, raw = plain_console()
    view = RunView(console=console)
    with pytest.raises(KeyboardInterrupt), view:
        view.start(9)
        view.step({"step": 1, "loss": 1.0})
        raise KeyboardInterrupt
    view.finish()
    assert raw.getvalue().decode().count("1/9 steps in") == 1


def test_no_color_is_honoured_and_a_dumb_terminal_gets_lines():
    console, raw = terminal()
    bare = Console(file=console.file, force_terminal=True, _environ={"NO_COLOR": "1", "TERM": "xterm"}, width=80)
    play(RunView(console=bare))
    assert not re.search(rb"\x1b\[[0-9;]*(3[0-7]|9[0-7])m", raw.getvalue())
    console, raw = terminal()
    dumb = Console(file=console.file, force_terminal=True, _environ={"TERM": "dumb"}, width=80)
    play(RunView(console=dumb))
    assert b"\x1b[1A" not in raw.getvalue() and b"step 7/7" in raw.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_in_a_real_pseudo_terminal(tmp_path):
    import os
    import pty

    code = (
        "import time\nfrom opd.reports.progress import RunView\n"
        "with RunView() as view:\n view.start(3)\n view.phase('sampling', 1, 2)\n time.sleep(0.3)\n"
        " view.step({'step': 1, 'loss': 1.0})\n print('stray print')\n time.sleep(0.3)\n"
    )
    child, descriptor = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24")
        os.execv(sys.executable, [sys.executable, "-c", code])
    out = b""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            piece = os.read(descriptor, 65536)
        except OSError:
            break
        if not piece:
            break
        out += piece
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(descriptor)
    text = out.decode()
    assert "sampling" in text and "stray print" in text and "1/3 steps in" in text
