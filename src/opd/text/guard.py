"""Ordinary text stays ordinary: only what a template wrote can become a control token.

A tokenizer reads `<|im_end|>` as one token wherever it stands, also inside a question somebody typed. Here the control
tokens get secret names, known to nobody's data, in a private copy of the tokenizer:

1. `hide` takes the control tokens' texts out of the data before a template sees it;
2. `seal` gives the control tokens that the template wrote their secret names, and puts the hidden texts back;
3. `encode` reads the result with the private copy: secret names are control tokens, everything else is text.

The whole text is read in one go, so ids are those of the original tokenizer wherever data is harmless. A template that
deletes parts from the middle of a message could still join two harmless pieces into a control token; none is known to.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

_PRIVATE_USE = [chr(code) for code in range(0xE000, 0xF900)]
_FIRST_NUMBER = 0xF0000  # private use too: a name is a nonce and one character that counts


class Guard:
    """A private copy of `backend` in which the tokens `control` (text to id) answer to secret names only."""

    def __init__(self, backend: Backend, control: Mapping[str, int]) -> None:
        texts = sorted(control, key=len, reverse=True)  # the longest match wins, as in the tokenizer
        nonce, other_nonce = ("".join(secrets.choice(_PRIVATE_USE) for _ in range(8)) for _ in range(2))
        self._sealed = {text: f"{nonce}{chr(_FIRST_NUMBER + n)}" for n, text in enumerate(texts)}
        self._hidden = {text: f"{other_nonce}{chr(_FIRST_NUMBER + n)}" for n, text in enumerate(texts)}
        self._names = {number: self._sealed[text] for text, number in control.items()}
        self._revealed = {name: text for text, name in self._hidden.items()}
        self._control = _any_of(texts)
        self._seal_marks = _any_of(self._sealed.values())
        self._hide_marks = _any_of(self._hidden.values())
        self._backend = _renamed(backend, self._sealed)
        self.control_ids = frozenset(control.values())

    def hide(self, data: str) -> str:
        """`data` with the text of every control token replaced by a mark that templates pass through."""
        return self._control.sub(lambda match: self._hidden[match[0]], data)

    def seal(self, text: str) -> str:
        """Template output around hidden data, ready for `encode`."""
        sealed = self._control.sub(lambda match: self._sealed[match[0]], text)
        return self._hide_marks.sub(lambda match: self._revealed[match[0]], sealed)

    def before_control(self, sealed: str) -> str:
        """The text in front of the first control token."""
        return self._seal_marks.split(sealed, maxsplit=1)[0]

    def from_last_control(self, sealed: str) -> str:
        """The last control token and the text behind it; all of a text without one."""
        start = max((match.start() for match in self._seal_marks.finditer(sealed)), default=0)
        return sealed[start:]

    def encode(self, sealed: str) -> list[int]:
        """Ids of sealed text. Text that was never sealed has no control tokens in it, whatever it says."""
        return self.encoding(sealed).ids

    def encoding(self, sealed: str) -> Encoding:
        """The same with `offsets`: the characters of `sealed` that each token was made from."""
        return self._backend.encode(sealed, add_special_tokens=False)

    def secret(self, number: int) -> str:
        """How a control token is called in sealed text."""
        return self._names[number]


def _any_of(texts: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _renamed(backend: Backend, names: Mapping[str, str]) -> Backend:
    """A copy of `backend` whose tokens are called by their new `names`; ids stay what they are.

    Also renamed inside the model: a Unigram or WordPiece vocabulary that lists `</s>` would find it in plain text.
    """
    state = json.loads(backend.to_str())
    state.update(truncation=None, padding=None, post_processor=None)
    for token in state["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False)
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    return Backend.from_str(json.dumps(state))


def _makes(merge: str | list[str], names: Mapping[str, str]) -> bool:
    """Whether a merge reads or writes a renamed token."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
