"""The nouns on the wire. All are frozen; arrays are numpy; token ids are never turned back into text and re-read.

Axis suffixes, used for names everywhere in opd:

    P  prompts            N  rollouts            T  tokens
    K  top-k entries      V  vocabulary          D  hidden width

A name with several suffixes is a tensor with these axes in this order: `logits_TV`, `hidden_TD`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
Behaviour = Literal["student", "dataset", "teacher", "teacher_mixed", "speculative", "cached"]
Resolution = Literal["sampled", "entries", "full"]
Joined = Literal["strict", "span", "gold", "alm"]  # how a scorer's tokens become the student's: config/alignments.py


@dataclass(frozen=True)
class Want:
    """What is asked of one scorer in a step: how much it says at a token, and on which rollouts (by id).

    resolution     sampled: the drawn token; entries: that and some other entries; full: the whole vocabulary. A scorer
                   in this process gives the whole vocabulary for entries, too.
    top_k          of entries: so many of the scorer's own most likely tokens.
    student_top_k  of entries: so many of the student's, named in `Batch.student_top_TK`.
    joined         what a scorer with another tokenizer has rows for, see `ScorerRows`; of no matter to others.
    """

    resolution: Resolution
    rollouts: frozenset[str]
    top_k: int = 0
    student_top_k: int = 0
    joined: Joined = "strict"


@dataclass(frozen=True, kw_only=True)
class Spans:
    """How the tokens of one answer fit to those that a scorer with another tokenizer reads for it: T of the student's,
    U of the scorer's. A span is the least run of both that is the same text; spans are numbered from 0 in its order.

    span_T  int64 [T]: the span of each of the student's tokens, -1 where the scorer read nothing, or something else.
    span_U  int64 [U]: the same of the scorer's tokens. Every span has tokens of both.
    same_T  bool [T]: the span is one token of either side, and these are the same entry of both vocabularies.
    """

    span_T: NDArray[np.int64]
    span_U: NDArray[np.int64]
    same_T: NDArray[np.bool_]


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of data, before any tokenizer has seen it.

    id          `<source name>/<index in the source>`; the same row has the same id in every run. A row that comes twice
                in one batch has `#2`, `#3` ... added.
    domain      what the row is about: the source's name unless the source says otherwise. Routing and reports use it.
    prompt      a plain string or a chat without its final assistant turn. The empty string for raw text.
    completion  the answer that came with the row, None for a prompt alone.
    columns     every other column of the row; graders and privileged contexts read them.
    """

    id: str
    domain: str
    prompt: str | tuple[Message, ...]
    completion: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row rendered once, in the student's own format.

    ids             int64 [T]; what the student reads before it writes. Holds exactly one BOS where the model has one.
    completion_ids  int64 [T] or None; the row's own answer with its end token, for terms on data tokens.
    """

    row: Row
    ids: NDArray[np.int64]
    completion_ids: NDArray[np.int64] | None = None

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def domain(self) -> str:
        return self.row.domain


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn: softmax(logits / temperature), cut to top_k, then to top_p, renormalised.

    temperature   0 means the arg max (the recorded log-probability is then 0).
    top_k         0 means no cut.
    stop_ids      tokens that end an answer; the drawn one is kept as the answer's last token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    samples_per_prompt: int = 1


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer, token by token.

    id                  unique in a run; everything about a rollout is joined by it, never by position.
    response_ids        int64 [T]; with its end token when it has one.
    behaviour_logprobs  float32 [T]; under the distribution that was sampled from (temperature and cuts applied);
                        NaN where nobody sampled (dataset answers).
    mask                bool [T]; True where the writer chose the token: the only tokens that may be trained.
    policy_version      which weights wrote it: the number of updates the student had seen.
    turns               (start, end) of each span the student wrote, in response positions.
    reward              of the whole answer, in [0, 1]; None where nothing grades it, or the grader could not decide.
    """

    id: str
    prompt: Prompt
    response_ids: NDArray[np.int64]
    behaviour_logprobs: NDArray[np.float32]
    mask: NDArray[np.bool_]
    policy_version: int
    behaviour: Behaviour
    finish_reason: FinishReason
    sampling: SamplingParams | None = None
    turns: tuple[tuple[int, int], ...] = ()
    reward: float | None = None

    @property
    def domain(self) -> str:
        return self.prompt.row.domain


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one scorer says about one rollout, as it is stored or sent: information, never a finished advantage.

    logprobs     float32 [T]; log-probability of each response token under the scorer.
    valid        bool [T]; False where the scorer gave nothing finite. Such a token is masked, never counted as 0.0.
    fingerprint  weights, tokenizer, template and temperature that produced it.
    """

    rollout_id: str
    scorer: str
    logprobs: NDArray[np.float32]
    valid: NDArray[np.bool_]
    fingerprint: str


@dataclass(frozen=True)
class Head:
    """The last linear layer of a model, as numbers: logits = softcap(scale * (hidden @ weight.T + bias)).

    weight_VD  [V, D]; only the first `vocab_size` rows are real tokens, the rest is padding and never read.
    order_V    None, or int64: row order_V[v] scores token v. [vocab_size] where two end tokens are exchanged between
               formats; of a scorer with another tokenizer as long as the student's vocabulary, -1 for what it lacks.
    """

    weight_VD: torch.Tensor
    vocab_size: int
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    order_V: torch.Tensor | None = None


@dataclass(frozen=True)
class ScorerRows:
    """A scorer's evidence for the response tokens of one micro-batch, flattened in the batch's own order.

    index_T       int64 [R], ascending: the batch's tokens that these rows are about; None: all of them. Every other
                  field has as many rows.
    known_index_T the same on the host. None: who needs it reads `index_T`, and waits for its device.
    valid_T       bool [T].
    logprobs_T    float32 [T] at the sampled tokens; present when the resolution is "sampled".
    hidden_TD     [T, D] and `head`; present when the resolution is "full".
    entry_ids_TK  int64 [T, K], -1 where a row has fewer, and `entries_TK`, float32 [T, K], their log-probabilities:
                  present, beside `logprobs_T`, when the resolution is "entries" and no more is known. In the student's
                  numbering; no token twice in a row. -1 with a log-probability: a likely one of a scorer with another
                  tokenizer, that the student lacks.
    temperature   what the logits are divided by before the softmax.

    A scorer with another tokenizer has rows for fewer tokens, `Want.joined` says which, and three fields more:

    strict        the tokens where `Spans.same_T` holds.
    span, alm     all tokens of spans. `logprobs_T` at each is that of the span over the number of the student's tokens
                  in it: sums over a span are exact.
    gold          the last token of each span, with the states that predict the scorer's last token of it.

    shared_V      bool, as long as the student's vocabulary: the tokens that both have. None: all, one tokenizer.
    own_token_T   int64 [R]: the scorer's token at the row; present when the resolution is "full".
    before_T      float32 [R]: log-probability of the scorer's tokens of the span before that one; with gold.
    """

    name: str
    valid_T: torch.Tensor
    temperature: float
    logprobs_T: torch.Tensor | None = None
    hidden_TD: torch.Tensor | None = None
    head: Head | None = None
    entry_ids_TK: torch.Tensor | None = None
    entries_TK: torch.Tensor | None = None
    index_T: torch.Tensor | None = None
    known_index_T: NDArray[np.int64] | None = None
    shared_V: torch.Tensor | None = None
    own_token_T: torch.Tensor | None = None
    before_T: torch.Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch: its rollouts, and the response tokens of all of them flattened to [T].

    row_T        int64 [T]: which rollout of the micro-batch each response token belongs to.
    token_T      int64 [T]: the response token itself.
    behaviour_T  float32 [T]: log-probability under the sampler, NaN where there is none.
    mask_T       bool [T]: tokens that may be trained.
    student_top_TK  int64 [T, K]: the student's most likely tokens, where a scorer is asked about them; else None.
    """

    rollouts: tuple[Rollout, ...]
    row_T: torch.Tensor
    token_T: torch.Tensor
    behaviour_T: torch.Tensor
    mask_T: torch.Tensor
    student_top_TK: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What an update saw at the tokens of one rollout, float32 [T]; NaN where there is nothing to say (masked tokens
    included).

    student_logprobs   of the drawn token, before the update.
    teacher_logprobs   of the drawn token; all NaN without a teacher.
    reverse_kl         KL(student || teacher) over the vocabulary, or log p - log q of the drawn token.
    """

    student_logprobs: NDArray[np.float32]
    teacher_logprobs: NDArray[np.float32]
    reverse_kl: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one update did.

    applied   False when the step was skipped because its loss or gradient was not finite.
    metrics   plain numbers, e.g. `loss`, `reverse_kl`, `grad_norm`, `trained_tokens`.
    scores    rollout id to what was seen at its tokens (in the last of several updates on the same rollouts).
    """

    step: int
    applied: bool
    metrics: Mapping[str, float]
    scores: Mapping[str, TokenScores] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The verdict on one answer: score in [0, 1], or None where the grader could not decide (then it is left out)."""

    score: float | None
    reason: str = ""
