"""Terms on a scorer with another tokenizer, through plan and pass, against their definitions in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.objectives.kernels.rows import TokenRows, TokenValues
from opd.objectives.kernels.tiled import tiled_look, tiled_loss
from opd.objectives.objective import Objective
from opd.types import Head, ScorerRows
from tests import rooms
from tests.objectives import naive
from tests.objectives.two_alphabets import CUTS, ORDER_V, TEACHER, WORDS, U, V, World

SHAPES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"kind": "reverse_kl"},
    "forward_kl": {"kind": "forward_kl"},
    "jsd": {"kind": "jsd", "beta": 0.3},
    "tv": {"kind": "total_variation"},
    "skew": {"kind": "skew_forward_kl", "alpha": 0.2},
}
SOME = [(WORDS[n], WORDS[(5 * n + 3) % len(WORDS)]) for n in range(0, len(WORDS), 2)] + [((5,), (5,))]


def term(way: dict | str, **fields: Any) -> dict[str, Any]:
    kind = way if isinstance(way, str) else way["kind"]
    return {"name": "t", "alignment": way, "support": "full" if kind in ("gold", "strict") else "sampled", **fields}


def run(
    world: World,
    spec: dict[str, Any],
    scorer: ScorerRows,
    *,
    chance_T: Tensor | None = None,
    chunk: int = 7,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor, TokenValues]:
    """Loss, gradients of states and head, and facts, as a sum over tokens instead of their mean."""
    hidden_TD, weight_VD = world.hidden_TD.clone().requires_grad_(), world.weight_VD.clone().requires_grad_()
    plan = Objective(rooms.objective(spec)).plan(0, world.answers, how.pop("invalid", {}), spans=world.spans)
    trained = sum(int(mask.sum()) for mask in plan.terms[0].kept.values())
    logp_TV = (world.hidden_TD @ world.weight_VD.T).log_softmax(-1)
    drawn_T = logp_TV.gather(1, world.batch.token_T[:, None])[:, 0]
    tokens = TokenRows(world.batch.token_T, how.pop("behaviour_T", drawn_T))
    head, settings = Head(weight_VD, V), {"student_temperature": 1.0, "chunk_tokens": chunk}
    rows, look = plan.rows(world.batch, dtype=torch.float64), None
    if plan.terms[0].span is not None:
        look = tiled_look(hidden_TD.detach(), Head(world.weight_VD, V), tokens, rows, [scorer], **settings)
        batch = replace(world.batch, behaviour_T=tokens.behaviour_T)
        rows = plan.rows(batch, look, dtype=torch.float64)
    scale_T = torch.ones(len(drawn_T)) if chance_T is None else chance_T
    rows = [replace(row, weight_T=row.weight_T * scale_T * trained) for row in rows]
    loss, values = tiled_loss(hidden_TD, head, tokens, rows, [scorer], **settings)
    loss.backward()
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    return loss.detach(), hidden_TD.grad, weight_VD.grad, values


def mass(name: str, p: Tensor, q: Tensor) -> Tensor:
    """p f(q / p) between masses that need not sum to 1: slope 0 at p = q, as f(r) + tilt (r - 1) has."""
    spec = DivergenceTerm(name="t", shape=SHAPES[name]).shape  # pyright: ignore[reportArgumentType]
    tilt = {"reverse_kl": 1.0, "forward_kl": -1.0, "skew": -0.8}.get(name, 0.0)
    return naive.mass(spec, None, p, q) + tilt * (q - p)


def spans(world: World, weight_VD: Tensor, hidden_TD: Tensor | None = None) -> list[dict[str, Any]]:
    """Every mapped span: log-probabilities of its tokens, all of them differentiable, and what the teacher said."""
    hidden_TD = world.hidden_TD if hidden_TD is None else hidden_TD
    logp_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
    found = []
    for said in world.said():
        for _, places, read, before in said:
            logq = [world.logq((*before, *read[:n])) for n in range(len(read))]
            found.append({
                "places": places,
                "logp": torch.stack([logp_TV[t, world.batch.token_T[t]] for t in places]),
                "logq": torch.stack([q[TEACHER.index(piece)] for q, piece in zip(logq, read, strict=True)]),
                "p_V": logp_TV[places[-1]].exp(),
                "q_U": logq[-1].exp(),
                "drawn": (int(world.batch.token_T[places[-1]]), TEACHER.index(read[-1])),
            })  # fmt: skip
    return found


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


# ---- span: the chain rule's sums -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def enumerated() -> World:
    return World(seed=3, table=True)


def exact(world: World, shape: str, kind: str = "span") -> Tensor:
    """The gradient of sum over spans of D(p(span) || q(span)), what was written before a span held fixed."""
    table = world.weight_VD.clone().requires_grad_()
    logp_TV = (world.hidden_TD @ table.T).log_softmax(-1)
    drawn_T = logp_TV.gather(1, world.batch.token_T[:, None])[:, 0]
    total, seen, start = torch.zeros(()).double(), set(), 0
    for pair, said in zip(world.words, world.said(), strict=True):
        first = drawn_T[start : start + len(pair[0])].sum()
        second = drawn_T[start + len(pair[0]) : start + len(pair[0]) + len(pair[1])].sum()
        for _, places, read, before in said:
            at_first = places[0] == start
            if (key := pair[:1] if at_first else pair) in seen:
                continue  # the first word of many answers is one event
            seen.add(key)
            logq = sum(world.logq((*before, *read[:n]))[TEACHER.index(piece)] for n, piece in enumerate(read))
            p, reached = (first, torch.ones(())) if at_first else (second, first.detach().exp())
            total = total + reached * mass(shape, p.exp(), torch.as_tensor(logq).exp())
        start += len(pair[0]) + len(pair[1])
    total.backward()
    assert table.grad is not None
    return table.grad


def chances(world: World) -> Tensor:
    """[T]: the probability of the answer that each token is in."""
    logp_TV = (world.hidden_TD @ world.weight_VD.T).log_softmax(-1)
    drawn_T = logp_TV.gather(1, world.batch.token_T[:, None])[:, 0]
    sums_N = torch.zeros(len(world.words), dtype=torch.float64).index_add_(0, world.batch.row_T, drawn_T)
    return sums_N.exp()[world.batch.row_T]


def test_the_world_is_complete_and_has_spans_of_one_to_three_tokens_on_either_side(enumerated: World) -> None:
    chance_T = chances(enumerated)
    first_T = np.unique(enumerated.batch.row_T.numpy(), return_index=True)[1]
    assert float(chance_T[torch.from_numpy(first_T)].sum()) == pytest.approx(1.0, abs=1e-12)
    sizes = {(len(word), len(cut)) for word, cut in CUTS.items() if cut}
    assert {n for n, _ in sizes} == {m for _, m in sizes} == {1, 2, 3} and {(3, 3), (1, 3), (2, 1), (3, 1)} <= sizes


@pytest.mark.parametrize("shape", SHAPES)
def test_A_8_the_expected_gradient_of_spans_is_the_enumerated_one(enumerated: World, shape: str) -> None:
    chance_T, wanted = chances(enumerated), exact(enumerated, shape)
    _, _, got, _ = run(
        enumerated, term("span", shape=SHAPES[shape]), enumerated.rows("span"), chance_T=chance_T, chunk=500
    )
    close(got, wanted)
    assert wanted.norm() > 0.05


def test_A_8_the_base_of_the_advantage_and_weights_of_single_tokens_enter_as_they_are_named() -> None:
    world = World(1, words=SOME)
    behaviour_T = -torch.rand(len(world.batch.token_T), generator=world.generator, dtype=torch.float64) - 0.5
    how = {"importance": {"kind": "tis", "cap": 1.5}, "advantage_under": "sampler"}
    _, got, _, _ = run(world, term("span", **how), world.rows("span"), behaviour_T=behaviour_T)
    hidden_TD = world.hidden_TD.clone().requires_grad_()
    total = torch.zeros(()).double()
    for span in spans(world, world.weight_VD, hidden_TD):
        then = behaviour_T[span["places"]]
        advantage = span["logq"].sum() - then.sum()
        total = total - ((span["logp"] - then).exp().clamp(max=1.5).detach() * advantage * span["logp"]).sum()
    total.backward()
    assert hidden_TD.grad is not None
    close(got, hidden_TD.grad)


# ---- alm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_alm_is_the_divergence_of_two_chances(shape: str, tau: float) -> None:
    world = World(4, words=SOME)
    hidden_TD, weight_VD = world.hidden_TD.clone().requires_grad_(), world.weight_VD.clone().requires_grad_()
    total = torch.zeros(()).double()
    for span in spans(world, weight_VD, hidden_TD):
        a, b = ((x.sum() / tau).exp() for x in (span["logp"], span["logq"]))
        total = total + mass(shape, torch.stack([a, 1 - a]), torch.stack([b, 1 - b])).sum()
    total.backward()
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    way = {"kind": "alm", "tau": tau}
    loss, dhidden, dweight, _ = run(world, term(way, shape=SHAPES[shape]), world.rows("alm"))
    close(loss, total.detach())
    close(dhidden, hidden_TD.grad)
    close(dweight, weight_VD.grad)


def test_alm_of_tokens_that_are_certain_stays_finite() -> None:
    world = World(4, words=SOME)
    world.hidden_TD = torch.zeros_like(world.hidden_TD)
    world.hidden_TD[:, 0] = 1e3
    world.weight_VD[:, 0] = 0.0
    world.weight_VD[0, 0] = 1.0
    for shape in SHAPES.values():
        loss, dhidden, _, _ = run(world, term("alm", shape=shape), world.rows("alm"))
        assert loss.isfinite() and dhidden.isfinite().all()


# ---- gold -----------------------------------------------------------------------------------------------------------


def gold_loss(
    world: World, hidden_TD: Tensor, weight_VD: Tensor, shape: str, way: dict[str, Any], late: int = 0
) -> Tensor:
    """Its definition; `late`: each scalar read so many tokens after the one that it predicts."""
    shared = ORDER_V >= 0
    rest_U = [u for u in range(U) if u not in set(ORDER_V.tolist())]
    share = way.get("matched_weight", int(shared.sum()) / U)
    logp_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
    total = torch.zeros(()).double()
    for span in spans(world, weight_VD, hidden_TD):
        earlier = [logp_TV[t + late, world.batch.token_T[t]] for t in span["places"][:-1]]
        P_V = span["p_V"] * (torch.stack(earlier).sum().exp() if earlier else 1.0)
        Q_U = span["q_U"] * span["logq"][:-1].sum().exp()
        if way.get("sort") == "all":
            total = total + ranked(P_V, Q_U)
            continue
        if way.get("match") != "token" and len(span["places"]) + len(span["logq"]) > 2:
            y, u = span["drawn"]
            near = mass(shape, P_V[y], Q_U[u])
            far = ranked(torch.cat([P_V[:y], P_V[y + 1 :]]), torch.cat([Q_U[:u], Q_U[u + 1 :]]))
            total = total + share * near + (1 - share) * far
            continue
        near = mass(shape, P_V[shared], Q_U[ORDER_V[shared]]).sum()
        total = total + share * near + (1 - share) * ranked(P_V[~shared], Q_U[rest_U])
    return total


def ranked(p: Tensor, q: Tensor) -> Tensor:
    longest = max(len(p), len(q))
    fill = [torch.cat([x, x.new_zeros(longest - len(x))]).sort(descending=True).values for x in (p, q)]
    return (fill[0] - fill[1]).abs().sum()


GOLD = [
    {},
    {"match": "token"},
    {"sort": "all"},
    {"matched_weight": 0.0},
    {"matched_weight": 1.0},
    {"matched_weight": 0.7, "match": "token"},
]


@pytest.mark.parametrize("way", GOLD, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_A_5_merged_distributions_read_every_factor_where_it_was_predicted(way: dict, shape: str) -> None:
    world = World(5, words=SOME)
    hidden_TD, weight_VD = world.hidden_TD.clone().requires_grad_(), world.weight_VD.clone().requires_grad_()
    wanted = gold_loss(world, hidden_TD, weight_VD, shape, way)
    wanted.backward()
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    spec = term({"kind": "gold", **way}, shape=SHAPES[shape])
    loss, dhidden, dweight, _ = run(world, spec, world.rows("gold"))
    close(loss, wanted.detach())
    close(dhidden, hidden_TD.grad)
    close(dweight, weight_VD.grad)
    late = gold_loss(world, world.hidden_TD, world.weight_VD, shape, way, late=1)
    assert (loss - late).abs() > 1e-3, "a factor read one token late is another loss"


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_A_5_spans_are_merged_wherever_tiles_cut_them(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.objectives.kernels.block.NUMBERS_HOST", chunk)
    monkeypatch.setattr("opd.objectives.kernels.block.PART_HOST", chunk)
    world = World(5, words=SOME)
    spec = term("gold", shape=SHAPES["jsd"])
    hidden_TD = world.hidden_TD.clone().requires_grad_()
    wanted = gold_loss(world, hidden_TD, world.weight_VD, "jsd", {})
    wanted.backward()
    assert hidden_TD.grad is not None
    loss, dhidden, _, values = run(world, spec, world.rows("gold"), chunk=chunk)
    close(loss, wanted.detach())
    close(dhidden, hidden_TD.grad)
    said = values.terms["t"].target_T
    assert said is not None
    for span in spans(world, world.weight_VD):
        close(said[span["places"]].sum(), span["logq"].sum())


# ---- what is not mapped ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
@pytest.mark.parametrize("way", ["strict", "span", "gold", "alm"])
def test_A_9_what_is_said_where_nothing_is_mapped_changes_nothing(way: str, poison: float) -> None:
    world = World(6, words=SOME)
    spec, clean = term(way), world.rows(way)
    before = run(world, spec, clean)
    assert clean.index_T is not None
    tokens = len(world.batch.token_T)
    place_T = torch.full((tokens,), -1)
    place_T[clean.index_T] = torch.arange(len(clean.index_T))

    def everywhere(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        filled = torch.full((tokens, *values.shape[1:]), poison if values.is_floating_point() else 0).to(values.dtype)
        filled[place_T >= 0] = values[place_T[place_T >= 0]]
        return filled

    fields = ("logprobs_T", "hidden_TD", "own_token_T", "before_T")
    dirty = replace(
        clean, index_T=None, valid_T=place_T >= 0, **{name: everywhere(getattr(clean, name)) for name in fields}
    )
    after = run(world, spec, dirty)
    for x, y in zip(before[:3], after[:3], strict=True):
        assert torch.equal(x, y)
    untouched = [t for said, r in zip(world.said(), world.answers, strict=True) if not said for t in range(len(r.mask))]
    assert untouched, "an answer of which nothing is mapped is there"


@pytest.mark.parametrize("way", ["span", "gold", "alm"])
def test_a_span_that_loses_a_token_is_left_out_whole(way: str) -> None:
    world = World(7, words=[((2, 1, 1), (0,)), ((1, 1), (3,))])  # spans of 3, 1, 2 and 1 tokens
    key = world.answers[0].id
    bad = {"teacher": {key: np.array([0, 1, 0, 0], bool)}}
    plan = Objective(rooms.objective(term(way))).plan(0, world.answers, bad, spans=world.spans)
    assert plan.terms[0].kept[key].tolist() == [False, False, False, True]
    assert plan.terms[0].lost == {"teacher": 1, "span": 2}
    _, dhidden, _, _ = run(world, term(way), world.rows(way), invalid=bad)
    assert not dhidden[:3].any() and dhidden[3:].any(-1).all()


def test_M_12_unmapped_tokens_leave_the_denominator_and_are_counted() -> None:
    world = World(7, words=[((0,), (5,)), ((2, 0), (1, 1))])  # same; unmapped | a span of 2 to 1; one of 2 to 3
    plan = Objective(rooms.objective(term("strict"), term("span", name="s"))).plan
    for way, kept, lost in (("strict", [1, 0, 0, 0, 0, 0], 5), ("span", [1, 0, 1, 1, 1, 1], 1)):
        made = Objective(rooms.objective(term(way))).plan(0, world.answers, {}, spans=world.spans).terms[0]
        assert np.concatenate([made.kept[r.id] for r in world.answers]).astype(int).tolist() == kept
        assert made.lost == {"unmapped": lost}
        assert made.weight[world.answers[0].id] == 1 / sum(kept)
    with pytest.raises(Exception, match="joined in one way"):
        plan(0, world.answers, {}, spans=world.spans)


# ---- one tokenizer ---------------------------------------------------------------------------------------------------


def own_rows(world: World, *, through: bool, way: str, weight_VD: Tensor) -> ScorerRows:
    """A scorer with the student's tokens, as it is or with its ids permuted and through the foreign path."""
    every = torch.ones(len(world.batch.token_T)).bool()
    head = Head(weight_VD, V)
    if not through:
        return ScorerRows("teacher", every, 1.0, hidden_TD=world.hidden_TD, head=head)
    order_V = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    permuted = torch.empty_like(weight_VD)
    permuted[order_V] = weight_VD
    rows = ScorerRows(
        "teacher", every, 1.0, hidden_TD=world.hidden_TD, head=Head(permuted, V, order_V=order_V),
        shared_V=torch.ones(V).bool(), own_token_T=order_V[world.batch.token_T],
    )  # fmt: skip
    return replace(rows, before_T=torch.zeros(len(every)).double()) if way == "gold" else rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["strict", "span", "gold", "alm"])
def test_a_scorer_whose_tokens_are_the_students_is_read_as_one_with_its_tokenizer(way: str, shape: str) -> None:
    world = World(8, words=SOME)
    trivial = {
        r.id: replace(world.spans["teacher"][r.id], span_T=np.arange(len(r.mask)), same_T=np.ones(len(r.mask), bool))
        for r in world.answers
    }
    theirs_VD, spec = world.numbers(*world.weight_VD.shape), term(way, shape=SHAPES[shape])
    world.spans = {}
    wanted = run(world, spec, own_rows(world, through=False, way=way, weight_VD=theirs_VD))
    world.spans = {"teacher": trivial}
    got = run(world, spec, own_rows(world, through=True, way=way, weight_VD=theirs_VD))
    for x, y in zip(got[:3], wanted[:3], strict=True):
        close(x, y)
    assert wanted[1].norm() > 0.01
    same = run(world, spec, own_rows(world, through=True, way=way, weight_VD=world.weight_VD))
    assert same[1].abs().max() < 1e-12, "student = teacher"
    local = run(
        world, {**spec, "alignment": "strict"}, own_rows(world, through=True, way="strict", weight_VD=theirs_VD)
    )
    if way in ("span", "gold"):
        close(wanted[1], local[1])  # of single tokens it is the same
