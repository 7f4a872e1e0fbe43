"""A closer look at a step, every so many of them: is the signal there, where does it sit, and how noisy is it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from torch import Tensor, nn

from opd.config.objective import DivergenceTerm
from opd.learner.evidence import read_and_valid
from opd.objectives.kernels.rows import TokenValues
from opd.objectives.plan import PlannedTerm
from opd.types import Batch, ScorerRows

QUANTILES = {"p50": 0.5, "p95": 0.95, "p999": 0.999}
TENTHS = 10  # parts of an answer
PART = 2**22  # numbers of a gradient that are added up at a time
FEWEST_SAMPLES = 4  # micro-batches, below which the spread of their gradients says nothing
FACTS = ("forward_kl", "entropy", "overlap", "overlap_mass")


class Diagnostics:
    """Filled micro-batch by micro-batch with what the loss has seen anyway; `metrics` reads it.

        scorer/NAME/forward_kl                KL(scorer || student), over the vocabulary
        scorer/NAME/entropy, entropy_gap      of the scorer, and the student's minus it, in nats
        scorer/NAME/overlap, overlap_mass     share of the two top 16 in common, and the student's mass there
        term/NAME/log_ratio_p50, p95, p999, max  of |log q~ - log p| of the tokens that the term trains
        reverse_kl/tenth/1 ... 10             mean by place in the answer: 1 is its first tenth
        same_sign/A-B                         share of tokens that two terms, or two scorers, push the same way
        gradient_snr                          see `GradientNoise`

    Means are over trained tokens for which there is something to say.
    """

    def __init__(self) -> None:
        self.noise = GradientNoise()
        self._sums: dict[str, list[Tensor]] = {}
        self._gaps: dict[str, list[Tensor]] = {}

    def add(
        self,
        values: TokenValues,
        batch: Batch,
        planned: Sequence[PlannedTerm],
        trained: Mapping[str, Tensor],
        scorers: Sequence[ScorerRows],
        kl_T: Tensor,
    ) -> None:
        """One micro-batch. `trained`: term name to bool [T]; `kl_T`: [T], NaN where there is none."""
        any_T = torch.stack(list(trained.values())).any(0)
        pulls: dict[str, tuple[Tensor, Tensor]] = {}
        for p in planned:
            seen, trained_T = values.terms[p.term.name], trained[p.term.name]
            if isinstance(p.term, DivergenceTerm) and seen.target_T is not None:
                gap_T = (seen.target_T - values.logprob_T).abs()[trained_T]
                self._gaps.setdefault(p.term.name, []).append(gap_T[~gap_T.isnan()])
                if seen.h_T is not None:
                    pulls[p.term.name] = (seen.h_T, trained_T)
        self._same_sign(pulls)
        pulls = {}
        for scorer in scorers:
            seen = values.scorers[scorer.name]
            read_T, valid_T = read_and_valid(batch, scorer)
            here_T = any_T & read_T & valid_T
            for fact in FACTS:
                if (fact_T := getattr(seen, f"{fact}_T")) is not None:
                    self._mean(f"scorer/{scorer.name}/{fact}", fact_T, here_T)
            if seen.entropy_T is not None:
                self._mean(f"scorer/{scorer.name}/entropy_gap", values.entropy_T - seen.entropy_T, here_T)
            if seen.logprob_T is not None:
                pulls[scorer.name] = (seen.logprob_T - values.logprob_T, here_T)
        self._same_sign(pulls)
        tenth_T = _tenth(batch)
        for tenth in range(TENTHS):
            self._mean(f"reverse_kl/tenth/{tenth + 1}", kl_T, any_T & (tenth_T == tenth))

    def metrics(self) -> dict[str, float]:
        """Plain numbers; a key that has nothing to say is left out."""
        numbers: dict[str, float] = {}
        for name, pairs in self._sums.items():
            total, count = torch.stack(pairs).sum(0).tolist()
            if count:
                numbers[name] = total / count
        for name, parts in self._gaps.items():
            gap_T = torch.cat(parts).double().sort().values
            if len(gap_T):
                for key, q in QUANTILES.items():
                    numbers[f"term/{name}/log_ratio_{key}"] = float(gap_T[round(q * (len(gap_T) - 1))])
                numbers[f"term/{name}/log_ratio_max"] = float(gap_T[-1])
        ratio = self.noise.ratio()
        return numbers if ratio is None else numbers | {"gradient_snr": ratio}

    def _same_sign(self, pulls: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for (a, (pull_a_T, at_a_T)), (b, (pull_b_T, at_b_T)) in combinations(
            sorted(pulls.items(), key=lambda item: item[0]), 2
        ):
            product_T = pull_a_T.sign() * pull_b_T.sign()
            self._mean(f"same_sign/{a}-{b}", (product_T > 0).to(pull_a_T.dtype), at_a_T & at_b_T & (product_T != 0))

    def _mean(self, name: str, value_T: Tensor, of_T: Tensor) -> None:
        of_T = of_T & ~value_T.isnan()
        pair = torch.stack([torch.where(of_T, value_T, 0.0).double().sum(), of_T.sum().double()])
        self._sums.setdefault(name, []).append(pair)


class GradientNoise:
    """Signal to noise of the step's gradient, from the norms of its micro-batches' own gradients.

    With n micro-batches of gradients g_i taken as samples of one distribution, its variance is estimated by
    s2 = n / (n - 1) (mean |g_i|^2 - |mean g|^2) and its squared mean by m2 = |mean g|^2 - s2 / n; the figure is
    m2 / (s2 / n), 0 where the estimate of m2 is negative. Micro-batches hold answers of similar length and unequal
    numbers of tokens, so it is a rough figure: for comparing steps of one run.
    """

    def __init__(self) -> None:
        self._squares: list[Tensor] = []
        self._total: Tensor | None = None
        self._enough = True

    def expect(self, micro_batches: int) -> None:
        """How many there will be: with fewer than four nothing is looked at."""
        self._enough = micro_batches >= FEWEST_SAMPLES

    @contextmanager
    def watch(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Around one backward pass: notes the squared norm of what it adds, in no memory of its own."""
        if not self._enough:
            yield
            return
        parts: list[Tensor] = []
        hooks = [p.register_hook(lambda g: parts.append(_square(g))) for p in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if parts:
            self._squares.append(torch.stack([part.to(parts[0].device) for part in parts]).sum())

    def end(self, parameters: Sequence[nn.Parameter]) -> None:
        """After the last backward pass: the gradients are whole."""
        if not self._enough:
            return
        parts = [_square(p.grad) for p in parameters if p.grad is not None]
        if parts:
            self._total = torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def ratio(self) -> float | None:
        """The estimate; None with fewer than four micro-batches, or without any spread."""
        n = len(self._squares)
        if n < FEWEST_SAMPLES or self._total is None:
            return None
        mean_square, square_mean = float(torch.stack(self._squares).mean()), float(self._total) / n**2
        variance = n / (n - 1) * (mean_square - square_mean)
        if not variance > 0:
            return None
        return max(square_mean - variance / n, 0.0) / (variance / n)


def _square(gradient: Tensor) -> Tensor:
    """Its squared norm, added up in float64; in parts, because torch makes a copy in that type."""
    parts = gradient.detach().reshape(-1).split(PART)
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]).square_().sum()


def _tenth(batch: Batch) -> Tensor:
    """int64 [T]: in which tenth of its answer a token stands, counted from 0."""
    lengths = [len(r.response_ids) for r in batch.rollouts]
    parts = [torch.arange(n) * TENTHS // n for n in lengths if n]
    return torch.cat(parts).to(batch.token_T.device)
