"""The Triton pass on the host, by Triton's interpreter; and that its kernels compile for devices that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a CUDA device is there: `make test-gpu` compiles these tests for it", allow_module_level=True)
if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'opd[triton]'", allow_module_level=True)

from opd.objectives.kernels.rows import SpanRows, TermRows
from opd.objectives.kernels.tiled import tiled_loss
from tests.objectives.triton_cases import *  # noqa: F403
from tests.objectives.triton_cases import DivergenceTerm, problem, term_rows

# -inf - -inf and 0 * inf occur, and are thrown away afterwards; numpy, which interprets, says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


def test_float64_students_take_the_tiled_pass(device) -> None:
    from opd.objectives.kernels.triton import triton_loss

    p = problem(device, 8)
    hidden = p.hidden_TD.detach().double()
    terms = [term_rows(p, DivergenceTerm(name="x"))]
    options = {"student_temperature": 0.8, "chunk_tokens": 3}
    ours, expected = (f(hidden, p.head, p.rows, terms, p.scorers, **options)[0] for f in (triton_loss, tiled_loss))
    assert ours.dtype == torch.float64
    assert ours.item() == expected.item()


@pytest.mark.parametrize("foreign", [True, False])
def test_scorers_with_another_tokenizer_and_merged_spans_take_the_tiled_pass(device, foreign: bool) -> None:
    from opd.objectives.kernels.triton import triton_loss

    p = problem(device, 8)
    tokens, V = len(p.hidden_TD), p.head.vocab_size
    (scorer, *_), order_V = p.scorers, torch.arange(V)
    head = replace(scorer.head, order_V=order_V) if scorer.head else None
    rows = replace(scorer, index_T=None, known_index_T=None, valid_T=torch.ones(tokens).bool())
    rows = replace(rows, hidden_TD=torch.randn(tokens, head.weight_VD.shape[1] if head else 1))
    if foreign:
        rows = replace(rows, head=head, shared_V=order_V > 2, own_token_T=p.rows.token_T)
    term = DivergenceTerm(name="x", alignment="strict" if foreign else "gold")  # pyright: ignore[reportArgumentType]
    one_T = torch.ones(tokens)
    spans = SpanRows(np.arange(tokens), np.ones(tokens, bool))
    terms = [TermRows(term, one_T, {rows.name: one_T}, unit=True, spans=None if foreign else spans)]
    options = {"student_temperature": 0.8, "chunk_tokens": 3}
    ours, expected = (f(p.hidden_TD, p.head, p.rows, terms, [rows], **options)[0] for f in (triton_loss, tiled_loss))
    assert ours.item() == expected.item() != 0


def test_the_kernels_compile_for_a_device_that_is_not_here(tmp_path: Path) -> None:
    """The interpreter takes Python that the compiler refuses. Nothing is run: that needs a device."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    compiled = subprocess.run(
        [sys.executable, "-m", "tests.objectives.compile_triton", "jsd", "tanh"],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    assert compiled.stdout.count("cubin") == 3 + 2 * 3
