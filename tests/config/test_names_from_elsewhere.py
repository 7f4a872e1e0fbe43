"""Mistakes that people make who know other libraries: what they are told, and that it works when it is followed."""

from __future__ import annotations

import pytest

from tests.config.recipes import BASE, PROMPTS, STUDENT, load, refused


def own(*terms: str, behaviour: str = "student") -> str:
    return f"objective:\n  behaviour: {behaviour}\n  terms:\n" + "".join(f"    - {{{term}}}\n" for term in terms)


@pytest.mark.parametrize(
    ("text", "said", "followed"),
    [
        (
            "objective: {preset: gkd, parameters: {lmbda: 0.7}}\n",
            "did you mean objective.parameters.on_policy?",
            "objective: {preset: gkd, parameters: {on_policy: 0.7}}\n",
        ),
        (
            "objective: {preset: exopd, parameters: {lambda: 1.5}}\n",
            "did you mean objective.parameters.scale?",
            "objective: {preset: exopd, parameters: {scale: 1.5}}\n",
        ),
        (
            "objective: {preset: gkd, parameters: {beta: 1}}\n",
            "allowed: divergence: forward_kl for beta 0, reverse_kl for beta 1",
            "objective: {preset: gkd, parameters: {divergence: reverse_kl}}\n",
        ),
        ("objective: reverse_kl\n", "write {preset: reverse_kl}", "objective: {preset: reverse_kl}\n"),
        ("objective: {loss: reverse_kl}\n", "did you mean objective.preset?", "objective: {preset: reverse_kl}\n"),
        (own("name: a, weight: 2"), "did you mean objective.terms.0.coefficient?", own("name: a, coefficient: 2")),
        (own("name: a, shape: forward_lk"), "did you mean forward_kl?", own("name: a, shape: forward_kl")),
        (
            own("name: a, support: {kind: top_k, k: 8}"),
            "did you mean student_top_k or teacher_top_k?",
            own("name: a, support: {kind: teacher_top_k, k: 8}"),
        ),
        (own("name: a, target: tutor"), "did you mean teacher?", own("name: a, target: teacher")),
        (
            own("name: a", "name: b, kind: data"),
            "a mixture that has dataset or teacher in objective.behaviour, and written_by here",
            own(
                "name: a",
                "name: b, kind: data, written_by: [dataset]",
                behaviour="{kind: mixture, of: [{writer: student, share: 0.5}, {writer: dataset, share: 0.5}]}",
            ),
        ),
        (own("name: a, domains: a"), "write [a]", None),
    ],
)
def test_what_is_said_works_to_the_letter(tmp_path, text: str, said: str, followed: str | None) -> None:
    message = refused(tmp_path, BASE + text)
    assert said in message and "Value error" not in message, message
    if followed is not None:
        load(tmp_path, BASE + followed)


def test_grpo_calls_its_anchor_kl(tmp_path) -> None:
    text = STUDENT + PROMPTS + "rewards: {grader: {kind: math}}\nobjective: {preset: grpo, parameters: {beta: 0.1}}\n"
    assert "did you mean objective.parameters.kl?" in refused(tmp_path, text)
    load(tmp_path, text.replace("beta", "kl"))


def test_a_parameter_that_is_missing_is_not_suggested_for_itself(tmp_path) -> None:
    message = refused(tmp_path, BASE + "objective: {preset: mopd}\n")
    assert "parameters: {routes: " in message and "did you mean" not in message


def test_a_term_of_a_preset_is_told_from_one_that_was_written(tmp_path) -> None:
    note = "note: the term is of preset 'tml', whose parameters are: discount"
    assert note in refused(tmp_path, BASE + "objective: {preset: tml}\nsampling: {top_p: 0.9}\n")
    written = own("name: a, support: sampled, importance: ratio") + "sampling: {top_p: 0.9}\n"
    assert "note:" not in refused(tmp_path, BASE + written)
    message = refused(tmp_path, BASE + "objective: {preset: deepseek_v4, parameters: {weights: {a: 0.7, b: 0.5}}}\n")
    assert "refuses it: the weights add up to 1.2" in message
    assert "note:" not in refused(tmp_path, BASE + "objective: {preset: tml}\noptim: {warmup_steps: 1000}\n")
