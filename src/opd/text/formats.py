"""From a row of data to token ids, once: through the model's own chat template, or a plain one for base models."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from opd.errors import DataError, ModelError
from opd.text.contexts import PromptContext
from opd.text.guard import Guard
from opd.text.tokenizer import Tokenizer
from opd.types import Message, Row

# A template may build its markers from the role (`'<|' + role + '|>'`), so a role is never free text.
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a row becomes text for one model; the fields mean what they mean in the config's `format`."""

    kind: Literal["auto", "chat", "plain"]
    plain_template: str
    system_prompt: str | None
    chat_template_kwargs: Mapping[str, Any]
    end_tokens: tuple[str, ...]


@dataclass(frozen=True)
class Lead:
    """The end of a prompt, that answers are read behind: sealed text and its ids.

    It begins with the last control token, where tokenizers begin anew, so that a long prompt is not encoded with every
    answer. All of the prompt, without a BOS that is put in front, where it has no control token. Empty for raw text.
    """

    sealed: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Behind:
    """An answer as it was encoded, behind `skipped` tokens and `offset` characters of its prompt."""

    encoding: Encoding
    skipped: int
    offset: int

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """int64 [T]: of the answer alone."""
        return np.array(self.encoding.ids[self.skipped :], dtype=np.int64)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [T, 2]: first character of the answer that each token was made from, and the one behind the last."""
        found = np.array(self.encoding.offsets[self.skipped :], dtype=np.int64).reshape(-1, 2)
        return np.maximum(found - self.offset, 0)


class PromptFormat:
    """One model's way to write prompts and completions.

    kind     chat or plain: auto is decided by whether the tokenizer has a chat template.
    end_ids  tokens that end an answer. The first is primary: it closes the completions of data. From the format's
             `end_tokens`, else the model's generation config, else the tokenizer's EOS; of several ends, the one that
             the chat template closes an answer with comes first.
    context  what prompts are made of besides the row's own; only scorers have one.

    Data cannot produce special tokens, nor the turn markers of the model's template: their text is read as text.
    ModelError when the format does not fit the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        fmt: Format,
        generation_end_ids: Sequence[int] = (),
        context: PromptContext | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.context = context or PromptContext()
        self._own_format = fmt
        if self.context.system_prompt is not None:
            fmt = replace(fmt, system_prompt=self.context.system_prompt)
        self.format = fmt
        has_template = bool(tokenizer.hf.chat_template)
        self.kind: Literal["chat", "plain"] = ("chat" if has_template else "plain") if fmt.kind == "auto" else fmt.kind
        if self.kind == "chat" and not has_template:
            raise ModelError(f"{tokenizer.source}: format.kind is chat, but the tokenizer has no chat template")
        if self.kind == "plain" and "{prompt}" not in fmt.plain_template:
            raise ModelError(f"format.plain_template {fmt.plain_template!r} does not contain {{prompt}}")
        self._guard = tokenizer.guard(self._markers() if self.kind == "chat" else frozenset())
        self.end_ids = self._ends(generation_end_ids)

    def without_context(self) -> PromptFormat:
        """The same format for a model that reads the row's own prompt."""
        return PromptFormat(self.tokenizer, self._own_format, self.end_ids)

    def prompt_ids(self, row: Row) -> NDArray[np.int64]:
        """int64 [T]: what the model reads before it answers, with exactly one BOS where the model has one.

        A row of raw text (empty prompt) starts with BOS, or without one with the primary end token, so that its first
        token can be predicted. DataError when the row does not fit the format, or lacks a column of the context.
        """
        row = self.context.row(row)
        if row.prompt == "":
            if row.completion is None:
                raise DataError(f"row {row.id}: the prompt is empty and there is no completion")
            start = self.end_ids[0] if self.tokenizer.bos_id is None else self.tokenizer.bos_id
            return np.array([start], dtype=np.int64)
        return np.array(self._with_bos(self._guard.encode(self._sealed(row))), dtype=np.int64)

    def lead(self, row: Row) -> Lead:
        """What stands in front of any answer to `row`. DataError as from `prompt_ids`."""
        row = self.context.row(row)
        sealed = "" if row.prompt == "" else self._sealed(row)
        ids = tuple(self._guard.encode(sealed))
        tail = self._guard.from_last_control(sealed)
        tail_ids = tuple(self._guard.encode(tail))
        return Lead(tail, tail_ids) if ids[len(ids) - len(tail_ids) :] == tail_ids else Lead(sealed, ids)

    def behind(self, lead: Lead, sealed: str) -> Behind:
        """How the model reads an answer behind its prompt, as it is: no template trims it, echoes it or closes it.

        `sealed` is text in which control tokens have their secret names (`guard.secret`), all else is text. It is read
        in one go with the prompt, and by itself where a token would reach across the border between the two.
        """
        whole = self._guard.encoding(lead.sealed + sealed)
        count = len(lead.ids)
        if tuple(whole.ids[:count]) == lead.ids:
            return Behind(whole, count, len(lead.sealed))
        return Behind(self._guard.encoding(sealed), 0, 0)

    def answer_ids(self, row: Row, text: str) -> NDArray[np.int64]:
        """int64 [T]: an answer of any text, which nothing closes, as the model goes on behind the row's prompt."""
        return self.behind(self.lead(row), text).ids

    @property
    def guard(self) -> Guard:
        """Keeps the control tokens of this format out of data."""
        return self._guard

    def completion_ids(self, row: Row) -> NDArray[np.int64] | None:
        """int64 [T]: the row's own answer, closed by the primary end token exactly once; None without an answer.

        The ids are those with which the template continues `prompt_ids`. Where it does not continue them with the
        answer as it is (it strips or adds a thinking block), the answer is encoded by itself.
        """
        if row.completion is None:
            return None
        body = self._guard.encode(row.completion) if row.prompt == "" else self._continuation(row, row.completion)
        if not body or body[-1] not in self.end_ids:
            body = [*body, self.end_ids[0]]
        early = [number for number in body[:-1] if number in self.end_ids]
        if early:
            token = self.tokenizer.tokens[early[0]]
            raise DataError(
                f"row {row.id}: its completion holds the end token {token!r} before its end; an answer could never be "
                "sampled past it. Change format.end_tokens or the row"
            )
        return np.array(body, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Text for people and graders, without special tokens."""
        return self.tokenizer.decode(ids)

    def show(self, row: Row) -> str:
        """The row's prompt as the model reads it, special tokens visible."""
        return self.tokenizer.show(self.prompt_ids(row))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the ids of a row: tokenizer, template, format, end tokens, context."""
        parts = [self.tokenizer.fingerprint, self.tokenizer.hf.chat_template, asdict(self.format), self.end_ids]
        if self.context != PromptContext():
            parts.append(asdict(self.context))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def closing_id(self) -> int | None:
        """The control token with which the chat template closes an assistant's turn; None where there is none."""
        if self.kind == "plain":
            return None
        answer = "probe"
        turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        try:
            text = self._render(turns, add_generation_prompt=False)
        except Exception:  # a template without place for a final answer closes none
            return None
        rest = self._guard.encode(self._guard.seal(text.rpartition(answer)[2]))
        return next((number for number in rest if number in self._guard.control_ids), None)

    # ---- text ---------------------------------------------------------------------------------------------------

    def _sealed(self, row: Row, completion: str | None = None) -> str:
        """The row as text in which only what we and the template wrote can become control tokens."""
        return self._sealed_chat(row, completion) if self.kind == "chat" else self._sealed_plain(row, completion)

    def _sealed_plain(self, row: Row, completion: str | None) -> str:
        if not isinstance(row.prompt, str):
            raise DataError(
                f"row {row.id}: its prompt is a chat, but the format of {self.tokenizer.source} is plain; set "
                "format.kind=chat (the tokenizer needs a chat template) or give the prompt as a string"
            )
        before, after = map(self._guard.seal, self.format.plain_template.split("{prompt}", maxsplit=1))
        system = "" if self.format.system_prompt is None else f"{self.format.system_prompt}\n\n"
        return f"{system}{before}{row.prompt}{after}{completion or ''}"

    def _sealed_chat(self, row: Row, completion: str | None) -> str:
        turns: list[Message] = (
            [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
        )
        if not turns:
            raise DataError(f"row {row.id}: its chat has no turns")
        for turn in turns:
            if turn["role"] not in ROLES:
                raise DataError(f"row {row.id}: the role {turn['role']!r} is none of {', '.join(ROLES)}")
        if self.format.system_prompt is not None and turns[0]["role"] not in ("system", "developer"):
            turns.insert(0, {"role": "system", "content": self.format.system_prompt})
        elif self.context.system_prompt is not None:
            text = f"{self.context.system_prompt}\n\n{turns[0]['content']}"
            turns[0] = {"role": turns[0]["role"], "content": text}
        if completion is not None:
            turns.append({"role": "assistant", "content": completion})
        hidden: list[Message] = [{"role": t["role"], "content": self._guard.hide(t["content"])} for t in turns]
        try:
            text = self._render(hidden, add_generation_prompt=completion is None)
        except Exception as error:  # templates are foreign programs: they raise what they like
            raise DataError(f"row {row.id}: the chat template refuses it: {type(error).__name__}: {error}") from error
        return self._guard.seal(text)

    def _render(self, turns: list[Message], *, add_generation_prompt: bool) -> str:
        return self.tokenizer.hf.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **self.format.chat_template_kwargs
        )

    # ---- ids ----------------------------------------------------------------------------------------------------

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_id
        if bos is None or ids[:1] == [bos]:
            return ids
        # A chat template that writes no BOS speaks for a model that wants none, unless the tokenizer itself adds it.
        return [bos, *ids] if self.kind == "plain" or self.tokenizer.adds_bos else ids

    def _continuation(self, row: Row, completion: str) -> list[int]:
        """Ids of the answer behind the prompt's ids, without the token that closes it."""
        prompt, whole = self._sealed(row), self._sealed(row, completion)
        if not whole.startswith(prompt):
            return self._guard.encode(completion)
        answer = whole[len(prompt) :]
        if self.kind == "chat":
            answer = self._guard.before_control(answer)
        if answer.strip() != completion.strip():
            return self._guard.encode(completion)
        prompt_ids, whole_ids = self._guard.encode(prompt), self._guard.encode(whole)
        if whole_ids[: len(prompt_ids)] != prompt_ids:  # a token reaches across the border
            return self._guard.encode(answer)
        rest = whole_ids[len(prompt_ids) :]
        end = next((n for n, number in enumerate(rest) if number in self._guard.control_ids), len(rest))
        return rest[:end]

    # ---- what the model's template and configuration say ----------------------------------------------------------

    def _markers(self) -> frozenset[int]:
        """Added tokens, not marked as special, that the template writes around plain turns (`<start_of_turn>`).

        White space, words and paired tags such as <think> </think> are what people write in texts: they stay tokens.
        """
        turns: list[Message] = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        try:
            text = self._render(turns, add_generation_prompt=False)
        except Exception as error:
            raise ModelError(
                f"{self.tokenizer.source}: its chat template cannot render a plain chat (user, assistant, user) with "
                f"chat_template_kwargs {dict(self.format.chat_template_kwargs)}: {type(error).__name__}: {error}"
            ) from error
        tokens = self.tokenizer.tokens
        names = {tokens[number] for number in self.tokenizer.added_ids}
        written = set(self.tokenizer.hf(text, add_special_tokens=False)["input_ids"]) & self.tokenizer.added_ids
        return frozenset(
            number
            for number in written - self.tokenizer.special_ids
            if re.search(r"[^\w\s▁]", tokens[number])
            and f"</{tokens[number][1:]}" not in names
            and f"<{tokens[number][2:]}" not in names
        )

    def _ends(self, generation_end_ids: Sequence[int]) -> tuple[int, ...]:
        tokenizer = self.tokenizer
        if self.format.end_tokens:
            named = [(text, tokenizer.id(text)) for text in self.format.end_tokens]
            for text, number in named:
                if number is None:
                    raise ModelError(
                        f"format.end_tokens: {text!r} is not one token of {tokenizer.source}: it is encoded as "
                        f"{[tokenizer.tokens[part] for part in tokenizer.encode(text)]}"
                    )
            return tuple(dict.fromkeys(number for _, number in named if number is not None))
        ends = list(generation_end_ids) or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
        if not ends:
            raise ModelError(
                f"{tokenizer.source}: neither the model's generation config nor the tokenizer names an end token, so "
                "answers could never end; name one with format.end_tokens"
            )
        for number in ends:
            if number not in tokenizer.tokens:
                raise ModelError(
                    f"{tokenizer.source}: the generation config ends answers with id {number}, but the tokenizer's "
                    f"ids go up to {tokenizer.vocab_size - 1}; name the end tokens with format.end_tokens"
                )
        if self.closing_id in ends:
            ends.insert(0, self.closing_id)
        return tuple(dict.fromkeys(ends))
