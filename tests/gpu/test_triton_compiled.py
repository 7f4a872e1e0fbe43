"""The Triton pass compiled, on a CUDA device: `tests/objectives/triton_cases.py`, and the learner's choice."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed: pip install 'opd[triton]'")

from opd.objectives.kernels.choice import choose_kernel, fault_of  # noqa: E402
from tests.objectives.triton_cases import *  # noqa: E402, F403
from tests.objectives.triton_cases import SHAPES, DivergenceTerm, compare, problem, term_rows  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


def test_the_trial_of_this_device_finds_no_fault(device) -> None:
    assert fault_of(device) is None
    assert choose_kernel("auto", device).name == "triton"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rows_of_many_blocks(shape, device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary as it is used, in steps as they are used, with a last one that is not full."""
    from opd.objectives.kernels import triton_launch

    monkeypatch.setattr(triton_launch, "WIDEST", 2048)
    p = problem(device, 9, vocab=151_936 - 7, scale=0.5, softcap=30.0)
    compare(p, term_rows(p, DivergenceTerm(name="x", shape=shape)))
