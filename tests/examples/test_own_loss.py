"""opd's loss inside other trainers: the hooks' own part, without those trainers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from opd.config.slots import Sampled, TopK
from opd.objectives import oracle
from opd.objectives.audit import audit
from opd.objectives.oracle import divergences
from tests import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("support", ["bucket", "sampled"])
@pytest.mark.parametrize("count", [None, 17])
def test_the_trl_hook_gives_the_loss_and_gradient_of_a_naive_formula(
    count: int | None, support: str, monkeypatch
) -> None:
    own = example("own_loss_in_trl")
    k, V = 4, 40
    chosen = Sampled() if support == "sampled" else TopK(kind="teacher_top_k", k=k)
    monkeypatch.setattr(own, "TERM", own.TERM.model_copy(update={"support": chosen}))
    student, teacher = (tiny.model("qwen3", vocab_size=V, seed=seed).double() for seed in (0, 1))
    ids = torch.randint(3, V, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = labels[1, :2] = labels[1, 6:] = -100  # prompts of two lengths, as batches of the data have them
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    hook = own.OwnLoss()
    hook.teacher_model, hook.accelerator = teacher, SimpleNamespace(unwrap_model=lambda model: model)
    inputs = {"input_ids": ids, "attention_mask": attention, "labels": labels, "prompts": ids[:, :4]}
    loss = hook.compute_loss(student, inputs, num_items_in_batch=count)
    loss.backward()
    made = [p.grad.clone() for p in student.parameters() if p.grad is not None]

    student.zero_grad()
    logp = student(input_ids=ids, attention_mask=attention).logits[:, :-1, :V].log_softmax(-1)
    with torch.no_grad():
        logq = teacher(input_ids=ids, attention_mask=attention).logits[:, :-1, :V].log_softmax(-1)
    if support == "sampled":
        drawn, q = (x.gather(-1, ids[:, 1:, None])[..., 0] for x in (logp, logq))
        value = (drawn - q).detach() * (
            drawn - drawn.detach() + 1
        )  # the loss is the estimate, its gradient the score's
    else:
        value = divergences.bucketed(divergences.reverse_kl)(logp, logq, divergences.top_k_mask(logq, k))
    trained = labels[:, 1:] != -100
    wanted = value[trained].sum() / (count or trained.sum())
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-7, rtol=1e-7)  # weights travel as float32
    for ours, theirs in zip(made, [p.grad for p in student.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_the_trl_hook_refuses_two_vocabularies() -> None:
    own = example("own_loss_in_trl")
    heads = [own.head_of(tiny.model("qwen3", vocab_size=V, seed=0)) for V in (40, 48)]
    hidden = torch.zeros(1, heads[0].weight_VD.shape[1])
    with pytest.raises(ValueError, match="student has 40 tokens, teacher 48"):
        own.summed_loss(hidden, heads[0], hidden, heads[1], torch.zeros(1).long(), 1.0)


def test_the_trl_hook_refuses_a_model_that_scales_its_logits() -> None:
    own = example("own_loss_in_trl")
    model = tiny.model("qwen3", vocab_size=40, seed=0)
    outputs = model(input_ids=torch.arange(3, 8)[None], output_hidden_states=True, logits_to_keep=1)
    assert own.checked(own.head_of(model), outputs, "student").vocab_size == 40
    outputs.logits = outputs.logits / 8  # as Granite does
    with pytest.raises(ValueError, match="the student's logits are not its last layer's"):
        own.checked(own.head_of(model), outputs, "student")


@pytest.mark.parametrize("name", ["opd_reverse_kl", "opd_jsd"])
def test_the_verl_surrogate_follows_its_shape_on_fresh_and_on_stale_samples(name: str) -> None:
    own = example("own_loss_in_verl")

    def loss(student_logits, teacher_logits, tokens, mask, behaviour_logprobs):
        logp, logq = (x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (student_logits, teacher_logits))
        return own.surrogate(logp, logq, behaviour_logprobs, own.SHAPES[name])

    found = audit(loss if name == "opd_jsd" else own.audited)
    assert found.verdict == {"opd_reverse_kl": "reverse KL", "opd_jsd": "JSD(0.5)"}[name]
    assert found.stale is not None and found.stale < 1e-9 and found.teacher_held


def test_the_verl_losses_register_and_answer_in_verls_signatures(monkeypatch) -> None:
    """Modules with the names that verl has, as read; verl itself is not here."""
    own = example("own_loss_in_verl")
    known: dict[str, Any] = {}

    def register_distillation_loss(settings: SimpleNamespace) -> Callable[[Any], Any]:
        def decorator(loss: Any) -> Any:
            known.update(dict.fromkeys(settings.names, loss))
            return loss

        return decorator

    modules = {
        "verl.trainer.distillation.losses": {
            "DistillationLossSettings": lambda names, use_topk=False, use_estimator=False: SimpleNamespace(names=names),
            "register_distillation_loss": register_distillation_loss,
        },
        "verl.workers.utils.padding": {"no_padding_2_padding": lambda tensor, data: tensor},
    }
    for name, content in modules.items():
        for end in range(1, name.count(".") + 2):
            monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:end]), ModuleType("stands for verl's"))
        vars(sys.modules[name]).update(content)
    own.register()
    assert set(known) == set(own.SHAPES)

    # One state, one token after another drawn with its own probability: the mean is the reverse KL's field.
    tree = oracle.tree(6, 1)
    student, teacher, then = tree.random_table(0).requires_grad_(), tree.random_table(1), tree.random_table(2)
    logp, logq, old = (table.log_softmax(-1)[0, :, None] for table in (student, teacher, then))
    losses, metrics = known["opd_reverse_kl"](
        config=None,
        distillation_config=None,
        model_output={"log_probs": logp},
        data={"teacher_logprobs": logq[..., None], "old_log_probs": old},
    )
    assert losses.shape == (6, 1) and metrics == {}
    (made,) = torch.autograd.grad((old.exp() * losses).sum(), student)
    field = oracle.local_field(tree, student.detach(), teacher, divergences.reverse_kl)
    torch.testing.assert_close(made, field, atol=1e-14, rtol=0)
