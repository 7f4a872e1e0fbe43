"""Which prompts a step asks: a pure function of the settings and the step, so that resuming needs no other state."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from opd.errors import DataError
from opd.types import Prompt, Row

_MAX_PERIOD = 100_000  # slots until a mixture repeats; finer weights are rounded to whole slots


class PromptStream:
    """Batches of prompts from weighted sources.

    dropped       source name to the number of its rows that were longer than `max_prompt_tokens`.
    longest       tokens of the longest prompt that is left.
    len()         prompts that are left.

    After any number of prompts, each source has had its weight's share of them to within one prompt. Every source is
    walked in epochs: no row comes again before all others of its source have come; `shuffle` gives each epoch an order
    of its own.

    Every row is rendered when the stream is made, and its ids are kept: about a second and 8 MB per million tokens.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[Row], float]],
        render: Callable[[Row], Prompt],
        *,
        per_step: int,
        max_prompt_tokens: int,
        shuffle: bool,
        seed: int,
        need_completion: bool,
    ) -> None:
        """`sources`: (rows, weight) pairs, rows as `read_source` gives them.

        DataError when a prompt has no tokens, a completion is needed and missing, or a source has only long prompts.
        """
        self.per_step = per_step
        self.dropped: dict[str, int] = {}
        self._walks: list[_Walk] = []
        for rows, _ in sources:
            name = rows[0].id.rpartition("/")[0]
            prompts = [_rendered(row, render, need_completion) for row in rows]
            kept = tuple(prompt for prompt in prompts if len(prompt.ids) <= max_prompt_tokens)
            if not kept:
                lengths = sorted(len(prompt.ids) for prompt in prompts)
                raise DataError(
                    f"{name}: all {len(prompts)} prompts are longer than prompts.max_prompt_tokens="
                    f"{max_prompt_tokens}: they have {lengths[0]} to {lengths[-1]} tokens. Raise the limit or shorten "
                    "the prompts"
                )
            self.dropped[name] = len(prompts) - len(kept)
            self._walks.append(_Walk(name, kept, seed if shuffle else None))
        self._shares = integer_shares([weight for _, weight in sources])
        self._pattern, self._before = interleave(self._shares)
        self.longest = max(len(prompt.ids) for walk in self._walks for prompt in walk.prompts)

    def __len__(self) -> int:
        return sum(len(walk.prompts) for walk in self._walks)

    def prompts(self) -> Iterator[Prompt]:
        """Every prompt that is left, once."""
        return (prompt for walk in self._walks for prompt in walk.prompts)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every prompt's id, tokens and completion: equal where the data and its rendering are equal."""
        digest = hashlib.blake2b(digest_size=8)
        for prompt in self.prompts():
            digest.update(f"{prompt.id} {len(prompt.ids)}".encode("utf-8", "surrogatepass"))
            digest.update(prompt.ids.tobytes())
            if prompt.completion_ids is not None:
                digest.update(prompt.completion_ids.tobytes())
        return digest.hexdigest()

    def batch(self, step: int) -> list[Prompt]:
        """The `per_step` prompts of step 0, 1, ...

        A row that comes twice in one batch (at the turn of an epoch, or when there are fewer rows than prompts) has
        `#2`, `#3` ... added to its id the second and third time: rollouts are told apart by the ids of their prompts.
        """
        seen: Counter[str] = Counter()
        prompts = []
        for slot in range(step * self.per_step, (step + 1) * self.per_step):
            period, place = divmod(slot, len(self._pattern))
            source = self._pattern[place]
            prompt = self._walks[source].at(period * self._shares[source] + int(self._before[place]))
            seen[prompt.id] += 1
            times = seen[prompt.id]
            prompts.append(
                prompt if times == 1 else replace(prompt, row=replace(prompt.row, id=f"{prompt.row.id}#{times}"))
            )
        return prompts


def integer_shares(weights: Sequence[float]) -> list[int]:
    """Weights as the smallest integers of the same proportions, summing to at most 100,000.

    A weight counts as the decimal number it is written as (0.1 is one tenth). Weights that would need a larger sum are
    rounded to it, each to at least 1.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    integers = [int(weight * scale) for weight in exact]
    if sum(integers) // math.gcd(*integers) > _MAX_PERIOD:
        total = sum(integers)
        integers = [max(1, round(Fraction(integer * (_MAX_PERIOD - len(weights)), total))) for integer in integers]
    divisor = math.gcd(*integers)
    return [integer // divisor for integer in integers]


def interleave(shares: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One period of a mixture, int64 [sum(shares)] each: the source of every slot, and its earlier slots in the period.

    Of the first n slots, a source has more than n share/sum - 1 and fewer than n share/sum + 1.
    """
    total = sum(shares)
    counts = [0] * len(shares)
    pattern, before = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    for slot in range(total):
        # The j-th prompt (from 0) of a source may come from slot floor(j total / share) on, and must have come before
        # slot ceil((j + 1) total / share). Taking the most urgent one keeps all these promises: they are unit jobs that
        # fill one machine exactly, for which earliest deadline first is optimal.
        ready = [source for source, share in enumerate(shares) if counts[source] * total // share <= slot]
        source = min(ready, key=lambda source: (-(-(counts[source] + 1) * total // shares[source]), source))
        pattern[slot], before[slot] = source, counts[source]
        counts[source] += 1
    return pattern, before


@dataclass(frozen=True)
class _Walk:
    """One source, walked in epochs; `seed` None keeps the rows in their own order."""

    name: str
    prompts: tuple[Prompt, ...]
    seed: int | None

    def at(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self.prompts))
        if self.seed is None:
            return self.prompts[place]
        return self.prompts[epoch_order(len(self.prompts), self.seed, self.name, epoch)[place]]


@lru_cache(maxsize=64)
def epoch_order(size: int, seed: int, name: str, epoch: int) -> NDArray[np.int64]:
    """int64 [size]: a permutation that depends on the arguments alone, on every machine and numpy version.

    Philox's raw numbers are fixed by its definition; numpy's own `permutation` may change between versions.
    """
    key = hashlib.sha256(f"{seed}/{epoch}/{name}".encode()).digest()
    numbers = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(size)
    return np.argsort(numbers, kind="stable")


def _rendered(row: Row, render: Callable[[Row], Prompt], need_completion: bool) -> Prompt:
    prompt = render(row)
    if len(prompt.ids) == 0:
        raise DataError(f"row {row.id}: its prompt has no tokens")
    if need_completion and prompt.completion_ids is None:
        raise DataError(
            f"row {row.id} has no completion, but the objective trains on data: give its answer in columns.completion "
            "(or a final assistant turn in columns.messages)"
        )
    return prompt
