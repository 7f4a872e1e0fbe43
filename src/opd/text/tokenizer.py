"""A model's tokenizer: loaded with clear errors, identified by a fingerprint, deaf to special tokens in data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from opd.errors import ModelError
from opd.text.guard import Guard

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer in a folder or hub repository `source`; ModelError when there is none that works."""
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    if folder.is_dir():
        if not any((folder / name).exists() for name in _FILES):
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise ModelError(
                f"{source}: no tokenizer in this folder. Looked for {', '.join(_FILES)}; found {there}. Name the "
                "folder or hub repository that has it with `tokenizer: ...`"
            )
        source = str(folder)
    elif folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"{source}: no such folder (and a hub name has at most one slash)")
    try:
        loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, the hub and a broken file each raise their own kinds
        raise ModelError(_reason(error, source, revision)) from error
    return Tokenizer(loaded, source)


class Tokenizer:
    """What the house needs of a transformers tokenizer, which stays at hand as `hf`.

    vocab_size    the highest id that the tokenizer knows, plus one. A model's embedding may have more rows: padding.
    bos_id        None where the model has none. `adds_bos` says whether the tokenizer would put it itself.
    special_ids   tokens marked as special. `added_ids` also holds those that were merely added, such as `<think>`.
    fingerprint   sha256 of everything that turns text into ids; equal fingerprints mean equal ids.
    """

    def __init__(self, hf: Any, source: str = "the tokenizer") -> None:
        if not getattr(hf, "is_fast", False):
            raise ModelError(
                f"{source}: {type(hf).__name__} is a pure Python tokenizer; opd needs one of the `tokenizers` library "
                "(a repository with tokenizer.json), which can keep special tokens out of data"
            )
        self.hf = hf
        self.source = source
        self._backend = hf.backend_tokenizer
        self._tokens = {number: token for token, number in hf.get_vocab().items()}
        if not self._tokens:
            raise ModelError(f"{source}: the tokenizer has an empty vocabulary")
        self.vocab_size: int = max(self._tokens) + 1
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int | None = hf.eos_token_id
        added = self._backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(hf.all_special_ids) | {n for n, token in added.items() if token.special}
        self._guards: dict[frozenset[int], Guard] = {}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS in front of text by itself."""
        return self.bos_id is not None and self._backend.encode("a", add_special_tokens=True).ids[0] == self.bos_id

    @cached_property
    def fingerprint(self) -> str:
        state = json.loads(self._backend.to_str())
        del state["truncation"], state["padding"]  # how it was last called, not what it is
        state["special_tokens"] = {name: str(token) for name, token in self.hf.special_tokens_map.items()}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    @property
    def tokens(self) -> Mapping[int, str]:
        """Every id that is a token, and its name in the vocabulary."""
        return self._tokens

    def id(self, text: str) -> int | None:
        """The one token that `text` is: by name, or because it is encoded as one; else None."""
        if text in (vocabulary := self.hf.get_vocab()):
            return vocabulary[text]
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 and ids[0] != self.hf.unk_token_id else None

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. What looks like a special token in it is text as well; no BOS or EOS is added."""
        return self.guard().encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text for people and graders, without special tokens."""
        return self._decode(ids, skip=True)

    def show(self, ids: Iterable[int]) -> str:
        """Text with special tokens visible."""
        return self._decode(ids, skip=False)

    def guard(self, markers: frozenset[int] = frozenset()) -> Guard:
        """The guard for all special tokens and the added tokens `markers`, which a template uses in the same way."""
        if markers not in self._guards:
            # The unknown token is what ordinary text becomes, unless it is the start or the end of texts as well.
            unknown = {self.hf.unk_token_id} - {self.bos_id, self.eos_id}
            ids = (self.special_ids | markers) - unknown
            self._guards[markers] = Guard(self._backend, {self._tokens[number]: number for number in ids})
        return self._guards[markers]

    def _decode(self, ids: Iterable[int], *, skip: bool) -> str:
        numbers = [int(number) for number in ids]
        return self.hf.decode(numbers, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def _reason(error: BaseException, source: str, revision: str | None) -> str:
    """What was tried, what went wrong, and what to do about it, from a chain of foreign exceptions."""
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(link).__name__ for link in chain}
    said = str(error).strip().splitlines() or [type(error).__name__]
    message = f"{source} (revision {revision or 'default'}): no tokenizer could be loaded: {said[0]}"
    lower = " ".join(str(link).lower() for link in chain)
    if "GatedRepoError" in kinds or "gated repo" in lower or " 401 " in lower or " 403 " in lower:
        return f"{message}. The repository is gated or private: ask for access on its page, then set HF_TOKEN"
    if "RevisionNotFoundError" in kinds:
        return f"{message}. The repository has no revision {revision!r}"
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}:
        return (
            f"{message}. The hub could not be reached and the local cache has no copy: check the name and the network "
            "(HF_HUB_OFFLINE), or give a folder. A private or gated repository needs HF_TOKEN"
        )
    if "RepositoryNotFoundError" in kinds:
        return f"{message}. No such repository on the hub; a private or gated one needs HF_TOKEN"
    if "trust_remote_code" in lower:
        return f"{message}. It brings its own code: read it, then set `trust_remote_code: true`"
    return message
