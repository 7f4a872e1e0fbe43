"""Consoles of both kinds, and text that tries to do harm."""

from __future__ import annotations

import io

from rich.console import Console

HOSTILE = (
    "[bold]x[/bold] [/] :smile: \x1b[31mred\x1b]0;title\x07 \u202eabc\u2066 \ud800 \u2028 \U000e0041 \r\n"
    "<b>|` *a* _b_ &amp;"
)


def plain_console(encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    """What a pipe or a log file gets."""
    raw = io.BytesIO()
    return Console(file=io.TextIOWrapper(raw, encoding=encoding, write_through=True), width=80), raw


def terminal(encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    """A terminal of 80 columns."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return Console(file=stream, width=80, height=30, force_terminal=True, color_system="standard", _environ={}), raw
