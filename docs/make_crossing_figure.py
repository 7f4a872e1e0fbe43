"""Draws docs/figures/crossing.svg: one sentence in two tokenizers, and how the tokens are joined.

python docs/make_crossing_figure.py

The tokenizers are small and written by hand, so that every kind of difference is there; the joining is what a run does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.text.crossing import Crossing, agree
from opd.text.formats import Format, PromptFormat
from opd.text.pieces import piece_alone
from opd.text.tokenizer import Tokenizer
from opd.types import Prompt, Rollout, Row

FIGURE = Path(__file__).parent / "figures" / "crossing.svg"
SENTENCE = "Together, 47 + 86 = 133 and a naïve ½"
END = {"student": "<|im_end|>", "teacher": "</s>"}

# What a row of letters is joined to, from the left: the student's tokens, in the spelling of bytes that GPT-2 made up.
JOINED = ("To", "gether", "Ġ47", "Ġ+", "Ġ86", "Ġ=", "Ġ13", "Ġand", "Ġa", "Ġna", "ve", "Ġ")
# The teacher's, likelier than any other way to say them. Numbers are digits, each by itself.
PIECES = ("▁Tog", "ether", "▁", "▁+", "▁=", "▁and", "▁a", "▁na", "ï", "ve", ",", *"0123456789")

WIDTH, LEFT, ROW, BOX, GAP = 1130, 76, 62, 30, 5
LETTER, LEAST = 9.0, 26.0  # of a character, of a token
LOOKS = {
    "same": ("#d9ecdf", "#2f7a4d", "one token of either side, the same entry of both vocabularies"),
    "span": ("#d7e5f6", "#2a62a3", "a span: the least run of both that is the same bytes"),
    "alone": ("#f6dfd8", "#a8482c", "not joined: no token of the other side is this text"),
}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.token{font:13px ui-monospace,'DejaVu Sans Mono',monospace}"
    ".title{font-weight:600}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE: two bytes of one character may be two tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words, merges = [END["student"], *alphabet], []
    for word in JOINED:
        for n in range(2, len(word) + 1):
            if word[:n] not in words:
                words.append(word[:n])
                merges.append((word[: n - 1], word[n - 1]))
    made = Backend(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END["student"], pad_token=END["student"])


def unigram() -> PreTrainedTokenizerFast:
    """A Unigram model with byte fallback whose normaliser takes compatibility characters apart."""
    spare = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    letters = [(letter, -10.0) for letter in "abcdefghijklmnopqrstuvwxyzT+=⁄"]
    words = [("<unk>", -30.0), (END["teacher"], -30.0), *((piece, -1.0) for piece in PIECES), *letters, *spare]
    made = Backend(models.Unigram(vocab=words, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END["teacher"], unk_token="<unk>")


def crossing() -> Crossing:
    plain = Format(kind="plain", plain_template="{prompt}", system_prompt=None, chat_template_kwargs={}, end_tokens=())
    student, teacher = (PromptFormat(Tokenizer(words), plain) for words in (byte_level(), unigram()))
    made = agree(student, teacher)
    assert isinstance(made, Crossing)
    return made


# ---- what is joined ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Neighbouring tokens that are joined, or that are not. kind: same, span or alone."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    kind: str


def groups(made: Crossing, sentence: str = SENTENCE) -> list[Group]:
    """An answer that is the sentence and its end, cut into spans and what lies between them."""
    row = Row(id="figure/0", domain="figure", prompt="Q: ", completion=sentence)
    ids = made.student_fmt.completion_ids(row)
    assert ids is not None
    rollout = Rollout(
        id="figure",
        prompt=Prompt(row=row, ids=made.student_fmt.prompt_ids(row)),
        response_ids=ids,
        behaviour_logprobs=np.full(len(ids), np.nan, np.float32),
        mask=np.ones(len(ids), np.bool_),
        policy_version=0,
        behaviour="dataset",
        finish_reason="stop",
    )
    read = made.read(rollout)
    span_T, span_U, same_T = read.spans.span_T, read.spans.span_U, read.spans.same_T
    ours = [_label(made.student_fmt.tokenizer, number) for number in ids]
    theirs = [_label(made.teacher_fmt.tokenizer, number) for number in read.ids]
    found: list[Group] = []
    t = u = 0
    while t < len(ours) or u < len(theirs):
        alone = _run(span_T, t, -1), _run(span_U, u, -1)
        if any(alone):
            kind, (more, others) = "alone", alone
        else:
            span = int(span_T[t])
            kind, more, others = ("same" if same_T[t] else "span"), _run(span_T, t, span), _run(span_U, u, span)
        found.append(Group(tuple(ours[t : t + more]), tuple(theirs[u : u + others]), kind))
        t, u = t + more, u + others
    return found


def _run(span: np.ndarray, start: int, number: int) -> int:
    """How many tokens from `start` on are of one span."""
    others = np.flatnonzero(span[start:] != number)
    return int(others[0]) if len(others) else len(span) - start


def _label(tokenizer: Tokenizer, number: int) -> str:
    text = piece_alone(tokenizer, int(number))
    return text[1:-1].removeprefix("0x") if text.startswith("<0x") and len(text) == 6 else text.replace(" ", "␣")


# ---- the picture ---------------------------------------------------------------------------------------------------


def picture(found: Sequence[Group]) -> str:
    """Two lines of tokens for each line of text, spans as bands between them; a legend with counts."""
    parts: list[str] = []
    x, top = float(LEFT), 30.0
    starts = [top]
    for group in found:
        width = max(_width(group.ours), _width(group.theirs))
        if x + width > WIDTH - 10:
            x, top = float(LEFT), top + 2 * ROW + 24
            starts.append(top)
        parts += _drawn(group, x, top, width)
        x += width + GAP
    for start in starts:
        parts.append(f'<text class="title" x="8" y="{start + 20:.0f}">student</text>')
        parts.append(f'<text class="title" x="8" y="{start + ROW + 20:.0f}">teacher</text>')
    y = top + ROW + BOX + 34
    for kind, (fill, line, said) in LOOKS.items():
        ours, theirs = (sum(len(side) for side in sides) for sides in zip(*_sides(found, kind), strict=True))
        parts.append(f'<rect x="{LEFT}" y="{y - 12:.0f}" width="26" height="15" rx="3" fill="{fill}" stroke="{line}"/>')
        counts = f"{ours} of the student's tokens, {theirs} of the teacher's"
        parts.append(f'<text x="{LEFT + 36}" y="{y:.0f}">{escape(f"{said}: {counts}")}</text>')
        y += 22
    height = round(y)
    title = "One sentence in the tokens of a byte-level BPE student and of a Unigram teacher, and how they are joined"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n<text x="8" y="16">{escape(SENTENCE)}</text>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _sides(found: Sequence[Group], kind: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(group.ours, group.theirs) for group in found if group.kind == kind] or [((), ())]


def _width(labels: Sequence[str]) -> float:
    return sum(max(LEAST, LETTER * len(label) + 10) for label in labels) + GAP * max(len(labels) - 1, 0)


def _drawn(group: Group, x: float, top: float, width: float) -> list[str]:
    fill, line, _ = LOOKS[group.kind]
    parts = []
    if group.kind != "alone":
        parts.append(
            f'<rect x="{x:.1f}" y="{top + BOX:.1f}" width="{width:.1f}" height="{ROW - BOX}" fill="{fill}" '
            'fill-opacity="0.55"/>'
        )
    for labels, y in ((group.ours, top), (group.theirs, top + ROW)):
        spare = (width - _width(labels)) / max(len(labels), 1)
        at = x
        for label in labels:
            wide = max(LEAST, LETTER * len(label) + 10) + spare
            box = f'x="{at:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{BOX}"'
            parts.append(f'<rect {box} rx="4" fill="{fill}" stroke="{line}"/>')
            middle = f'x="{at + wide / 2:.1f}" y="{y + 20:.1f}" text-anchor="middle"'
            parts.append(f'<text class="token" {middle}>{escape(label)}</text>')
            at += wide + GAP
    return parts


if __name__ == "__main__":
    FIGURE.write_text(picture(groups(crossing())), encoding="utf-8")
    print(f"wrote {FIGURE.relative_to(Path(__file__).parent)}")
