"""The one-file example runs and learns; its `loss_on`, the independent reference for the loop, is what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "opd_in_one_file.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("opd_in_one_file", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


one_file = load_example()


@pytest.fixture(scope="module")
def models():
    """Student, teacher, another teacher, in float64."""
    return tuple(tiny.model(vocab_size=50, seed=seed).double() for seed in (0, 1, 2))


@pytest.fixture(scope="module")
def sequences(models):
    """Answers of the student with lengths that differ, and the log-probabilities it gave them."""
    generator = torch.Generator().manual_seed(0)
    return [
        *one_file.sample(models[0], [[5, 6, 7], [8, 9, 10]], 9, {2, *range(30, 40)}, generator),
        *one_file.sample(models[0], [[11, 12, 13, 14, 15]], 4, {2}, generator),
    ]


def gradient(student, teacher, sequences, objective: str, beta: float = 0.3) -> torch.Tensor:
    student.zero_grad()
    one_file.loss_on(student, teacher, sequences, objective, beta).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def test_it_imports_nothing_from_the_library_and_stays_short():
    text = EXAMPLE.read_text()
    assert "import opd" not in text and "from opd" not in text
    assert len(text.splitlines()) < 300


def test_sampled_logprobs_are_those_of_the_whole_sequence(models, sequences):
    assert len({len(response) for _, response, _ in sequences}) > 1
    for prompt, response, logprobs in sequences:
        with torch.no_grad():
            again_TV = one_file.response_logprobs(models[0], prompt, response)
        again_T = again_TV.gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs, dtype=torch.float64), again_T, atol=1e-5, rtol=0)


def test_an_answer_ends_with_its_end_token_once(models):
    ends = {2, *range(10, 30)}
    drawn = one_file.sample(models[0], [[5, 6]] * 20, 6, ends, torch.Generator().manual_seed(1))
    assert any(len(response) < 6 for _, response, _ in drawn)
    for _, response, logprobs in drawn:
        assert len(response) == len(logprobs)
        assert not ends & set(response[:-1])
        assert response[-1] in ends or len(response) == 6


@pytest.mark.parametrize("objective", one_file.OBJECTIVES)
def test_a_student_that_is_its_teacher_has_no_gradient_and_another_teacher_has_another(models, sequences, objective):
    student, teacher, other = models
    scale = gradient(student, teacher, sequences, objective).norm()
    assert scale > 1e-2
    # The behaviour log-probabilities are float32 numbers, so the sampled form is zero to that precision only.
    assert gradient(student, student, sequences, objective).norm() < (1e-5 if objective == "tml" else 1e-12) * scale
    change = gradient(student, other, sequences, objective) - gradient(student, teacher, sequences, objective)
    assert change.norm() > 0.1 * scale


@pytest.mark.parametrize("objective", one_file.OBJECTIVES)
def test_the_mean_is_over_the_tokens_of_the_batch(models, sequences, objective):
    student, teacher, _ = models
    lengths = torch.tensor([len(response) for _, response, _ in sequences], dtype=torch.float64)
    alone = torch.stack([one_file.loss_on(student, teacher, [s], objective).detach() for s in sequences])
    together = one_file.loss_on(student, teacher, sequences, objective)
    torch.testing.assert_close(together.detach(), (alone * lengths).sum() / lengths.sum())


def test_the_gradient_of_tml_is_the_advantage_times_the_score(models, sequences):
    student, teacher, _ = models
    found = gradient(student, teacher, sequences, "tml")
    student.zero_grad()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for prompt, response, logprobs in sequences:
        rows = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        picked = torch.tensor(response)
        log_pi_T = student(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)[rows, picked]
        log_q_T = teacher(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)[rows, picked].detach()
        advantage_T = log_q_T - torch.tensor(logprobs, dtype=torch.float64)
        total = total - (advantage_T * log_pi_T).sum()
        tokens += len(response)
    (total / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    # On fresh samples the importance ratio is 1 up to the float32 rounding of the recorded log-probabilities.
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_divergences_agree_with_torch(models, sequences):
    student, teacher, _ = models
    prompt, response, _ = one = sequences[0]
    with torch.no_grad():
        log_pi, log_q = (one_file.response_logprobs(m, prompt, response) for m in (student, teacher))
        found = {
            name: one_file.loss_on(student, teacher, [one], name, 0.3) for name in ("reverse_kl", "forward_kl", "jsd")
        }
    kl_div = torch.nn.functional.kl_div  # kl_div(a, b) is KL(b || a)
    log_m = (0.3 * log_q.exp() + 0.7 * log_pi.exp()).log()
    expected = {
        "reverse_kl": kl_div(log_q, log_pi, log_target=True, reduction="batchmean"),
        "forward_kl": kl_div(log_pi, log_q, log_target=True, reduction="batchmean"),
        "jsd": 0.3 * kl_div(log_m, log_q, log_target=True, reduction="batchmean")
        + 0.7 * kl_div(log_m, log_pi, log_target=True, reduction="batchmean"),
    }
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("chat", [False, True])
def test_it_runs_end_to_end_on_models_from_disk_and_the_kl_falls(tmp_path, capsys, chat):
    student = tiny.save(tmp_path / "student", "qwen3", chat=chat, seed=0)
    teacher = tiny.save(tmp_path / "teacher", "llama", chat=chat, seed=1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "\n".join(json.dumps({"prompt": p}) for p in ("Sort: ba", "What is 1 + 2?", "the quick", "Solve"))
    )
    folders = f"--student {student} --teacher {teacher} --prompts {prompts} --output {tmp_path / 'out'}"
    settings = f"{folders} --steps 12 --lr 1e-2 --samples 2 --max-tokens 6"
    history = one_file.main(settings.split())
    assert sum(history[-3:]) < 0.7 * sum(history[:3])
    assert "reverse KL" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("objective", one_file.OBJECTIVES)
def test_every_objective_lowers_the_kl(objective, capsys):
    student, teacher = one_file.small_model(16, seed=1), one_file.small_model(16, seed=2)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(10)  # a random model is nearly uniform: give it something to say
    history = one_file.distil(
        student,
        teacher,
        one_file.sorting_prompts(100, seed=0),
        steps=12,
        lr=2e-2,
        prompts_per_step=16,
        samples=2,
        max_tokens=3,
        end_ids={one_file.END},
        objective=objective,
        beta=0.5,
        seed=0,
    )
    assert sum(history[-3:]) < 0.8 * sum(history[:3])


def test_different_vocabularies_are_refused(tmp_path):
    student, teacher = tiny.save(tmp_path / "a"), tiny.save(tmp_path / "b", chat=False, vocab_size=310)
    with pytest.raises(SystemExit, match="300 and 310 logits"):
        one_file.load(student, teacher, "unread.jsonl")


def test_without_models_it_makes_its_own(monkeypatch, capsys):
    monkeypatch.setattr(one_file, "teach", lambda model, prompts, steps: None)  # the training itself takes seconds
    monkeypatch.setattr(sys, "argv", ["opd_in_one_file.py", "--steps", "2"])
    assert len(one_file.main()) == 2
    assert "answers right after" in capsys.readouterr().out
