"""The exact oracle: tiny autoregressive models whose every answer is written down, in float64.

What an objective's gradient *is* can be computed here, from the definition of the divergence, and compared with what an
estimator gives on average.
"""

from opd.objectives.oracle.estimators import (
    Bias,
    Drawn,
    Estimator,
    Moments,
    all_answers,
    bias,
    expected_gradient,
    moments,
    over_answers,
)
from opd.objectives.oracle.fields import (
    discounted,
    gradient,
    local_field,
    local_objective,
    return_field,
    sequence_field,
    sequence_objective,
)
from opd.objectives.oracle.fixed_points import fixed_point
from opd.objectives.oracle.tabular import Tree, tree

__all__ = [
    "Bias",
    "Drawn",
    "Estimator",
    "Moments",
    "Tree",
    "all_answers",
    "bias",
    "discounted",
    "expected_gradient",
    "fixed_point",
    "gradient",
    "local_field",
    "local_objective",
    "moments",
    "over_answers",
    "return_field",
    "sequence_field",
    "sequence_objective",
    "tree",
]
