"""`opd audit`: what it says about losses whose gradient is known, and about what is wrong with a function."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from opd.cli import audit as command
from opd.errors import BadInput
from opd.objectives.audit import Findings, audit
from opd.objectives.audit.findings import ZERO

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


losses = example("audited_losses")


def of(name: str) -> Findings:
    return audit(getattr(losses, name), name)


def field(findings: Findings, name: str) -> float:
    match = findings.match(name)
    assert match is not None
    return match.cosine


def test_O_1_k1_direct_is_noise_without_a_teacher() -> None:
    found = of("k1_direct")
    assert found.verdict == "noise: the expected gradient is zero, and the teacher is not in it"
    assert found.teacher_in_answers == 0 and found.expected < ZERO and found.matches == ()


def test_O_2_k3_direct_is_the_forward_kl() -> None:
    found = of("k3_direct")
    assert found.verdict == "forward KL" and field(found, "reverse KL") < 0.95
    assert found.stale is not None and found.stale > 0.1 and not found.teacher_held


def test_O_3_k2_as_a_cost_follows_nothing_known() -> None:
    found = of("k2_as_cost")
    assert found.follows is None and found.verdict.startswith("none of the known fields")
    assert field(found, "reverse KL") < 0.95


def test_O_4_k2_direct_is_right_on_fresh_samples_alone() -> None:
    found = of("k2_direct")
    assert found.verdict == "reverse KL" and found.stale is not None and found.stale > 0.1
    weighted = of("ours_sampled")
    assert weighted.verdict == "reverse KL" and weighted.stale is not None and weighted.stale < ZERO


def test_O_5_top_k_as_advantage_is_noise_with_a_teacher() -> None:
    found = of("top_k_as_advantage")
    assert found.verdict == "noise: the expected gradient is zero" and found.teacher_in_answers > 0.1


def test_O_6_naive_top_k_is_not_at_rest_where_student_is_teacher() -> None:
    found = of("naive_top_k")
    assert found.verdict == "reverse KL truncated to the teacher's top 2" and found.mean_at_teacher > 0.1
    rescaled = of("renormalised_top_k")
    assert rescaled.verdict == "reverse KL on the teacher's top 2, rescaled" and rescaled.mean_at_teacher < ZERO


def test_O_10_O_11_two_buckets() -> None:
    assert of("two_bucket").follows is None
    assert of("two_bucket_without_tail").verdict == "no gradient at all"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ours_reverse_kl", "reverse KL"),
        ("ours_forward_kl", "forward KL"),
        ("ours_jsd", "JSD(0.5)"),
        ("ours_sampled_forward", "forward KL"),
        ("ours_top_k", "reverse KL on the teacher's top 2, the rest one class"),
    ],
)
def test_our_terms_follow_what_they_are_called(name: str, wanted: str) -> None:
    found = of(name)
    assert found.verdict == wanted
    assert found.matches[0].relative < 1e-9
    assert found.stale is not None and found.stale < 1e-6
    assert found.teacher_held and found.mean_at_teacher < ZERO and found.answers_at_teacher < ZERO
    assert found.masked_gradient == 0 and found.masked_values == 0 and not found.masked_nan
    assert found.padding == pytest.approx(1, abs=1e-12)
    assert all(found.finite.values())


# ---- means, masks and infinities, on a full reverse KL -------------------------------------------------------------


def full(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    logp, logq = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def token_mean(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    return full(student_logits, teacher_logits)[mask].mean()


def answer_mean(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    value = torch.where(mask, full(student_logits, teacher_logits), 0.0)
    return (value.sum(-1) / mask.sum(-1)).mean()


def answer_sum(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    return torch.where(mask, full(student_logits, teacher_logits), 0.0).sum(-1).mean()


def padded_mean(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    return torch.where(mask, full(student_logits, teacher_logits), 0.0).mean()


def whitened(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    value = full(student_logits, teacher_logits)[mask]
    return (value / value.detach().mean()).sum()


MEANS = {
    token_mean: ("mean over tokens of the call", True, 1.0),
    answer_sum: ("mean over answers of token sums", False, 1.0),
    padded_mean: ("mean over all positions of the call, masked ones included", True, 0.5),
}


@pytest.mark.parametrize("loss", MEANS, ids=lambda loss: loss.__name__)
def test_means_are_found_out_and_undone(loss) -> None:
    name, splits, padding = MEANS[loss]
    found = audit(loss)
    assert found.averaging == name and found.splits is splits
    assert found.verdict == "reverse KL" and found.matches[0].relative < 1e-12
    assert found.padding == pytest.approx(padding)


def test_a_mean_over_token_means_weighs_answers_by_their_length() -> None:
    found = audit(answer_mean)
    assert found.averaging == "mean over answers of their token means" and not found.splits
    assert found.follows is None and field(found, "reverse KL") < 0.999


def test_a_mean_of_its_own_is_said_to_be_one() -> None:
    assert audit(whitened).averaging == "of its own kind"


def leaky(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    return full(student_logits, teacher_logits).sum()


def shifted_mask(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    mean = full(student_logits, teacher_logits).mean().detach()  # read from masked tokens too
    return (full(student_logits, teacher_logits) * mean)[mask].sum()


def test_masked_tokens_that_leak_are_seen() -> None:
    assert audit(leaky).masked_gradient > 0.1
    assert audit(shifted_mask).masked_values > 0.1


def test_log_of_probabilities_is_not_finite_where_a_token_is_ruled_out() -> None:
    assert audit(token_mean).finite == {"both": False, "student": False, "teacher": False}

    def safe(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
        logp, logq = (x.log_softmax(-1).clamp(min=-1e9) for x in (student_logits, teacher_logits))
        return torch.where(mask, (logp.exp() * (logp - logq)).sum(-1), 0.0).sum()

    assert all(audit(safe).finite.values())


def test_a_scaled_and_a_sequence_level_loss_are_recognised() -> None:
    def scaled(*arguments):
        return 3 * token_mean(*arguments)

    def sequence(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
        logp, logq = (x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (student_logits, teacher_logits))
        cost = torch.where(mask, logp - logq, 0.0).detach()
        to_come = cost.flip(-1).cumsum(-1).flip(-1)
        return torch.where(mask, to_come * logp, 0.0).sum()

    assert audit(scaled).verdict == "reverse KL, times 3"
    assert audit(sequence).verdict == "sequence-level reverse KL"


def test_a_wrong_sign_is_called_that() -> None:
    def rewards_distance(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
        logp, logq = losses.drawn(student_logits, tokens), losses.drawn(teacher_logits, tokens)
        return torch.where(mask, (logq - logp).detach() * logp, 0.0).sum()

    found = audit(rewards_distance)
    assert found.follows is None and found.opposes is not None and found.opposes.name == "reverse KL"
    assert found.verdict.startswith("the opposite of reverse KL") and found.plain()["opposes"] == "reverse KL"
    for name in ("k1_as_cost", "k2_as_cost", "k1_direct"):
        assert of(name).opposes is None, name


# ---- bad functions, and the command -------------------------------------------------------------------------------


def raising(*arguments):
    raise KeyError("k")


def wrong_shape(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    return full(student_logits, teacher_logits).sum(-1).unsqueeze(-1).expand(-1, 7)


def random_numbers(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    return (full(student_logits, teacher_logits) * torch.rand(())).sum()


def not_finite(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
    return full(student_logits, teacher_logits).sum() * math.nan


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (raising, "raised KeyError: 'k'"),
        (wrong_shape, r"returned torch.float64 \(1, 7\); return a floating scalar, or a loss per token \(1, 3\)"),
        (lambda *a: 1.0, "returned float"),
        (lambda a, b: a.sum(), "raised TypeError"),
        (random_numbers, "two gradients for the same rows"),
        (not_finite, "not finite on ordinary logits"),
    ],
)
def test_a_function_that_cannot_be_audited_is_refused(loss, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        audit(loss)


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys, monkeypatch) -> None:
    from opd.cli.main import app

    monkeypatch.chdir(tmp_path)
    name = "my_own_losses"
    Path(f"{name}.py").write_text("def k1(s, t, tokens, mask, b):\n    p = s.log_softmax(-1)\n"
                                  "    return p.gather(-1, tokens[..., None])[..., 0]\n")  # fmt: skip
    for target in (f"{name}.py:k1", f"{name}:k1"):
        sys.modules.pop(name, None)
        app(["audit", target], result_action="return_value")
        said = " ".join(capsys.readouterr().out.split())
        assert f"{target} follows: noise: the expected gradient is zero, and the teacher is not in it" in said
    app(["audit", f"{name}:k1", "--json"], result_action="return_value")
    made = json.loads(capsys.readouterr().out)
    assert made["follows"] is None and made["noise"] is None and made["teacher_in_mean"] == 0
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("losses", "is not MODULE:FUNCTION"),
        ("no_such_module_here:f", "cannot be imported from here: ModuleNotFoundError"),
        ("absent.py:f", "absent.py is not a file"),
        ("math:nothing", "math has no nothing"),
        ("math:pi", "but not as a function"),
    ],
)
def test_targets_that_do_not_exist_are_refused(target: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        command.load(target)


def test_a_file_that_breaks_on_import_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken_losses.py"
    path.write_text("raise RuntimeError('no')\n")
    with pytest.raises(BadInput, match="cannot be imported: RuntimeError: no"):
        command.load(f"{path}:f")
    sys.modules.pop("broken_losses", None)


def test_the_page_says_what_the_audit_says(monkeypatch) -> None:
    docs = EXAMPLES.parent / "docs"
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(docs))
    make = importlib.import_module("make_audit_page")
    page = (docs / "audit.md").read_text(encoding="utf-8")
    assert make.meanings(losses.AUDITED) in page
    for name in ("k1_direct", "naive_top_k", "ours_sampled"):
        assert make.table([of(name)]).splitlines()[-1] in page
