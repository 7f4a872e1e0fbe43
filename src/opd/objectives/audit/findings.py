"""What an audit found, as data, and in one sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FOLLOWS = 1e-5  # of a gradient's size: what may be left over when it follows a field; float32 inside leaves 1e-7
ZERO = 1e-6  # of one answer's typical gradient: an average below counts as zero


@dataclass(frozen=True)
class Match:
    """An expected gradient g beside a declared field.

    cosine    between the two.
    scale     c in g = c field, by least squares.
    relative  |g - field| / |field|, as it stands.
    residual  |g - c field| / |g|: what no scale explains.
    """

    name: str
    cosine: float
    scale: float
    relative: float
    residual: float


@dataclass(frozen=True)
class Findings:
    """Sizes are relative to the root mean square gradient of one answer, unless another unit is named.

    averaging            how the function takes its mean; the matches are for large batches of whole answers.
    splits               cutting a batch into several calls changes the direction.
    expected             size of the expected gradient.
    noise                standard deviation of one answer's gradient / size of the expected gradient.
    matches              best cosine first.
    stale                relative error when another policy wrote the answers, against the followed field in the states
                         that it visits; None when no local field is followed.
    teacher_in_mean      change of the expected gradient with another teacher.
    teacher_in_answers   change of single answers' gradients with another teacher.
    teacher_held         no gradient flows into the teacher's logits.
    mean_at_teacher      size of the expected gradient where student = teacher, of one that differs.
    answers_at_teacher   the same of single answers' gradients.
    masked_gradient      gradient at masked tokens, of that at the others.
    masked_values        change of the other tokens' gradient when logits at masked tokens change.
    masked_nan           NaN from teacher or sampler at masked tokens makes the gradient NaN.
    padding              factor on the gradient when an answer of three tokens is padded to six.
    finite               is the gradient finite when a token has logit -inf for: both, the student, the teacher.
    """

    function: str
    averaging: str
    splits: bool
    expected: float
    noise: float
    matches: tuple[Match, ...]
    stale: float | None
    teacher_in_mean: float
    teacher_in_answers: float
    teacher_held: bool
    mean_at_teacher: float
    answers_at_teacher: float
    masked_gradient: float
    masked_values: float
    masked_nan: bool
    padding: float
    finite: dict[str, bool]

    @property
    def follows(self) -> Match | None:
        """The field whose direction the expected gradient has, None when it has none of theirs."""
        best = self.matches[0] if self.matches else None
        return best if best is not None and best.residual <= FOLLOWS and best.cosine > 0 else None

    @property
    def opposes(self) -> Match | None:
        """The field whose opposite the expected gradient has: the loss has the wrong sign."""
        worst = self.matches[-1] if self.matches else None
        return worst if worst is not None and worst.residual <= FOLLOWS and worst.cosine < 0 else None

    def match(self, name: str) -> Match | None:
        """One of the comparisons by name; None when the expected gradient is zero."""
        return next((m for m in self.matches if m.name == name), None)

    @property
    def verdict(self) -> str:
        if not self.matches:
            if not self.noise:
                return "no gradient at all"
            teacher = "" if self.teacher_in_answers > ZERO else ", and the teacher is not in it"
            return f"noise: the expected gradient is zero{teacher}"
        match = self.follows
        if match is None and self.opposes is not None:
            return f"the opposite of {self.opposes.name}: its sign is wrong, minimising it moves away from the teacher"
        if match is None:
            nearest = self.matches[0]
            return f"none of the known fields; nearest is {nearest.name}, cosine {nearest.cosine:.3f}"
        scaled = "" if abs(match.scale - 1) < 1e-4 else f", times {match.scale:.3g}"
        return f"{match.name}{scaled}"

    def plain(self) -> dict[str, Any]:
        """For JSON. Numbers that are not finite become None."""
        made = asdict(self)
        made["verdict"] = self.verdict
        made["follows"] = self.follows.name if self.follows else None
        made["opposes"] = self.opposes.name if self.opposes else None
        return _finite(made)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
