"""The presets that only secondary sources were read for, and that one writer writes for; as `cases.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opd.objectives.oracle import divergences as d
from tests.oracle.presets import fields, sources
from tests.oracle.presets.cases import Case, answers, both, local, on_top, pairs_of, rewarded_in_pairs, times
from tests.oracle.presets.expectation import mean_over_answers
from tests.oracle.presets.tables import World, noisy, shares
from tests.oracle.presets.vetted import FRESH_ONLY, IN_GROUPS, NOT_OLD
from tests.oracle.presets.worlds import SHORT, SMALL_UNITS, TREE, UNITS, base, graded, only

WEIGHTS = {"teacher": 0.3, "weak": 0.7}
GATE = 1.1  # nats; log 4 = 1.39 is the most


def taught_and_graded(noise: float) -> World:
    made = graded(noise)
    return World(made.tree, made.student, made.writer, {"teacher": made.scorers["teacher"]}, rewards=made.rewards)


def sharpened(noise: float) -> World:
    made = base(noise)
    untrained = noisy(made.writer, 0.7, 10)
    return World(TREE, made.student, made.writer, {"teacher": untrained}, temperatures={"teacher": 0.7})


def proposed(noise: float) -> World:
    """The student proposes; a token outside the teacher's two likeliest is redrawn from the teacher.

    Half of the student's mass is redrawn: its own two entries have 1/4 each, the others 7/16 and 1/16.
    """
    teacher = shares(SHORT, UNITS, seed=1)
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, teacher.topk(2).indices, True)
    student = torch.full_like(teacher, 0.25)
    student[~inside] = torch.tensor([7 / 16, 1 / 16], dtype=torch.float64).repeat(int((~inside).sum()) // 2)
    writer = torch.where(inside, student, 0.0) + torch.where(inside, 0.0, student).sum(-1, keepdim=True) * teacher.exp()
    return World(SHORT, noisy(student.log(), noise, 9), writer.log(), {"teacher": teacher})


def inverse_length(world: World, prompt: int) -> Tensor:
    """[S]: E[1 / |y|] of the answers that pass through a state."""
    tree, writer = world.tree, world.writer[prompt]
    chance_N = tree.chances(writer)
    share_NT = (chance_N / tree.mask_NT.sum(-1))[:, None].expand_as(tree.state_NT)
    sum_S = torch.zeros(len(tree.states), dtype=torch.float64)
    sum_S.index_add_(0, tree.state_NT[tree.mask_NT], share_NT[tree.mask_NT])
    return sum_S / tree.visits(writer)


def plain(world: World) -> Tensor:
    assert world.rewards is not None
    value_N = world.rewards
    return fields.policy(world, lambda w, prompt: fields.of_answers(value_N, w.tree), ratio=False)


def gate_open(world: World, prompt: int) -> Tensor:
    logq_SV = world.tree.logprobs(fields.teacher(world, prompt))
    return (-(logq_SV.exp() * logq_SV).sum(-1) > GATE).double()


def gated(world: World) -> Tensor:
    """The gate leaves the mean's denominator as it is: it is over all tokens."""
    made = fields.weighted_local(world, on_top(d.forward_kl, 2, "teacher"), gate_open)
    opened = sum(float((world.tree.visits(world.writer[x]) * gate_open(world, x)).sum()) for x in world.asked)
    return made * opened / fields.tokens(world)


def one_sided(world: World) -> Tensor:
    """log(q / p) where it agrees with the verdict of the whole answer."""
    assert world.rewards is not None
    right_N1 = (world.rewards >= 0.5)[:, None]

    def credit(w: World, prompt: int) -> Tensor:
        gap_NT = fields.log_ratio(w, prompt, lambda v, x: v.tree.logprobs(fields.teacher(v, x)))
        return torch.where(right_N1, gap_NT.clamp(min=0), gap_NT.clamp(max=0))

    return fields.policy(world, credit, ratio=False)


def prefix_weighted(world: World) -> Tensor:
    def credit(w: World, prompt: int) -> Tensor:
        gap_NT = fields.log_ratio(w, prompt, lambda v, x: v.tree.logprobs(fields.teacher(v, x)))
        before_NT = gap_NT.abs().cumsum(-1) - gap_NT.abs()
        return gap_NT * (1.5 - 0.5 * before_NT / gap_NT.abs().sum(-1, keepdim=True))

    return fields.policy(world, credit, ratio=False)


def without_ties(noise: float) -> World:
    """Ranks of equal probabilities are anybody's, and so is the gradient."""
    return only("teacher")(noise + 0.1)


def ranked(logp_SV: Tensor, logq_SV: Tensor) -> Tensor:
    p_SV, q_SV = (log.exp().sort(-1, descending=True).values for log in (logp_SV, logq_SV))
    return (p_SV - q_SV).abs().sum(-1)


def written_likelihoods(tau: float) -> Callable[[World], Tensor]:
    """Two classes for every token that may be written: its root, and what is left of 1."""

    def field(world: World) -> Tensor:
        made = torch.zeros_like(world.student)
        for prompt in world.asked:
            table = world.student[prompt].clone().requires_grad_()
            p_SV = (world.tree.logprobs(table) / tau).exp()
            q_SV = (world.tree.logprobs(fields.teacher(world, prompt)) / tau).exp()
            value_SV = torch.xlogy(q_SV, q_SV / p_SV) + torch.xlogy(1 - q_SV, (1 - q_SV) / (1 - p_SV))
            written_S = (world.tree.logprobs(world.writer[prompt]).exp() * value_SV).sum(-1)
            loss = (world.tree.visits(world.writer[prompt]) * written_S).sum()
            made[prompt] = torch.autograd.grad(loss, table)[0]
        return made / fields.tokens(world)

    return field


EXPERIMENTAL: dict[str, Case] = {
    "gkd, on policy": Case(
        "gkd",
        only("teacher"),
        lambda world: fields.weighted_local(world, d.jensen_shannon(0.5), inverse_length),
        answers(sources.jsd(0.5), by_answer=True),
        {"on_policy": 1.0},
    ),
    "gkd_rl": Case(
        "gkd_rl",
        taught_and_graded,
        both(times(0.6, plain), times(0.4, lambda w: fields.weighted_local(w, d.reverse_kl, inverse_length))),
        both(
            times(0.6, answers(sources.plain_reward)),
            times(0.4, answers(sources.reverse_kl, by_answer=True)),
        ),
        {"alpha": 0.4},
        units=sum(SMALL_UNITS),
    ),
    "deepseek_v4": Case(
        "deepseek_v4",
        only("teacher", "weak"),
        local(d.reverse_kl, fields.product(WEIGHTS)),
        answers(sources.weighted_reverse_kl(WEIGHTS)),
        {"weights": WEIGHTS},
    ),
    "ta_opd": Case(
        "ta_opd",
        only("teacher"),
        local(on_top(d.reverse_kl, 2, "teacher")),
        answers(sources.two_classes_more(sources.reverse_kl, 2, "teacher")),
        {"k": 2},
    ),
    "eopd": Case(
        "eopd",
        only("teacher"),
        both(local(d.reverse_kl), gated),
        both(answers(sources.reverse_kl_clipped(0.2)), answers(sources.gated_forward_kl(GATE, 2))),
        {"above": GATE, "k": 2},
        exact=NOT_OLD,
    ),
    "opdvr": Case("opdvr", taught_and_graded, one_sided, answers(sources.verifier(0.5)), units=sum(SMALL_UNITS)),
    "kdrl": Case(
        "kdrl",
        taught_and_graded,
        both(rewarded_in_pairs, times(0.6, local(d.reverse_kl))),
        both(pairs_of(sources.grpo(0.2)), times(0.6, answers(sources.reverse_kl_clipped(0.2)))),
        {"beta": {"start": 0.6, "end": 0.1, "steps": 10}},
        exact=NOT_OLD,
        **IN_GROUPS,
    ),
    "iw_opd": Case("iw_opd", only("teacher"), prefix_weighted, answers(sources.prefix_weighted(0.5))),
    "prefix_opd": Case(
        "prefix_opd", only("teacher"), local(d.reverse_kl), answers(sources.reverse_kl_drawn), exact=FRESH_ONLY
    ),
    "binary_opd": Case(
        "binary_opd",
        only("teacher"),
        times(2.0, local(d.total_variation)),
        answers(sources.binary),
        exact=FRESH_ONLY,
    ),
    "skd": Case(
        "skd",
        proposed,
        local(d.reverse_kl),
        answers(sources.reverse_kl),
        {"top_k": 2},
        behaviour="speculative",
        units=16,
    ),
    # Of a teacher with the student's tokenizer: every token is a span, and all vocabulary is shared.
    "shared_top_k": Case(
        "shared_top_k",
        only("teacher"),
        local(on_top(d.reverse_kl, 2, "student")),
        answers(sources.two_classes_more(sources.reverse_kl, 2, "student")),
        {"k": 2},
    ),
    "uld": Case("uld", without_ties, local(ranked), answers(sources.by_rank)),
    "alm": Case(
        "alm", only("teacher"), written_likelihoods(2.0), answers(sources.likelihood_matching(2.0)), {"tau": 2.0}
    ),
    "no_teacher": Case(
        "no_teacher",
        sharpened,
        lambda world: fields.local(world, d.reverse_kl, lambda w, x: fields.teacher(w, x) / 0.7),
        lambda world: mean_over_answers(world, sources.sharper(0.7)),
    ),
}
