"""Rules about tokens need what only a whole run knows: which ids are special in the student's tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import opd
from opd.journal.reader import read_metrics, read_rollouts
from tests import tiny

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|bos|>")  # <|im_end|> ends the answers


@pytest.mark.parametrize("rule", ["train", "mask"])
def test_special_tokens_are_masked_in_a_whole_run_where_the_config_says_so(rule: str, tmp_path: Path) -> None:
    """A student that is nearly uniform writes some; what the update trained is counted from the rollouts on disk."""
    student, teacher = tiny.save(tmp_path / "student", scale=1.0), tiny.save(tmp_path / "teacher", "llama", seed=1)
    run = opd.distill(
        student,
        teacher,
        prompts={"sources": [{"kind": "inline", "rows": ["What is 2 + 2?", "hi"]}], "per_step": 2},
        sampling={"samples_per_prompt": 32, "max_tokens": 8},
        objective={"behaviour": "student", "terms": [{"name": "t", "tokens": {"special": rule}}]},
        run={"folder": str(tmp_path / "run"), "steps": 1},
        views={"answers": 0},
        quiet=True,
    )
    words, (line,) = tiny.tokenizer(), read_metrics(run.folder)
    special = words.convert_tokens_to_ids(list(SPECIAL))
    written_T = np.concatenate([row["response_ids"] for row in read_rollouts(run.folder, 1)])
    found = int(np.isin(written_T, special).sum())
    assert found > 3 and (written_T == words.eos_token_id).any()
    lost = found if rule == "mask" else 0
    assert line["term/t/tokens"] == line["trained_tokens"] == len(written_T) - lost
    assert line.get("term/t/masked/special", 0.0) == pytest.approx(lost / len(written_T))
