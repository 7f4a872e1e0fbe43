"""Answers that student and scorer write together, token by token: MiniLLM's mixture, SKD's proposals and checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from opd.config.behaviours import Speculative, TeacherMixed
from opd.protocols import Weights
from opd.rollouts import joint
from opd.rollouts.answers import Answers
from opd.rollouts.decoding import DecoderPath, Decoding, Evaluating, check_prompts
from opd.rollouts.engine import EmbeddedEngine
from opd.rollouts.pair import PairDecoder, PromptPair
from opd.rollouts.scorer import WritingScorer, as_read, fetched
from opd.rollouts.writing import write
from opd.text.agreement import Agreement
from opd.types import Prompt, Rollout, SamplingParams


class MixedAnswers:
    """A `Sampler` in which the student and `scorer` write one answer, each behind its own prompt.

    Both models read every token, so it costs a student's and a teacher's sampling; proposals are not drafted ahead.
    Every token is drawn once, from the law of what comes out (`joint.py`), and `behaviour_logprobs` are that law's.
    Answers end as the student's do.

    engine     the student's; its weights, seed and slots are used.
    path       which decoder runs the scorer.
    progress   called with the number of answers of the running `generate` call that are finished.
    """

    def __init__(
        self,
        spec: TeacherMixed | Speculative,
        engine: EmbeddedEngine,
        scorer: WritingScorer,
        *,
        path: DecoderPath,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.progress = progress
        self._spec, self._engine, self._scorer = spec, engine, scorer
        self._path: DecoderPath = path
        self._version = 0

    def load(self, weights: Weights) -> None:
        """The student's engine takes them over."""
        self._engine.load(weights)
        self._version = weights.version

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        """See `protocols.Sampler`. Both models' weights are read anew by every call.

        BadInput when a prompt is empty, occurs twice, or leaves no room for max_tokens in either context; ModelError
        when logits are not finite.
        """
        if not prompts_P:
            return []
        student, scorer, engine = self._engine.decoding, self._scorer, self._engine
        assert isinstance(scorer.agreement, Agreement), "two models draw one token together: theirs must be the same"
        theirs_P = as_read(prompts_P, scorer)
        plain = SamplingParams(  # the law is drawn from as it is: temperature and cuts are in it
            max_tokens=params.max_tokens, stop_ids=params.stop_ids, samples_per_prompt=params.samples_per_prompt
        )
        answers = Answers(prompts_P, plain, tag=tag, seed=engine.seed, progress=self.progress, who="student")
        slots = min(engine.slots, len(answers.rollout_ids))
        check_prompts(prompts_P, params.max_tokens, student.model, who="student")
        with fetched(scorer) as model, Evaluating(student.model), Evaluating(model):
            check_prompts(theirs_P, params.max_tokens, model, who=f"scorer {scorer.name}")
            theirs, tokens = Decoding(model, path=self._path), params.max_tokens
            decoder = PairDecoder(
                student.decoder(slots=slots, capacity=_longest(prompts_P) + tokens, steps=tokens),
                theirs.decoder(slots=slots, capacity=_longest(theirs_P) + tokens, steps=tokens),
                self._joint(),
                params,
                order_V=scorer.agreement.order(),
                teacher_device=model.device,
                teacher_name=scorer.name,
            )
            pairs = [PromptPair(ours.ids, theirs.ids) for ours, theirs in zip(prompts_P, theirs_P, strict=True)]
            write(decoder, pairs, answers, samples=params.samples_per_prompt, slots=slots)
        return answers.rollouts(behaviour=self._spec.kind, version=self._version, sampling=params)

    def _joint(self) -> joint.Joint:
        spec = self._spec
        if isinstance(spec, TeacherMixed):
            return partial(joint.mixed, alpha=spec.alpha)
        return partial(joint.verified, top_k=spec.top_k, temperature=self._scorer.temperature)


def _longest(prompts_P: Sequence[Prompt]) -> int:
    return max(len(prompt.ids) for prompt in prompts_P)
