"""The frame of every page: one self-contained document that may run our own script and style and nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from opd.reports.printable import printable

# What could end a <script> element, be read as markup, or reorder what a person sees in the page's source.
_UNSAFE_IN_JSON = re.compile(
    "[<>&\x7f-\xa0\xad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\uffff\U000e0000-\U000e0fff]"
)
_ENDS_ELEMENT = re.compile(r"</(script|style)|<!--|<script", re.IGNORECASE)
_DATA_ID = re.compile(r"[a-z][a-z0-9-]*\Z")


def text(value: object, *, lines: bool = False) -> str:
    """Foreign text as the content of an element: control and bidi characters as escapes, markup as entities.

    `lines` keeps line breaks and tabs, for elements that show them.
    """
    return html.escape(printable(value, lines=lines), quote=True)


def attribute(value: object) -> str:
    """Foreign text as the value of an attribute, with its double quotes: `"..."`."""
    return f'"{html.escape(printable(value), quote=True)}"'


def json_for_html(value: Any) -> str:
    """`value` as compact JSON that can stand inside a script element: no `<`, `>`, `&`, line or paragraph separator,
    no bidi or other invisible character; lone surrogates are kept as escapes. It parses back to an equal value.

    Raises ValueError for a number that is not finite: JSON has none; say null.
    """
    raw = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE_IN_JSON.sub(_json_escape, raw)


def _json_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass").hex(" ", 2)  # a character beyond U+FFFF is two escapes
    return "\\u" + units.replace(" ", "\\u")


def asset(name: str) -> str:
    """A style sheet or script of this package, by its file name."""
    return resources.files("opd.reports.page").joinpath(name).read_text(encoding="utf-8")


def page(title: str, body: str, *, css: Sequence[str], js: Sequence[str], data: Mapping[str, Any]) -> str:
    """A complete document.

    title   foreign text is fine: it is escaped here
    body    HTML that is safe already; no style and no event-handler attribute, the policy would ignore them
    css     style sheets, after base.css, in order
    js      scripts, in order, at the end of the body: the document and `data` are there when they run
    data    element id -> value; read it with JSON.parse(document.getElementById(id).textContent)

    Nothing is loaded from anywhere, and only the given `css` and `js` take effect (a policy of their SHA-256 sums).
    Raises ValueError for an id that is not lower-case letters, digits and hyphens, for a style or script that would end
    its own element, and for a number in `data` that is not finite.
    """
    styles = [asset("base.css"), *css]
    for block in (*styles, *js):
        if ended := _ENDS_ELEMENT.search(block):
            raise ValueError(f"a style or script holds {ended[0]!r}, which would end it: write it as an escape")
    for name in data:
        if not _DATA_ID.match(name):
            raise ValueError(f"data id {name!r}: lower-case letters, digits and hyphens only")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src {_hashes(js)}; style-src {_hashes(styles)}"
    )
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{text(title)}</title>",
        *(f"<style>{block}</style>" for block in styles),
        "</head>",
        "<body>",
        f"<main>\n{body}\n</main>",
        *(
            f'<script type="application/json" id="{name}">{json_for_html(value)}</script>'
            for name, value in data.items()
        ),
        *(f"<script>{block}</script>" for block in js),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _hashes(blocks: Iterable[str]) -> str:
    sums = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{value}'" for value in dict.fromkeys(sums)) or "'none'"
