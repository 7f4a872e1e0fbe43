"""Graded records without models: English of any length, and a few tokens with chosen numbers."""

from __future__ import annotations

import math
import random
from typing import Any

TEXT = """Let me think about this step by step. A train leaves the station at 9:40 and travels 126 km in 105 minutes.
So its speed is 126 / 1.75 = 72 km/h. If it kept that speed for 3 hours, it would cover 216 km.

Then we subtract the distance that was already covered: 216 - 126 = 90 km remain.
Therefore the answer is 90, because the remaining distance is what the question asks for. """
WORDS = [
    "the",
    " and",
    " is",
    " so",
    " answer",
    " minutes",
    " 72",
    ".",
    ",",
    "\n",
    " therefore",
    " we",
    " 90",
    " =",
    " it",
]


def english(
    answers: int = 8,
    tokens: int = 300,
    top: int = 5,
    *,
    step: int | None = None,
    teachers: int = 1,
    student: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """A record as models of today make it: most tokens are nearly certain, a few are not, some are a disagreement."""
    source = random.Random(seed)
    readers = (["student"] if student else []) + [f"teacher-{i}" if i else "teacher" for i in range(teachers)]
    texts: dict[str, str] = {}

    def known(shown: str) -> int:
        token = 1000 + sum(ord(c) * 31**i for i, c in enumerate(shown)) % 149_000
        texts[str(token)] = shown
        return token

    def chances(written: int, disagrees: bool) -> tuple[float, float, list[tuple[int, float]]]:
        sharp = source.random() < 0.7
        first = source.uniform(0.9, 0.9999) if sharp else source.uniform(0.3, 0.8)
        left, row = 1 - first, []
        for word in source.sample(WORDS, top):
            row.append((known(word), left * 0.6))
            left *= 0.4
        row = [(written, first), *row][:top] if not disagrees else [(row[0][0], first), (written, 0.02), *row[1:]][:top]
        row.sort(key=lambda pair: -pair[1])
        own = 0.02 * source.uniform(0.01, 1) if disagrees else first
        entropy = -sum(p * math.log(p) for _, p in row)
        return math.log(own), entropy, [(token, round(math.log(max(p, 1e-9)), 4)) for token, p in row]

    found = []
    for number in range(answers):
        pieces = split(TEXT * (tokens // 60 + 1))[:tokens]
        if source.random() < 0.5 and tokens > 2:
            pieces[-1] = "<|im_end|>"
        answer: dict[str, Any] = {
            "id": f"{step or 0}-{number}",
            "prompt_id": f"problem-{number}",
            "domain": ("arithmetic", "reading", "code")[number % 3],
            "turn": 0,
            "prompt": f"Problem {number}. "
            + "How far is it still, when the train keeps its speed for three hours? " * 3,
            "finish_reason": "stop" if pieces and pieces[-1] == "<|im_end|>" else "length",
            "score": float(number % 2),
            "ids": [known(piece) for piece in pieces],
            "pieces": pieces,
            "mask": [0 if number == 2 and i < 12 else 1 for i in range(len(pieces))],
        }
        for key in ("logprobs", "entropy", "top"):
            answer[key] = {name: [] for name in readers}
        for token in answer["ids"]:
            wrong = source.random() < (0.05 if step is None or step == 0 else 0.01)
            for name in readers:
                own, entropy, row = chances(token, wrong and name != "student")
                answer["logprobs"][name].append(round(own, 4))
                answer["entropy"][name].append(round(entropy, 4))
                answer["top"][name].append(row)
        if student:
            answer["reverse_kl"] = {
                name: [
                    round(abs(p - q) / 2, 4)
                    for p, q in zip(answer["logprobs"]["student"], answer["logprobs"][name], strict=True)
                ]
                for name in readers[1:]
            }
        found.append(answer)
    return {
        "schema_version": 1,
        "format": "opd-graded",
        "title": "Word problems",
        "step": step,
        "student": "student" if student else None,
        "teachers": readers[-teachers:],
        "readers": {name: {"model": f"example/{name}", "fingerprint": "sha256:0123abcd"} for name in readers},
        "texts": texts,
        "answers": found,
    }


def split(text: str) -> list[str]:
    """Words with the space before them, digits and marks on their own: about what a byte-level BPE does."""
    pieces, word = [], ""
    for c in text:
        if c in " \n" or (c.isalnum() and word[-1:].isdigit()) or not (c.isalnum() or c in " \n"):
            if word:
                pieces.append(word)
            word = c
        else:
            word += c
        if c == "\n":
            pieces.append(word)
            word = ""
    return [*pieces, word] if word else pieces


def by_hand(*tokens: tuple[str, float, float], **changed: Any) -> dict[str, Any]:
    """A record of one answer: (text, log-probability of the student, of the teacher) for each token."""
    answer = {
        "id": "one",
        "prompt_id": "p",
        "domain": "here",
        "turn": 0,
        "prompt": "A prompt.",
        "finish_reason": None,
        "score": None,
        "ids": list(range(len(tokens))),
        "pieces": [piece for piece, _, _ in tokens],
        "mask": [1] * len(tokens),
        "logprobs": {"student": [p for _, p, _ in tokens], "teacher": [q for _, _, q in tokens]},
        "entropy": {"student": [0.5] * len(tokens), "teacher": [0.25] * len(tokens)},
        "reverse_kl": {"teacher": [0.1] * len(tokens)},
        "top": {name: [[(i, -0.1)] for i in range(len(tokens))] for name in ("student", "teacher")},
        **changed,
    }
    return {
        "schema_version": 1,
        "format": "opd-graded",
        "title": "By hand",
        "step": None,
        "student": "student",
        "teachers": ["teacher"],
        "readers": {name: {"model": f"example/{name}", "fingerprint": ""} for name in ("student", "teacher")},
        "texts": {str(i): piece for i, (piece, _, _) in enumerate(tokens)},
        "answers": [answer],
    }


def joined() -> dict[str, Any]:
    """An answer of seven tokens that the teacher reads in its own: two as one, one as two, three alike, one not."""
    tokens = [
        ("hel", -0.5),
        ("lo", -0.5),
        (" wor", -1.0),
        ("ld", -0.2),
        ("\ufffd", -9.0),
        ("!", -0.1),
        ("<|end|>", -0.3),
    ]
    made = by_hand(*((piece, p, 0.0) for piece, p in tokens))
    answer = made["answers"][0]
    own = [
        [(7, "hello", -5.0)],
        [(3, " w", -1.0), (4, "or", -3.5)],
        [(5, "ld", -0.25)],
        [(6, "!", -0.1)],
        [(1, "</s>", -0.5)],
    ]
    made["readers"]["teacher"]["crossed"] = {
        "coverage": 6 / 7,
        "same": 3 / 7,
        "span_tokens": 1.2,
        "span_own_tokens": 1.2,
    }
    made["own_texts"] = {"teacher": {"0": "Hi", "1": "</s>", "7": "hello"}}
    answer |= {
        "finish_reason": "stop",
        "spans": {"teacher": [0, 0, 1, 2, -1, 3, 4]},
        "own": {"teacher": own},
        "own_top": {"teacher": [[(0, -0.1), (1, -4.0)], *([[(0, -0.1)]] * 4)]},
    }
    answer["logprobs"]["teacher"] = [-2.5, -2.5, -4.5, -0.25, None, -0.1, -0.5]
    answer["entropy"]["teacher"] = [0.25, 0.25, 0.75, 0.25, None, 0.25, 0.25]
    answer["top"]["teacher"] = [[]] * len(tokens)
    answer["reverse_kl"]["teacher"] = [None] * len(tokens)
    return made
