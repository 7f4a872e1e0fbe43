"""opd's sampled terms inside verl: a distillation loss registered under a name of its own.

    VERL_USE_EXTERNAL_MODULES=own_loss_in_verl python -m verl.trainer.main_ppo ...

    distillation:
      distillation_loss:
        {loss_mode: opd_reverse_kl, use_policy_gradient: false, use_task_rewards: false, loss_max_clamp: null}

verl samples, scores the drawn tokens with the teacher, and calls the loss with log-probabilities per token; hidden
states do not come through this hook, so what can be had is every *sampled* term: any of opd's shapes, held fixed, as
the advantage of the drawn token, weighed by the student now over the student that began the update.

The options matter. Backpropagated as it stands (use_policy_gradient: false), because it is a policy gradient already:
verl's own policy loss on top would detach it. No clamp: where a clamp binds the surrogate has no gradient, and large
log-ratios are where it matters most. use_task_rewards: true adds verl's policy loss of the rewards, if you have some.
The mean over tokens is verl's `actor.loss_agg_mode`; token-mean, as means over an answer's own length are biased here.

The module has to be known to the driver as well as to the workers: verl looks the name up when it reads its config. The
environment variable above makes every process import it; `external_lib` of the model would reach the workers alone.

What was run: `surrogate`, which is what `opd audit examples/own_loss_in_verl.py:audited` looks at, and the registration
against modules that have the signatures of verl's. verl itself was not: they were read off `verl/trainer/distillation/
losses.py` (commit 01dcf9f0) and `verl/workers/config/distillation.py` (commit 0cc28efc), and may change.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from opd.config.shapes import JensenShannon, ReverseKL, Shape
from opd.objectives.shapes import maths

SHAPES: dict[str, Shape] = {"opd_reverse_kl": ReverseKL(), "opd_jsd": JensenShannon(beta=0.5)}


def surrogate(logp: Tensor, logq: Tensor, then: Tensor, shape: Shape) -> Tensor:
    """A loss per token whose expected gradient is the shape's local field: -sg(ratio h(r)) log p.

    logp, logq, then   log-probabilities of the drawn tokens under the student, the teacher, and the student that began
                       the update; any one shape.
    """
    advantage = maths(shape).h(logp.detach(), logq.detach())
    return -(logp.detach() - then).exp() * advantage * logp


def audited(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """The reverse KL's surrogate as `opd audit` calls losses."""
    logp, logq = (x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (student_logits, teacher_logits))
    return surrogate(logp, logq, behaviour_logprobs, ReverseKL())


def register() -> None:
    """Makes the losses known to verl under the names of `SHAPES`."""
    from verl.trainer.distillation.losses import (  # pyright: ignore[reportMissingImports]
        DistillationLossSettings,
        register_distillation_loss,
    )
    from verl.workers.utils.padding import no_padding_2_padding  # pyright: ignore[reportMissingImports]

    def registered(name: str, shape: Shape) -> None:
        @register_distillation_loss(DistillationLossSettings(names=[name], use_estimator=True))
        def loss(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Tensor, dict[str, Any]]:
            logp = no_padding_2_padding(model_output["log_probs"], data)
            logq = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
            then = data["old_log_probs"]
            then = then.to_padded_tensor(0.0) if then.is_nested else then
            return surrogate(logp, logq, then, shape), {}

    for name, shape in SHAPES.items():
        registered(name, shape)


if find_spec("verl") is not None:
    register()
