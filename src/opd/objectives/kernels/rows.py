"""What goes into the pass over a micro-batch's response tokens, and what comes out besides the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opd.config.alignments import Gold
from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm, Term


@dataclass(frozen=True)
class TokenRows:
    """The response tokens of one micro-batch, flattened to [T].

    token_T      int64; the tokens that were drawn.
    behaviour_T  float32; their log-probability under the sampler, NaN where there is none.
    proximal_T   float32; the student's log-probability at the first of `updates_per_batch` updates; None: this is it.
    student_top_TK  int64 [T, K]; the student's most likely tokens, first the likeliest, where scorers were told of
                 them: supports of up to K of them are made of these. None: they are found here.
    """

    token_T: Tensor
    behaviour_T: Tensor
    proximal_T: Tensor | None = None
    student_top_TK: Tensor | None = None


@dataclass(frozen=True)
class KnownRows:
    """What the host knows of a term's rows, so that their device need not be asked.

    trained_T  bool [T]: where the term's weight is not 0. None: only the device knows.
    mix        scorer to c_k [T].
    """

    trained_T: NDArray[np.bool_] | None
    mix: Mapping[str, NDArray[np.floating]]


def merges(term: Term) -> bool:
    """Whether a term compares merged distributions of spans, at their last tokens alone."""
    return isinstance(term, DivergenceTerm) and isinstance(term.alignment, Gold)


@dataclass(frozen=True)
class SpanRows:
    """Which tokens a term takes as one, on the host: [T], spans numbered upwards from 0 in the order of tokens.

    span_T  int64; -1 where the term trains nothing. A span is trained whole, and lies in one answer.
    last_T  bool; the last token of a span.
    """

    span_T: NDArray[np.int64]
    last_T: NDArray[np.bool_]


@dataclass(frozen=True)
class TermRows:
    """One term of the objective on these tokens.

    weight_T  float32 [T]: coefficient x share in the mean x every weight known beforehand. 0 leaves the token out,
              whatever its values are (NaN too).
    mix       scorer to float32 [T]: c_k of log q~ = sum_k c_k log m_k; 0 where the scorer is not read. "student" is the
              student as it is now, held fixed. Empty for outcome and data terms.
    unit      at every token one c_k is 1 and the others are 0: log q~ needs no normalising.
    extra_T   float32 [T]: added to h(r) of the drawn token (credit from the future), or the advantage itself (outcome
              terms). With `credit.now` false the immediate h(r) is left out, and this is all.
              With merged distributions (alignment gold): the pull on a span's tokens before its last.
    right_T   bool [T]: verdict on the answer, for shapes that depend on it.
    known     the same weights and mix on the host. None: the pass reads them from their device, and waits for it.

    spans     what a term takes as one. With alignment gold its scorers are read at the last tokens of spans alone.
    value_T   float [T]: what `TermValues.value_T` is to say, and the loss to count, where the surrogate's own value
              says nothing to a reader (spans). None: that.

    An importance ratio at sequence level belongs into `weight_T`: only the token level is made in the pass.
    """

    term: DivergenceTerm | OutcomeTerm | DataTerm
    weight_T: Tensor
    mix: Mapping[str, Tensor]
    unit: bool
    extra_T: Tensor | None = None
    right_T: Tensor | None = None
    known: KnownRows | None = None
    spans: SpanRows | None = None
    value_T: Tensor | None = None

    def settled(self) -> TermRows:
        """These rows with everything known to the host; what was not known is read from the device."""
        known = self.known
        if known is not None and known.trained_T is not None:
            return self
        mix = {n: _on_host(c_T) for n, c_T in self.mix.items()} if known is None else known.mix
        return replace(self, known=KnownRows(_on_host(self.weight_T) != 0, mix))

    @property
    def trained_T(self) -> NDArray[np.bool_]:
        """bool [T] on the host, of settled rows: where the weight is not 0."""
        assert self.known is not None and self.known.trained_T is not None, "rows are settled first"
        return self.known.trained_T

    @property
    def known_mix(self) -> Mapping[str, NDArray[np.floating]]:
        """The mix on the host, of settled rows."""
        assert self.known is not None, "rows are settled first"
        return self.known.mix


def _on_host(values_T: Tensor) -> NDArray[np.float64]:
    return values_T.detach().double().cpu().numpy()


@dataclass(frozen=True)
class TermValues:
    """What one term was at each token: [T], detached; NaN at tokens that the term leaves out. None: it has no such.

    value_T         unweighted: the divergence in nats (full, top-k), or the surrogate -rho s (drawn tokens).
    h_T, f_T        h(r) and f(r) of the drawn token, with the log-ratio as `advantage_under` says; divergence terms.
    target_T        log q~ of the drawn token. A mixture is normalised where the term itself needs the whole vocabulary
                    (`terms.normalises`); the log-linear reward of a drawn token is not.
    ratio_T         importance weight that was used; 1 where there is none.
    student_mass_T  of the support, top-k only; likewise target_mass_T.
    unresolved_T    bool; both tails lie below the floor, so that the tail got no field. False where left out.
    pull_T          with merged distributions, at the last token of a span: the pull on those before it.

    With merged distributions the value is that of the span and stands at its last token, 0 at others; `target_T` is an
    equal share of the span's log-probability at each of its tokens.
    """

    value_T: Tensor
    ratio_T: Tensor
    h_T: Tensor | None = None
    f_T: Tensor | None = None
    target_T: Tensor | None = None
    student_mass_T: Tensor | None = None
    target_mass_T: Tensor | None = None
    unresolved_T: Tensor | None = None
    pull_T: Tensor | None = None


@dataclass(frozen=True)
class ScorerValues:
    """What one scorer said at each token: [T], detached; NaN at tokens that it has no rows for.

    logprob_T       of the drawn token. With merged distributions of a scorer with another tokenizer as `target_T`.
    reverse_kl_T    KL(student || scorer) in nats; None where only drawn tokens are scored, or merged distributions are
                    compared. Of a scorer with another tokenizer: with all that is not shared as one class, as is
                    forward_kl_T.

    With diagnostics, and where the whole vocabulary is there:

    forward_kl_T    KL(scorer || student).
    entropy_T       of the scorer.
    overlap_T       share of the student's and the scorer's most likely tokens that they have in common.
    overlap_mass_T  the student's probability of those in common.
    """

    logprob_T: Tensor
    reverse_kl_T: Tensor | None = None
    forward_kl_T: Tensor | None = None
    entropy_T: Tensor | None = None
    overlap_T: Tensor | None = None
    overlap_mass_T: Tensor | None = None


@dataclass(frozen=True)
class TokenValues:
    """Per-token facts of the pass, float32 (float64 for float64 models) [T], all detached.

    terms      term name to what it was.
    scorers    scorer name to what it said.
    logprob_T  the student's log-probability of the drawn token.
    entropy_T  of the student's distribution, in nats.
    """

    terms: dict[str, TermValues]
    scorers: dict[str, ScorerValues]
    logprob_T: Tensor
    entropy_T: Tensor
