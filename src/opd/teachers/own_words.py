"""A scorer with another tokenizer, heard in its own words: the answer as it reads it, every number at its own tokens.

Training takes the rows of `types.ScorerRows`. Who looks at a scorer (views, `opd grade`, the doctor) wants all that it
says, and joins it with the student's tokens afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.journal.graded import Coverage
from opd.teachers.local import LocalTeacher
from opd.teachers.member import Member
from opd.teachers.served.served import ServedTeacher
from opd.text.agreement import compare
from opd.text.crossing import CrossRead
from opd.text.formats import PromptFormat
from opd.types import Rollout, Spans


def in_own_words(reader: Member) -> Member:
    """The same scorer for answers in its own ids: nothing is crossed, its vocabulary is its own. `release` of either
    frees the device; a served one stays connected."""
    fmt = reader.format
    alone = compare(fmt, fmt)
    if isinstance(reader, ServedTeacher):
        return ServedTeacher(
            reader.service,
            fmt,
            alone,
            name=reader.name,
            temperature=reader.temperature,
            vocab_size=fmt.tokenizer.vocab_size,
            parameter_count=reader.parameter_count,
            max_invalid=reader.max_invalid,
        )
    assert isinstance(reader, LocalTeacher), f"{reader.name} is neither here nor served"
    return LocalTeacher(
        reader.model,
        fmt,
        alone,
        name=reader.name,
        temperature=reader.temperature,
        chunk_tokens=reader.chunk_tokens,
        share_prompts=reader.share_prompts,
    )


def as_read(rollout: Rollout, read: CrossRead, fmt: PromptFormat) -> Rollout:
    """The answer in the ids of the scorer whose format is `fmt`, behind its own prompt; nobody sampled these."""
    return replace(
        rollout,
        prompt=replace(rollout.prompt, ids=fmt.prompt_ids(rollout.prompt.row), completion_ids=None),
        response_ids=read.ids,
        behaviour_logprobs=np.full(len(read.ids), np.nan, dtype=np.float32),
        mask=np.ones(len(read.ids), dtype=np.bool_),
        turns=(),
    )


def in_shares(values_U: NDArray[Any], spans: Spans) -> NDArray[np.float64]:
    """float64 [T]: the sum over the scorer's tokens of a span, in equal shares for the student's tokens of it. NaN
    outside of spans, and where one of its numbers is NaN."""
    inside_T, inside_U = spans.span_T >= 0, spans.span_U >= 0
    sums_S = np.bincount(spans.span_U[inside_U], weights=values_U[inside_U])
    counts_S = np.bincount(spans.span_T[inside_T], minlength=len(sums_S))
    shares_T = np.full(len(spans.span_T), np.nan)
    span = spans.span_T[inside_T]
    shares_T[inside_T] = sums_S[span] / counts_S[span]
    return shares_T


def coverage(rollouts_N: Iterable[Rollout], reads: Mapping[str, CrossRead]) -> Coverage:
    """Over the tokens that may be trained, see `journal.graded.Coverage`. 0 where there are none."""
    tokens = mapped = same = ours = theirs = count = 0
    for rollout in rollouts_N:
        spans, mask_T = reads[rollout.id].spans, rollout.mask
        tokens += int(mask_T.sum())
        mapped += int((mask_T & (spans.span_T >= 0)).sum())
        same += int((mask_T & spans.same_T).sum())
        ours += int((spans.span_T >= 0).sum())
        theirs += int((spans.span_U >= 0).sum())
        count += int(spans.span_T.max(initial=-1)) + 1
    return {
        "coverage": mapped / tokens if tokens else 0.0,
        "same": same / tokens if tokens else 0.0,
        "span_tokens": ours / count if count else None,
        "span_own_tokens": theirs / count if count else None,
    }
