"""`opd grade`: a planted error is found, every shape of input, several readers, and what is refused before loading."""

from __future__ import annotations

import json
import random
import string
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import opd as package
from opd.errors import ConfigError, DataError, ModelError
from opd.journal.graded import GradedRecord, check, penalty, worst, writer_of
from opd.journal.reader import read_rollouts
from opd.lab.worlds import sorting
from opd.wiring.grade import grade, teacher_names
from tests import crossing, tiny
from tests.cli.test_train import opd, refused

MODELS = Path(sorting.__file__).parents[1] / "demo" / "models"
TEACHER, STUDENT = MODELS / "teacher", MODELS / "student"


# ---- done means 3 ---------------------------------------------------------------------------------------------------


def planted(kind: str, n: int = 200) -> tuple[list[dict[str, str]], list[int]]:
    """Right answers to held-out problems with one wrong step, and where it is: the position is drawn uniformly.

    replaced  one of the eight letters is replaced by another of the 25, drawn uniformly; the rest stays right.
    swapped   a letter and its right neighbour, which differs, change places: the first of the two is the wrong step.
    """
    source = random.Random(f"planted/{kind}")
    rows, places = [], []
    for problem in sorting.problems("heldout", n, seed=7):
        right = problem["answer"]
        if kind == "replaced":
            at = source.randrange(len(right))
            wrong = source.choice([c for c in string.ascii_lowercase if c != right[at]])
            answer = right[:at] + wrong + right[at + 1 :]
        else:
            at = source.choice([n for n in range(len(right) - 1) if right[n] != right[n + 1]])
            answer = right[:at] + right[at + 1] + right[at] + right[at + 2 :]
        rows.append({"prompt": problem["prompt"], "completion": answer})
        places.append(at)
    return rows, places


@cache
def slips(n: int = 200) -> tuple[list[dict[str, str]], list[int]]:
    """The same with errors that the student itself makes: of the answers it draws, letter by letter behind the right
    ones, those with a wrong letter; the first wrong one stays, the rest is right."""
    tokenizer = sorting.tokenizer()
    student = AutoModelForCausalLM.from_pretrained(STUDENT)
    problems = sorting.problems("heldout", 2000, seed=8)
    ids = torch.tensor([tokenizer(p["prompt"] + p["answer"])["input_ids"] for p in problems])
    torch.manual_seed(0)
    with torch.no_grad():
        chances = student(ids).logits[:, -sorting.LETTERS - 1 : -1].softmax(-1)
    chances[..., [i for i, token in enumerate(sorting.ALPHABET) if token not in string.ascii_lowercase]] = 0
    drawn = torch.distributions.Categorical(chances).sample()
    rows, places = [], []
    for problem, letters in zip(problems, drawn.tolist(), strict=True):
        right, written = problem["answer"], "".join(sorting.ALPHABET[i] for i in letters)
        if written != right and len(rows) < n:
            at = next(i for i in range(len(right)) if written[i] != right[i])
            answer = right[:at] + written[at] + right[at + 1 :]
            rows.append({"prompt": problem["prompt"], "completion": answer})
            places.append(at)
    assert len(rows) == n
    return rows, places


def found(record: GradedRecord, places: list[int], student: str | None) -> float:
    """Share of answers whose token of the lowest penalty is the planted one."""
    hits = 0
    for answer, place in zip(record["answers"], places, strict=True):
        values = [value if value is not None else 0.0 for value in penalty(answer, "teacher", student)]
        hits += values.index(min(values)) == place
    return hits / len(places)


def test_the_worst_token_is_the_planted_error_for_the_demos_teacher_alone() -> None:
    rows, places = planted("replaced")
    record = grade(rows, TEACHER, limit=200)
    assert len(record["answers"]) == 200 and found(record, places, None) >= 0.8
    answer = worst(record, 1, "teacher")[0][0]
    assert worst(record, 1, "teacher")[0][1] == places[answer]


def test_text_that_the_student_did_not_write_is_coloured_by_the_teacher_alone_also_beside_it() -> None:
    rows, places = planted("replaced")
    record = grade(rows, TEACHER, STUDENT, limit=200)
    assert writer_of(record) is None and found(record, places, writer_of(record)) >= 0.8
    assert found(record, places, "student") < 0.8, "what neither would write says little about either"
    assert writer_of(grade(rows[:1], TEACHER, STUDENT, student_wrote=True)) == "student"


def test_the_worst_token_is_the_students_own_error_when_it_stands_beside_the_teacher() -> None:
    """Against the student the teacher's view is about text that the student wrote: its own errors are found."""
    rows, places = slips()
    record = grade(rows, TEACHER, STUDENT, limit=200)
    assert found(record, places, "student") >= 0.9 and found(record, places, None) >= 0.9


# ---- shapes of input ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str, str]:
    """A student and a teacher that speak ChatML, and one with other words."""
    folder = tmp_path_factory.mktemp("grade")
    other = crossing.save(folder / "other", "unigram", seed=2, max_position_embeddings=512)
    return tiny.save(folder / "student", seed=0), tiny.save(folder / "teacher", "llama", seed=1, scale=10.0), other


def test_a_chat_is_graded_turn_by_turn_with_the_context_of_each(models) -> None:
    student, teacher, _ = models
    chat = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "2 + 2 = 4"},
        {"role": "user", "content": "and 3 + 3?"},
        {"role": "assistant", "content": "7"},
    ]
    record = check(package.grade(chat, teacher, student, top_k=2))
    first, second = record["answers"]
    assert (first["turn"], second["turn"]) == (0, 1) and "and 3" not in first["prompt"]
    assert first["prompt"].endswith("<|im_start|>assistant\n") and "2 + 2 = 4<|im_end|>" in second["prompt"]
    assert "".join(second["pieces"]) == "7<|im_end|>" and second["finish_reason"] == "stop"
    assert record["student"] == "student" and list(second.get("reverse_kl", {})) == ["teacher"]
    assert record["readers"]["teacher"]["model"] == teacher
    alone = package.grade({"messages": chat[:2]}, teacher)["answers"][0]
    assert alone["logprobs"]["teacher"] == pytest.approx(first["logprobs"]["teacher"], abs=2e-4)
    system = ["teacher.format.system_prompt=Be brief."]
    with_system = package.grade({"messages": chat[:2]}, teacher, options=system)["answers"][0]
    assert "Be brief." in with_system["prompt"] and with_system["logprobs"] != alone["logprobs"]


def test_raw_text_is_graded_without_an_end_of_ours(models) -> None:
    (answer,) = grade({"text": "the quick brown fox <|im_end|>"}, models[1])["answers"]
    assert "".join(answer["pieces"]) == "the quick brown fox <|im_end|>" and answer["finish_reason"] is None
    assert answer["ids"][-1] != 2, "what the text says about an end is text"
    text = "sort: abc\n"  # ends in what is made the end token here
    options = ['teacher.format.end_tokens=["\\n"]']
    for given in (text, text.strip()):
        (answer,) = grade({"text": given}, TEACHER, options=options)["answers"]
        assert "".join(answer["pieces"]) == given


def test_several_teachers_read_the_same_tokens_each_with_its_own_options(models) -> None:
    student, teacher, _ = models
    pair = {"prompt": "What is 2 + 2?", "completion": "4"}
    options = ["big.format.system_prompt=Think.", "teacher.dtype=float32", "learner.chunk_tokens=2"]
    record = check(grade(pair, {"big": teacher, "small": student}, options=options))
    assert record["teachers"] == ["big", "small"] and record["student"] is None
    (answer,) = record["answers"]
    assert len(answer["logprobs"]["big"]) == len(answer["logprobs"]["small"]) == len(answer["ids"])
    plain = grade(pair, {"small": student})["answers"][0]
    assert plain["logprobs"]["small"] == pytest.approx(answer["logprobs"]["small"], abs=2e-4)


def test_a_teacher_with_another_tokenizer_reads_the_text_in_tokens_of_its_own(models, tmp_path: Path) -> None:
    student, teacher, other = models
    pair = {"prompt": "What is 2 + 2?", "completion": "the answer is 12, again and again"}
    page = tmp_path / "page.html"
    record = check(grade(pair, {"big": teacher, "odd": other}, student, student_wrote=True, out=page))
    (answer,) = record["answers"]
    alone = check(grade(pair, {"big": teacher}, student))["answers"][0]
    assert answer["ids"] == alone["ids"] and answer["logprobs"]["big"] == alone["logprobs"]["big"]
    covered = record["readers"]["odd"].get("crossed")
    assert covered is not None and covered["coverage"] == 1 and 0 < covered["same"] < 1
    # The same text read by it alone, in its own tokens: the same log-probability of the whole.
    (own,) = check(grade(pair, {"odd": other}))["answers"]
    assert len(own["ids"]) != len(answer["ids"])
    whole = [sum(values) for values in (answer["logprobs"]["odd"], own["logprobs"]["odd"])]  # pyright: ignore
    assert whole[0] == pytest.approx(whole[1], abs=0.01)
    assert [piece for span in answer.get("own", {})["odd"] for _, piece, _ in span] == own["pieces"]
    assert "odd has another tokenizer" in page.read_text()
    first = grade(pair, {"odd": other, "big": teacher})
    assert first["answers"][0]["ids"] == own["ids"] and "crossed" in first["readers"]["big"], "the first one's tokens"
    raw = check(grade({"text": "the quick brown fox"}, {"big": teacher, "odd": other}))["answers"][0]
    assert None not in raw["logprobs"]["odd"] and raw["finish_reason"] is None


def test_A_2_A_12_a_run_is_read_by_a_teacher_with_another_tokenizer_behind_its_own_prompts(
    models, tmp_path: Path
) -> None:
    student, teacher, other = models
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("What is 2 + 2?", "hi")))
    run = package.distill(
        student,
        teacher,
        prompts={"sources": [{"kind": "jsonl", "path": str(source)}], "per_step": 2},
        sampling={"max_tokens": 6, "samples_per_prompt": 2},
        run={"folder": str(tmp_path / "run"), "steps": 1, "threads": 1},
        views={"answers": 0},
        quiet=True,
    )
    lines = list(read_rollouts(run.folder, 1))
    options = ["teacher.format.system_prompt=Be brief."]
    record = check(grade(run.folder, other, student, options=options))
    assert [answer["ids"] for answer in record["answers"]] == [line["response_ids"] for line in lines]
    told = grade(run.folder, other, student)
    assert told["answers"][0]["logprobs"]["teacher"] != record["answers"][0]["logprobs"]["teacher"]
    with pytest.raises(DataError, match=r"another tokenizer\. Name that student"):
        grade(run.folder, other)
    changed = [{"prompt": "What is 3 + 3?"}, {"prompt": "hi"}]
    for rows, why in ((changed, "is another one there now"), (changed[1:], "needs the rows.*prompt and completion")):
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=why):
            grade(run.folder, other, student)
    source.unlink()
    with pytest.raises(DataError, match=r"needs the rows"):
        grade(run.folder, other, student)


def test_A_13_ids_that_no_encoder_would_give_are_graded_as_they_are_written(models, tmp_path: Path) -> None:
    """A student's own answers are not the tokens that its text would get."""
    student, _, other = models
    run = package.distill(
        student,
        student,
        prompts={"sources": [{"kind": "inline", "rows": ["hi"]}], "per_step": 1},
        sampling={"max_tokens": 24, "samples_per_prompt": 4},
        run={"folder": str(tmp_path / "run"), "steps": 1, "threads": 1},
        views={"answers": 0},
        quiet=True,
    )
    record = check(grade(run.folder, other, student))
    lines = {line["id"]: line for line in read_rollouts(run.folder, 1)}
    words = tiny.tokenizer()
    drifted = [
        answer for answer in record["answers"] if words(lines[answer["id"]]["response"])["input_ids"] != answer["ids"]
    ]
    assert drifted
    for answer in drifted:
        unread = [t for t, span in enumerate(answer.get("spans", {})["teacher"]) if span < 0]
        assert [t for t, value in enumerate(answer["logprobs"]["teacher"]) if value is None] == unread
        assert len(unread) < len(answer["ids"])


def test_a_runs_rollouts_are_read_with_their_recorded_ids(models, tmp_path: Path) -> None:
    student, teacher, _ = models
    run = package.distill(
        student,
        teacher,
        prompts={"sources": [{"kind": "inline", "rows": ["What is 2 + 2?", "hi"]}], "per_step": 2},
        sampling={"max_tokens": 6, "samples_per_prompt": 2},
        optim={"lr": 1e-2},
        run={"folder": str(tmp_path / "run"), "steps": 2, "threads": 1},
        views={"answers": 0},
        quiet=True,
    )
    first = list(read_rollouts(run.folder, 1))
    record = check(grade(run.folder, teacher, student, step=1, limit=3))
    assert [answer["ids"] for answer in record["answers"]] == [line["response_ids"] for line in first[:3]]
    assert [answer["id"] for answer in record["answers"]] == [line["id"] for line in first[:3]]
    for answer, line in zip(record["answers"], first, strict=False):
        # Step 1 was written by the student as it was given, at temperature 1: these are its own log-probabilities.
        assert answer["logprobs"]["student"] == pytest.approx(line["behaviour_logprobs"], abs=1e-3)
        assert answer["prompt"] == line["prompt"] and answer["finish_reason"] == line["finish_reason"]
    last = grade(str(run.folder), teacher)
    assert last["title"] == "run"
    assert [answer["id"] for answer in last["answers"]] == [line["id"] for line in read_rollouts(run.folder, 2)]
    with pytest.raises(DataError, match="another tokenizer"):
        grade(run.folder, TEACHER)


# ---- what is refused, before anything is loaded ---------------------------------------------------------------------


def test_nothing_is_loaded_for_what_cannot_be_read(models, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("opd.wiring.grade.load_frozen", lambda *_, **__: pytest.fail("weights were loaded"))
    teacher = models[1]
    pair = {"prompt": "What is 2 + 2?", "completion": "4"}
    positions = AutoModelForCausalLM.from_pretrained(TEACHER).config.max_position_embeddings
    long = [{"prompt": "sort: abc\n", "completion": "abc"}, {"prompt": "sort: a\n", "completion": "a" * positions}]
    with pytest.raises(DataError, match=rf"row transcript/1: .*has {positions}"):
        grade(long, TEACHER)
    with pytest.raises(DataError, match="cannot encode"):
        grade({"prompt": "sort: abc\n", "completion": "ABC"}, TEACHER)
    with pytest.raises(ModelError, match=r"big\.model.*nowhere"):
        grade(pair, {"big": "./nowhere"})
    with pytest.raises(ConfigError, match="dtyp"):
        grade(pair, teacher, options=["teacher.dtyp=float32"])
    for options in (["teacher.dtype=float8"], ["student.dtype=float32"], ["optim.lr=1"], ["teacher.adapter_off=true"]):
        with pytest.raises(ConfigError, match=options[0].split("=")[0]):
            grade(pair, teacher, options=options)
    with pytest.raises(ConfigError, match="student"):
        grade(pair, {"student": teacher})
    (tmp_path / "page.json").write_text(json.dumps(pair))
    with pytest.raises(ValueError, match="would replace the transcript"):
        grade(tmp_path / "page.json", teacher, out=tmp_path / "page.html")
    with pytest.raises(ValueError, match="there is no student"):
        grade(pair, teacher, student_wrote=True)
    with monkeypatch.context() as locked, pytest.raises(ValueError, match="cannot be written to"):
        locked.setattr(
            "opd.wiring.grade.os.access", lambda path, how: Path(path) != tmp_path
        )  # root may write anywhere
        grade(pair, teacher, out=tmp_path / "graded.html")
    for out in ("page.txt", "nowhere/page.html"):
        with pytest.raises(ValueError, match="page"):
            grade(pair, teacher, out=tmp_path / out)


def test_teachers_on_the_command_line_have_names() -> None:
    assert teacher_names(["a/b"]) == {"teacher": "a/b"}
    assert teacher_names(["a/b", "small=c/d"]) == {"b": "a/b", "small": "c/d"}
    with pytest.raises(ConfigError, match="NAME=MODEL"):
        teacher_names(["a/b", "c/b"])


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page_and_its_twin_and_shows_the_worst_token(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answers.jsonl").write_text(json.dumps({"prompt": "sort: hqzaobkc\n", "completion": "abchkxqz"}) + "\n")
    assert opd("grade", "answers.jsonl", "--teacher", str(TEACHER), "--top-k", "2", "run.threads=1") == 0
    printed = capsys.readouterr().out
    assert "abchk[x" in printed and 'would write "o"' in printed and "wrote graded.html and graded.json" in printed
    record = check(json.loads(Path("graded.json").read_text()))
    assert [len(row) for row in record["answers"][0]["top"]["teacher"]] == [2] * 9
    assert "<html" in Path("graded.html").read_text().lower()
    assert worst(record, 1, "teacher")[0][1] == 5
    arguments = ("answers.jsonl", "--teacher", f"big={TEACHER}", "--student", str(STUDENT), "--out", "b.html")
    assert opd("grade", *arguments, "--big.dtype", "float32") == 0
    assert "log q + entropy" in capsys.readouterr().out, "somebody else wrote this file"
    assert worst(check(json.loads(Path("b.json").read_text())), 1, "big")[0][1] == 5
    assert opd("grade", *arguments, "--student-wrote") == 0
    assert "log q - log p" in capsys.readouterr().out
    assert check(json.loads(Path("b.json").read_text()))["teachers"] == ["big"]


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys) -> None:
    text = tmp_path / "a.txt"
    text.write_text("sort: abc\n")
    assert "No such file" in refused(capsys, "grade", "nothing.txt", "--teacher", str(TEACHER))
    assert "step" in refused(capsys, "grade", str(text), "--teacher", str(TEACHER), "step=x")
    assert "one transcript" in refused(capsys, "grade", str(text), "more.txt", "--teacher", str(TEACHER))
