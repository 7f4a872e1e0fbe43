"""The sorting world: seeded, verifiable, its splits disjoint; tokenizer and configs load like any model on disk."""

from __future__ import annotations

import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.lab.worlds import sorting


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_the_letters_in_order(split):
    for row in sorting.problems(split, 200, seed=3):
        letters = re.fullmatch(r"sort: ([a-z]{8})\n", row["prompt"])
        assert letters is not None
        assert row["answer"] == row["completion"] == "".join(sorted(letters[1]))


def test_no_held_out_answer_is_an_anagram_of_a_training_one():
    # The draw itself hardly ever repeats eight letters, so what is checked is the rule, not one lucky sample.
    assert all(sorting.split_of(row["answer"]) == "train" for row in sorting.problems("train", 3000))
    assert all(sorting.split_of(row["answer"]) == "heldout" for row in sorting.problems("heldout", 300))


def test_rows_follow_from_the_seed_alone():
    assert sorting.problems("train", 50, seed=1) == sorting.problems("train", 80, seed=1)[:50]
    assert sorting.problems("train", 50, seed=1) != sorting.problems("train", 50, seed=2)
    rows = sorting.problems("train", 5000, seed=1)
    assert len({row["prompt"] for row in rows}) == len(rows)
    # The first row of seed 0, written down: weights that were trained on this world stay comparable.
    assert sorting.problems("train", 1)[0]["prompt"] == "sort: uyakqvco\n"


def test_tokenizer_reads_and_writes_every_row_unchanged(tmp_path):
    sorting.tokenizer().save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words.eos_token_id == words.pad_token_id == 0
    assert words.chat_template is None
    for row in sorting.problems("heldout", 20):
        text = row["prompt"] + row["completion"]
        ids = words(text)["input_ids"]
        assert len(ids) == len(text)
        assert words.decode(ids) == text
        assert words.decode([*ids, words.eos_token_id], skip_special_tokens=True) == text
    with pytest.raises(Exception, match="UNK"):
        words("sort: ABC")


@pytest.mark.parametrize(
    "config, parameters", [(sorting.teacher_config(), 243_072), (sorting.student_config(), 108_800)]
)
def test_configs_make_the_stated_models(config, parameters):
    model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == parameters
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.generation_config.eos_token_id == sorting.tokenizer().eos_token_id
