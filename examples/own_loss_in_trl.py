"""opd's objective inside TRL: GKDTrainer samples, generates and steps; the loss is opd's kernel.

    from own_loss_in_trl import trainer_class
    trainer = trainer_class()(model=..., teacher_model=..., args=GKDConfig(lmbda=1.0, ...), train_dataset=...)
    trainer.train()

What changes: any shape and support of opd (here reverse KL over the teacher's 32 most likely tokens and one class for
the rest), no [tokens, vocabulary] logits of a whole batch, and the gradient that `opd audit` finds for it.

What stays TRL's:

- Answers are drawn at `args.temperature` (0.9 unless set), without importance weights: the states are those of another
  policy than the one that is trained, unless the temperature is 1.
- The sum over tokens is divided by `num_items_in_batch`. Trainer counts it before GKDTrainer puts the student's answers
  in the place of the data's, so it is the number of the *data's* tokens: a scale that has nothing to do with the tokens
  that are trained, but the same for all micro-batches of a step, so that the direction is right.

Run with TRL 1.16.0, transformers 5.23.0 and torch 2.13.0 on CPU (`requirements-trl.txt`; tests/examples/test_trl.py
makes the environment): its trainer trains with this loss, on-policy and on data, and with JSD over the whole vocabulary
the gradient is GKDTrainer's own. GKDTrainer is in `trl.experimental` and may change. Not run: parameters that are
sharded (ZeRO-3, FSDP), which would have to be gathered before the head is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.config.shapes import ReverseKL
from opd.config.slots import TopK
from opd.objectives.head import head_logits
from opd.objectives.kernels.rows import TermRows, TokenRows
from opd.objectives.kernels.tiled import tiled_loss
from opd.types import Head, ScorerRows

TERM = DivergenceTerm(name="distil", shape=ReverseKL(), support=TopK(kind="teacher_top_k", k=32, tail="bucket"))
TOLERANCE = 0.02  # of the largest logit: what bfloat16 leaves between two ways to the same logits
IGNORED = -100  # the label of tokens that are not trained


def head_of(model: Any) -> Head:
    """The last layer of a transformers model."""
    layer, config = model.get_output_embeddings(), model.config
    return Head(layer.weight, config.vocab_size, layer.bias, softcap=getattr(config, "final_logit_softcapping", None))


def checked(head: Head, outputs: Any, who: str) -> Head:
    """The head, if it gives the model's own logits at the last position; some models scale theirs."""
    with torch.no_grad():
        ours_NV, theirs_NV = head_logits(outputs.hidden_states[-1][:, -1], head), outputs.logits[:, -1]
        gap, size = (float(x.abs().max()) for x in (ours_NV - theirs_NV[:, : head.vocab_size], theirs_NV))
    if gap > TOLERANCE * size:
        raise ValueError(
            f"the {who}'s logits are not its last layer's: they differ by {gap:.3g} where the largest is {size:.3g}. "
            "Give `head_of` the model's scale"
        )
    return head


def summed_loss(
    hidden_TD: Tensor, head: Head, teacher_TD: Tensor, teacher_head: Head, token_T: Tensor, count: Tensor | float
) -> Tensor:
    """The sum of the term over tokens, divided by `count`; differentiable in the student's hidden states and head."""
    if head.vocab_size != teacher_head.vocab_size:
        raise ValueError(f"student has {head.vocab_size} tokens, teacher {teacher_head.vocab_size}: not one vocabulary")
    weight_T = torch.ones(len(token_T), device=token_T.device) / count
    rows = TokenRows(token_T=token_T, behaviour_T=torch.full_like(weight_T, torch.nan))
    term = TermRows(term=TERM, weight_T=weight_T, mix={"teacher": torch.ones_like(weight_T)}, unit=True)
    every = torch.ones_like(token_T, dtype=torch.bool)
    scorer = ScorerRows("teacher", every, 1.0, hidden_TD=teacher_TD, head=teacher_head)
    loss, _ = tiled_loss(hidden_TD, head, rows, [term], [scorer], student_temperature=1.0, chunk_tokens=256)
    return loss


class OwnLoss:
    """The loss hook, to be put before GKDTrainer."""

    teacher_model: Any
    accelerator: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # The state at a position predicts the token after it. Labels say what is trained, in batches of the data, whose
        # prompts have different lengths, as in the student's own.
        trained_NT = inputs["labels"][:, 1:] != IGNORED
        reading = {
            "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
            "output_hidden_states": True, "logits_to_keep": 1, "use_cache": False,
        }  # fmt: skip
        outputs = model(**reading)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = self.teacher_model(**reading)
        unwrap = self.accelerator.unwrap_model
        head = checked(head_of(unwrap(model)), outputs, "student")
        teacher_head = checked(head_of(unwrap(self.teacher_model)), teacher, "teacher")
        hidden_TD, teacher_TD = (o.hidden_states[-1][:, :-1][trained_NT] for o in (outputs, teacher))
        token_T = inputs["input_ids"][:, 1:][trained_NT]
        count = trained_NT.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = summed_loss(hidden_TD, head, teacher_TD, teacher_head, token_T, count)
        return (loss, outputs) if return_outputs else loss


def trainer_class() -> type:
    """GKDTrainer with this loss. Needs TRL."""
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]

    return type("OpdTrainer", (OwnLoss, GKDTrainer), {})
