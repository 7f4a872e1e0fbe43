"""A small world of words in which tokenizers differ: put five made-up words into order, or turn the list round.

    put in order: talosk, brin, orula, melda, brano
    brano, brin, melda, orula, talosk

The words are made of syllables and there are more of them than a small tokenizer has entries: each tokenizer cuts them
in its own way. Every row is made from a seed, every answer is verifiable, one wrong letter spoils it.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any, Literal

WORDS = 5
LEXICON = 240
STARTS = ("b", "br", "d", "f", "g", "gr", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr", "v", "z", "")
VOWELS = ("a", "e", "i", "o", "u")
ENDS = ("", "", "", "n", "r", "l", "s", "nk", "st")

Split = Literal["train", "heldout"]
TASKS = {"order": "put in order", "turn": "turn round", "down": "put in falling order"}
SEPARATORS = {"comma": ", ", "arrow": " > ", "and": " and "}


def _lexicon() -> tuple[str, ...]:
    source = random.Random("across tokenizers/lexicon")
    words: set[str] = set()
    while len(words) < LEXICON:
        syllables = [source.choice(STARTS) + source.choice(VOWELS) for _ in range(source.choice((2, 2, 3)))]
        word = "".join(syllables) + source.choice(ENDS)
        if 4 <= len(word) <= 9 and word != "and":
            words.add(word)
    return tuple(sorted(words))


LEX = _lexicon()


def split_of(words: tuple[str, ...]) -> Split:
    """Which split a set of words belongs to, in whatever order: one in ten is held out."""
    return "heldout" if hashlib.sha256(" ".join(sorted(words)).encode()).digest()[0] % 10 == 0 else "train"


def solve(task: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The words as the task wants them."""
    return {"order": tuple(sorted(words)), "turn": words[::-1], "down": tuple(sorted(words, reverse=True))}[task]


def slip(words: tuple[str, ...], source: random.Random) -> tuple[str, ...]:
    """The words with one mistake: two neighbours exchanged, one left out, one written twice, one letter another."""
    made, at = list(words), source.randrange(len(words) - 1)
    match source.choice(("exchanged", "left out", "twice", "letter")):
        case "exchanged":
            made[at : at + 2] = made[at + 1], made[at]
        case "left out":
            del made[at]
        case "twice":
            made[at] = made[at + 1]
        case _:
            place = source.randrange(len(made[at]))
            others = [letter for letter in "aeioubdgklmnprstvz" if letter != made[at][place]]
            made[at] = made[at][:place] + source.choice(others) + made[at][place + 1 :]
    return tuple(made)


def problems(
    split: Split, n: int, *, task: str = "order", style: str | None = "comma", slips: float = 0.0, seed: int = 0
) -> list[dict[str, Any]]:
    """`n` different problems of one split. The first rows of a longer list with the same seed are the same rows.

    style   what stands between the words of the answer; None: one of the three by chance, row by row.
    slips   share of the rows whose completion has one mistake; `answer` is right all the same.
    """
    source = random.Random(f"across tokenizers/{task}/{split}/{seed}")
    mistakes = random.Random(f"across tokenizers/slips/{seed}")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    while len(rows) < n:
        words = tuple(source.sample(LEX, WORDS))
        drawn = source.choice(sorted(SEPARATORS))
        if split_of(words) != split:
            continue
        right = solve(task, words)
        slipped = slip(right, mistakes) if mistakes.random() < slips else right
        separator = SEPARATORS[style or drawn]
        prompt = f"{TASKS[task]}: {', '.join(words)}\n"
        texts = {"completion": separator.join(slipped), "answer": separator.join(right)}
        rows[words] = {"prompt": prompt, **texts, "task": task}
    return list(rows.values())


def corpus() -> list[str]:
    """Text that tokenizers are trained on: problems and answers of all tasks and styles."""
    return [
        row["prompt"] + row["completion"]
        for task in TASKS
        for row in problems("train", 4_000, task=task, style=None, seed=900)
    ]
