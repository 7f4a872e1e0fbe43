"""What makes the pass: plain torch, or Triton kernels where they can be had and give the same."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from opd.errors import ConfigError
from opd.objectives.kernels import choice
from opd.objectives.kernels.choice import TILED, Kernel, check_kernel, choose_kernel, fault_of
from opd.objectives.kernels.tiled import tiled_look, tiled_loss
from tests import rooms
from tests.learner.kinds import step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there: the kernels are compiled")


@pytest.fixture(autouse=True)
def forget_trials() -> None:
    fault_of.cache_clear()


def wrong_loss(*arguments, **options):
    loss, values = tiled_loss(*arguments, **options)
    return 1.01 * loss, values


def test_auto_is_tiled_off_cuda_and_touches_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    monkeypatch.setattr(choice, "_triton", lambda: pytest.fail("triton was imported"))
    assert choose_kernel("auto", CPU) is TILED
    assert choose_kernel("tiled", CUDA) is TILED


def test_triton_by_name_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    for refused in (lambda: check_kernel("triton"), lambda: choose_kernel("triton", CUDA)):
        with pytest.raises(ConfigError, match=r"pip install 'opd\[triton\]'"):
            refused()
    check_kernel("auto")
    assert choose_kernel("auto", CUDA) is TILED


def test_triton_by_name_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"needs a CUDA device, and student\.device is cpu"):
        choose_kernel("triton", CPU)


def test_a_kernel_that_gives_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_triton", lambda: Kernel("triton", tiled_loss, tiled_look))
    assert fault_of(CPU) is None
    fault_of.cache_clear()
    monkeypatch.setattr(choice, "_triton", lambda: Kernel("triton", wrong_loss, tiled_look))
    assert "its loss is 1.0e-02 of the norm away" in str(fault_of(CPU))


def test_a_kernel_with_a_fault_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is missing shows at the first launch: by itself it costs speed, not the run."""

    def broken(*arguments, **options):
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    monkeypatch.setattr(choice, "_triton", lambda: Kernel("triton", broken, tiled_look))
    monkeypatch.setattr(choice, "fault_of", lambda device: fault_of(CPU))
    assert fault_of(CPU) == "RuntimeError: Failed to find C compiler."
    kernel = choose_kernel("auto", CUDA)
    assert (kernel.name, kernel.loss) == ("tiled", tiled_loss)
    assert "Failed to find C compiler" in str(kernel.note)
    with pytest.raises(ConfigError, match="Failed to find C compiler"):
        choose_kernel("triton", CUDA)


@needs_triton
@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_learner_trains_the_same_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "TRIAL_TOKENS", 2)
    fmt = rooms.prompt_format()
    student, other = rooms.causal(seed=0), rooms.causal("llama", seed=1)
    made = step(rooms.causal(seed=0), fmt)[:2]
    gradients = {}
    for kernel in ("tiled", "triton"):
        learner = rooms.learner(student, {"preset": "reverse_kl"}, learner={"kernel": kernel})
        assert learner.kernel.name == kernel
        learner.gradients(made, rooms.panel(rooms.teacher(other, fmt)).evidence(made))
        gradients[kernel] = rooms.gradient(student)
    assert gradients["tiled"].norm() > 1e-3
    assert rooms.distance(gradients["tiled"], gradients["triton"]) < 1e-5
