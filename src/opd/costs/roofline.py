"""How fast a step could be on a machine: the work that no implementation can leave out, at the machine's rates.

Every part of a step takes at least max(operations / product rate, bytes / memory rate, bytes over the link / link rate)
seconds, and the parts follow each other. Counted is what must be done, so the sum is a limit and not a forecast:

    a prompt that several answers share is read once; the last token of an answer is never read; no padding
    weights are read once for every pass over a batch; keys and values for every row of it, its own copy of them
    logits and activations stay in the processor's caches; what is done number by number costs nothing but its bytes
    AdamW reads parameter, gradient and two moments and writes all but the gradient, in float32

A sliding window counts as full attention, as in the ledger. Lengths may be means: work that grows with the square of a
length is then a little less than it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from opd.costs.memory import BYTES
from opd.costs.size import ModelSize

Phase = Literal["rollout", "scoring", "update"]
Bound = Literal["products", "weights", "cache", "states", "link"]
PHASES: tuple[Phase, ...] = ("rollout", "scoring", "update")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one device can do.

    products     FLOP/s of matrix products by compute type: "float32", "bfloat16" (float16 counts as bfloat16).
    memory       bytes/s of main memory, read and written bytes together.
    near         bytes/s for weights and states of up to `near_bytes`, which stay in the processor's caches.
    link         bytes/s from host to device; None where the device is the host.
    """

    products: Mapping[str, float]
    memory: float
    near: float
    near_bytes: int
    link: float | None = None

    def product(self, dtype: str) -> float:
        return self.products["bfloat16" if dtype == "float16" else dtype]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A model where it runs.

    dtype    what its products run in.
    stored   what its weights are kept in (`memory.BYTES`).
    device   a key of the rates.
    """

    size: ModelSize
    dtype: str
    stored: str
    device: str = "cpu"

    @property
    def weight_bytes(self) -> float:
        """Bytes read in a pass over so many tokens that every expert is asked: all but tables that are looked up."""
        return self.read_bytes(math.inf)

    def read_bytes(self, rows: float) -> float:
        """Bytes of weights that a pass over `rows` tokens reads; experts are taken to be chosen evenly."""
        size = self.size
        looked_up = max(size.tables - self.head, 0)
        idle = max(size.parameters - size.active_parameters - looked_up, 0)
        read = float(size.active_parameters)
        if idle:
            chosen = min(3 * size.hidden * size.mlp_width * size.layers, size.active_parameters)
            share = chosen / (chosen + idle)
            read += idle * (1 - (1 - share) ** max(rows - 1, 0))
        head = min(self.head, read)
        return (read - head) * BYTES[self.stored] + head * self.head_width

    @property
    def head(self) -> int:
        """Numbers in the head."""
        return self.size.vocab * self.size.hidden

    @property
    def head_width(self) -> float:
        """Bytes of a number in the head, which is never quantised."""
        return BYTES[self.dtype] if self.stored in ("int8", "int4") else BYTES[self.stored]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Prompts and the answers to them; lengths in tokens, means over the prompts and over the answers."""

    prompts: float
    answers: float
    prompt_tokens: float
    answer_tokens: float

    @property
    def written(self) -> float:
        """Tokens of all answers."""
        return self.answers * self.answer_tokens

    @property
    def unread(self) -> float:
        """Tokens of an answer that a model reads: the last one predicts nothing."""
        return max(self.answer_tokens - 1, 0)

    @property
    def read(self) -> float:
        """Tokens that go through a model that reads prompts and answers."""
        return self.prompts * self.prompt_tokens + self.answers * self.unread


@dataclass(frozen=True, kw_only=True)
class Writing:
    """One model that writes answers. passes: over the batch of rows, one token each (`token_passes`)."""

    model: Placed
    text: Text
    passes: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One scorer that reads answers.

    whole    it gives the whole vocabulary (its head is part of the pass over the vocabulary), else drawn tokens.
    arrives  bytes that come to its device for every step: weights that are elsewhere between two steps.
    """

    model: Placed
    text: Text
    whole: bool
    arrives: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step does.

    text               the answers that are trained on, as the student reads them.
    writing, scoring   by name; the student writes as "student".
    trainable          parameters that get a gradient; None: all. Otherwise the head is taken to be frozen.
    updates            optimiser steps on the same answers.
    looks              "batch": the vocabulary is passed once more before every gradient; "step": models read once more.
    micro_batch        tokens in one forward pass.
    """

    student: Placed
    text: Text
    writing: Mapping[str, Writing] = field(default_factory=dict)
    scoring: Mapping[str, Reading] = field(default_factory=dict)
    trainable: int | None = None
    updates: int = 1
    looks: Literal["none", "batch", "step"] = "none"
    micro_batch: float = math.inf

    @property
    def devices(self) -> tuple[str, ...]:
        """Where its models stand, the student's first."""
        models = (self.student, *(x.model for x in (*self.writing.values(), *self.scoring.values())))
        return tuple(dict.fromkeys(model.device for model in models))


@dataclass(frozen=True)
class Part:
    """One part of a step: operations, bytes, the least seconds, and which of the rates they are at.

    bound   products; or memory, for reading weights, the cache of keys and values, or states (hidden states, gradients,
            moments), whichever is most; or the link.
    """

    name: str
    phase: Phase
    flops: float
    bytes: float
    seconds: float
    bound: Bound


@dataclass(frozen=True)
class Limit:
    """The least seconds of a step, part by part."""

    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def bottleneck(self) -> Part:
        return max(self.parts, key=lambda part: part.seconds)

    def by_phase(self) -> dict[Phase, float]:
        """Seconds of rollout, scoring and update: the phases of a run (`Ledger.seconds_by_phase`)."""
        return {phase: sum(part.seconds for part in self.parts if part.phase == phase) for phase in PHASES}


def token_passes(answers: float, tokens: float, slots: int, longest: float | None = None) -> float:
    """Passes over a batch of at most `slots` rows that write `answers` answers of `tokens` tokens in the mean.

    longest   tokens of the longest; None: all have the same length, so that they come in waves of `slots`.

    The first token of an answer comes from the prompt's own pass.
    """
    after_first = max(tokens - 1, 0)
    if longest is None:
        return math.ceil(answers / slots) * after_first
    return max(longest - 1, answers * after_first / slots, 0)


def limit(step: Step, rates: Mapping[str, Rates]) -> Limit:
    """The limit of a step; `rates` by device. Raises KeyError for a device or a compute type without a rate."""
    parts = [part for name, writing in step.writing.items() for part in _written(name, writing, rates)]
    if (writer := step.writing.get("student")) is not None:
        parts.append(_weights_back(step.student, writer.model, rates[step.student.device]))
    parts += [_scoring(name, reading, step, rates[reading.model.device]) for name, reading in step.scoring.items()]
    here = rates[step.student.device]
    parts += [_head(step, here), _training(step, here), _optimiser(step, here)]
    return Limit(tuple(parts))


def _written(name: str, writing: Writing, rates: Mapping[str, Rates]) -> list[Part]:
    model, text = writing.model, writing.text
    here = rates[model.device]
    called = "" if name == "student" else f"{name} "
    kv = model.size.attention_layers * model.size.kv_width * BYTES[model.dtype]
    width = model.size.attention_layers * model.size.attention_width
    prompts = text.prompts * text.prompt_tokens
    prefill = 2.0 * _body(model) * prompts + 2.0 * model.head * text.prompts
    prefill += 4.0 * width * text.prompts * _pairs(text.prompt_tokens)
    tokens, pairs = text.answers * text.unread, text.answers * _pairs(text.unread, text.prompt_tokens)
    rows = tokens / writing.passes if writing.passes else 0.0
    decode = 2.0 * model.size.active_parameters * tokens + 4.0 * width * pairs
    return [
        _part(
            f"{called}prefill",
            "rollout",
            here,
            {model.dtype: prefill},
            weights=[(model.weight_bytes, model.weight_bytes)],
            cache=kv * prompts,
        ),
        _part(
            f"{called}decode",
            "rollout",
            here,
            {model.dtype: decode},
            weights=[(writing.passes * model.read_bytes(rows), model.weight_bytes)],
            cache=kv * pairs,
        ),
    ]


def _weights_back(student: Placed, writer: Placed, rates: Rates) -> Part:
    """The sampler reads the trained parameters themselves, unless it writes in another type: then they are cast."""
    cast = 0.0
    if student.stored not in ("int8", "int4", writer.dtype):
        cast = student.size.parameters * (BYTES[student.stored] + BYTES[writer.dtype])
    return _part("weights back", "rollout", rates, {}, states=cast)


def _scoring(name: str, reading: Reading, step: Step, rates: Rates) -> Part:
    model, text = reading.model, reading.text
    times = step.updates * (2 if step.looks == "step" else 1)
    flops, weights = _forward(model, text), model.weight_bytes
    if reading.whole:
        weights = max(weights - model.head * model.head_width, 0.0)
    else:
        flops += 2.0 * model.head * text.written
    passes = times * math.ceil(text.read / step.micro_batch) if math.isfinite(step.micro_batch) else times
    states = times * text.written * model.size.hidden * BYTES[model.dtype]
    return _part(
        f"scoring ({name})",
        "scoring",
        rates,
        {model.dtype: times * flops},
        weights=[(passes * weights, weights)],
        states=states,
        link=reading.arrives,
    )


def _head(step: Step, rates: Rates) -> Part:
    """The pass over the vocabulary: logits of all models, the gradient of the student's states and of its head."""
    student, T = step.student, step.text.written
    trained = step.trainable is None
    looks = 0 if step.looks == "none" else 1
    times = step.updates * (3 if trained else 2) + step.updates * looks
    flops = {student.dtype: 2.0 * T * student.head * times}
    passes = _micro_batches(step) * step.updates * (1 + looks)
    width = BYTES[student.dtype]
    ours = student.head * student.head_width
    weights = [(passes * ours, ours)]
    states = step.updates * (2 + looks) * T * student.size.hidden * width  # states in, their gradient out
    states += (4.0 * student.head * step.updates) if trained else 0.0
    for reading in step.scoring.values():
        if reading.whole:
            model, tokens = reading.model, reading.text.written
            again = step.updates * (1 + looks)
            flops[model.dtype] = flops.get(model.dtype, 0.0) + 2.0 * tokens * model.head * again
            theirs = model.head * model.head_width
            weights.append((passes * theirs, theirs))
            states += again * tokens * model.size.hidden * BYTES[model.dtype]
    return _part("head", "update", rates, flops, weights=weights, states=states)


def _training(step: Step, rates: Rates) -> Part:
    """Body of the student, forward and backward; the head has a part of its own."""
    student, text = step.student, step.text
    frozen = 0 if step.trainable is None else max(_body(student) - step.trainable, 0)
    flops = 3.0 * _forward(student, text) - 2.0 * frozen * text.read
    passes = 2 * _micro_batches(step)
    if step.looks == "step":
        flops += _forward(student, text)
        passes += _micro_batches(step)
    body = max(student.weight_bytes - student.head * student.head_width, 0.0)
    gradient = 4.0 * _trainable(step) * (2 * _micro_batches(step) - 1)  # written, and read again to be added to
    return _part(
        "training",
        "update",
        rates,
        {student.dtype: step.updates * flops},
        weights=[(step.updates * passes * body, body)],
        states=step.updates * gradient,
    )


def _optimiser(step: Step, rates: Rates) -> Part:
    return _part("optimiser", "update", rates, {}, states=7 * 4.0 * _trainable(step) * step.updates)


def _trainable(step: Step) -> int:
    return step.student.size.parameters if step.trainable is None else step.trainable


def _micro_batches(step: Step) -> float:
    return max(math.ceil(step.text.read / step.micro_batch), 1) if math.isfinite(step.micro_batch) else 1


def _body(model: Placed) -> int:
    """Active weights without the head."""
    return max(model.size.active_parameters - model.head, 0)


def _forward(model: Placed, text: Text) -> float:
    """Operations of the body over prompts and answers, each prompt once."""
    pairs = text.prompts * _pairs(text.prompt_tokens) + text.answers * _pairs(text.unread, text.prompt_tokens)
    return 2.0 * _body(model) * text.read + 4.0 * model.size.attention_layers * model.size.attention_width * pairs


def _pairs(tokens: float, first: float = 0.0) -> float:
    """Pairs of a token and one it attends to, as in `ledger.forward`; tokens at positions first, first + 1, ..."""
    return tokens * first + tokens * (tokens + 1) / 2


def _part(
    name: str,
    phase: Phase,
    rates: Rates,
    flops: Mapping[str, float],
    *,
    weights: Sequence[tuple[float, float]] = (),
    cache: float = 0.0,
    states: float = 0.0,
    link: float = 0.0,
) -> Part:
    """`weights` are pairs: bytes read, and bytes that must stay near for that; the rest are bytes."""

    def seconds_of(moved: float, resident: float) -> float:
        return moved / (rates.near if resident <= rates.near_bytes else rates.memory)

    memory: dict[Bound, float] = {
        "weights": sum(seconds_of(*read) for read in weights),
        "cache": cache / rates.memory,
        "states": seconds_of(states, states),
    }
    products = sum(count / rates.product(dtype) for dtype, count in flops.items() if count)
    over_link = link / rates.link if link and rates.link is not None else 0.0
    seconds = max(products, sum(memory.values()), over_link)
    bound: Bound = "products"
    if seconds > products:
        bound = "link" if seconds == over_link else max(memory, key=lambda kind: memory[kind])
    moved = sum(read for read, _ in weights) + cache + states + link
    return Part(name, phase, sum(flops.values()), moved, seconds, bound)
