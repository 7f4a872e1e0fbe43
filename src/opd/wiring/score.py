"""Answers that are already written, scored once and kept: the evidence of any number of later runs."""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from opd.config.checks import ConfigWarning
from opd.config.loading import load_config
from opd.config.objective import DivergenceTerm
from opd.config.reads import evidence, top_k_needed
from opd.config.schema import Config, Scorer
from opd.config.scorers import all_scorers, loaded_as, option_of
from opd.errors import BadInput, ConfigError, DataError
from opd.journal.lock import is_run_folder
from opd.journal.reader import read_config as read_run_config
from opd.models.loading import load_frozen
from opd.reports.progress import RunView
from opd.teachers.as_read import scored_tokens
from opd.teachers.cached_service import CachedService
from opd.teachers.local import LocalTeacher
from opd.teachers.local_service import LocalService
from opd.teachers.residence import resident
from opd.teachers.score_cache import ScoreCache
from opd.teachers.service import Scores, ScoreService
from opd.types import Prompt, Want
from opd.wiring.build import Texts, load_texts, scorer_role
from opd.wiring.score_questions import WrittenAnswers, check_lengths, chunks

RECIPES = (".yaml", ".yml", ".toml", ".json")


@dataclass(frozen=True)
class ScoreSummary:
    """What is known when all answers are scored.

    answers, tokens   of the data, equal ones counted each time.
    mean_logprob      of the answers' tokens under the scorer, nats, over those with a score; None without one.
    coverage          share of tokens with a score.
    asked             answers that the scorer read now; from_cache: those that were there, or came twice.
    size              bytes of the whole folder.
    cut               answers that were longer than sampling.max_tokens, and are scored up to there as they are trained.
    """

    answers: int
    tokens: int
    mean_logprob: float | None
    coverage: float
    asked: int
    from_cache: int
    size: int
    seconds: float
    cut: int
    top_k: int
    fingerprint: str
    folder: str


def score(
    data: str | Path,
    teacher: str | Path,
    *,
    out: str | Path | None = None,
    top_k: int | None = None,
    step: int | None = None,
    scorer: str = "teacher",
    options: Sequence[str] = (),
    console: Console | None = None,
) -> ScoreSummary:
    """Asks a scorer about every answer in `data` and keeps what it says in the folder `out`.

    data      a run folder (its rollouts, of all steps or of `step`), or a .jsonl or .parquet file of rows with
              completions. Read as the student reads them in training: the recipe's or the run's student, prompts and
              sampling.max_tokens, else `student.model=...`.
    teacher   folder or hub name of a model, or a recipe; `scorer` names one of its scorers.
    out       None: `cache.folder` of the recipe's scorer.
    top_k     so many of the scorer's most likely tokens at every position. None: as many as the recipe's terms need.
    options   as on the command line: `teacher.server.kind=vllm`, `teacher.temperature=2`, `columns.prompt=question`.

    What is in the folder already is not asked again: a command that was killed goes on where it was.
    Raises ConfigError, DataError or ModelError before anything is asked when the input cannot work, and
    ServiceUnavailable when a service stayed away; what it said until then is kept.
    """
    began = time.monotonic()
    config = _config(data, teacher, step, options)
    if scorer not in all_scorers(config):
        raise ConfigError(f"--scorer {scorer}: the recipe has no such scorer; it has {', '.join(all_scorers(config))}")
    top_k = _needed(config, scorer) if top_k is None else top_k
    if top_k < 0:
        raise BadInput(f"--top-k is at least 0, it is {top_k}")
    folder = _folder(config, scorer, out)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    texts = load_texts(config)
    found = WrittenAnswers(config, scorer, texts, top_k, Path(data).expanduser())
    questions = list(found.recorded(step) if is_run_folder(found.place) else found.rows())
    if not questions:
        raise DataError(f"{data}: there is nothing to score: no row has an answer (columns completion, messages, text)")
    check_lengths(config, scorer, questions)
    cache = ScoreCache(folder)
    with RunView(console=console or Console(quiet=True)) as view:
        spec = all_scorers(config)[scorer]
        view.start(0, [f"{scorer} {spec.model}", f"{len(questions)} answers of {data}", f"scores in {folder}"])
        view.phase("loading")
        service = make_service(config, scorer, texts, found.prompts[:4], top_k=top_k)
        try:
            cached = CachedService(service, cache, name=scorer, about=about(config, scorer))
            tally = _Tally()
            budget = config.learner.tokens_per_micro_batch if isinstance(service, LocalService) else None
            for chunk in chunks(questions, budget):
                tally.add(cached.ask(chunk))
                view.phase("scoring", tally.answers, len(questions))
        finally:
            cache.close()
            service.close()
    return ScoreSummary(
        answers=tally.answers,
        tokens=tally.tokens,
        mean_logprob=tally.total / tally.valid if tally.valid else None,
        coverage=tally.valid / tally.tokens,
        asked=cached.misses,
        from_cache=cached.hits + cached.shared,
        size=cache.size,
        seconds=time.monotonic() - began,
        cut=found.cut,
        top_k=top_k,
        fingerprint=cached.fingerprint,
        folder=str(folder),
    )


def about(config: Config, name: str) -> dict[str, str]:
    """What tells a scorer from others in a cache where nobody is there to be asked: its model and temperature."""
    scorer = all_scorers(config)[name]
    model = str(loaded_as(config, scorer).model)
    if Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().resolve())
    return {"model": model, "temperature": f"{temperature_of(config, scorer):g}"}


def temperature_of(config: Config, scorer: Scorer) -> float:
    return config.objective.teacher_temperature if scorer.temperature is None else scorer.temperature


def make_service(config: Config, name: str, texts: Texts, prompts: Sequence[Prompt], *, top_k: int = 0) -> ScoreService:
    """Whoever answers for a scorer: a server, or its model in this process; tried out on `prompts`.

    ConfigError where it cannot give `top_k`, ModelError where it knows nothing, ServiceUnavailable where it is not
    there.
    """
    scorer = all_scorers(config)[name]
    if scorer.weights not in ("model", "initial"):
        raise ConfigError(
            f"{option_of(config, name)}.weights is {scorer.weights}: there is nothing to score with before a student "
            "is trained. Name a scorer of its own weights"
        )
    temperature, size = temperature_of(config, scorer), scored_tokens(texts.agreements[name])
    if scorer.server is not None:
        from opd.teachers.served.connect import served_teacher  # its HTTP client is for those who have a server

        return served_teacher(
            name,
            scorer.server,
            str(scorer.model),
            texts.scorers[name],
            texts.agreements[name],
            temperature=temperature,
            vocab_size=size,
            parameter_count=0,  # nobody makes a bill here
            probes=prompts,
            wants=[Want("entries" if top_k else "sampled", frozenset(), top_k=top_k)],
        ).service
    load = functools.partial(load_frozen, loaded_as(config, scorer), size, role=scorer_role(config, name))
    teacher = LocalTeacher(
        resident(load, "none"),
        texts.scorers[name],
        texts.agreements[name],
        name=name,
        temperature=temperature,
        chunk_tokens=config.learner.chunk_tokens,
        share_prompts=config.learner.share_prompts,
    )
    teacher.check(prompts)
    return LocalService(teacher)


# ---- what was asked for -------------------------------------------------------------------------------------------


def _config(data: str | Path, teacher: str | Path, step: int | None, options: Sequence[str]) -> Config:
    """The recipe with the data as its prompts, or a config made of the data and a teacher."""
    place = Path(data).expanduser()
    is_run, is_recipe = is_run_folder(place), Path(teacher).suffix in RECIPES and Path(teacher).is_file()
    if step is not None and not is_run:
        raise ConfigError(f"step={step} is for the folder of a run, and {data} is none")
    if not is_run and place.suffix.removesuffix(".gz") not in (".jsonl", ".parquet"):
        what = "this folder is no run of opd" if place.is_dir() else "a file of answers ends in .jsonl or .parquet"
        raise DataError(f"{data}: {what}" if place.exists() else f"{data} does not exist")
    items = [_long(option, is_run) for option in options]
    source = {"kind": "parquet" if place.suffix == ".parquet" else "jsonl", "path": str(data), "name": "data"}
    base: dict[str, Any] = {}
    if not is_run:
        base["prompts"] = {"sources": [source]}
    if is_recipe:
        laid_over = [f"prompts.sources={json.dumps([source])}"] if not is_run else []
        items = [*laid_over, *items]
    else:
        base |= _of_run(place) if is_run else {}
        base["teacher"] = {"model": str(teacher)}
        if "student" not in base and not any(item.removeprefix("--").startswith("student.model") for item in items):
            raise ConfigError(
                f"{data}: its answers are scored token by token, as the student reads them: name it with "
                "student.model=..., or give its recipe as --teacher recipe.yaml"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)  # about training, which is not what is going to happen
        return load_config([str(teacher)] if is_recipe else [], items, base=base or None).config


def _of_run(place: Path) -> dict[str, Any]:
    """Student, prompts and lengths of the run that wrote the answers."""
    config = read_run_config(place)
    if config is None:
        raise DataError(f"{place}: the run was killed before it wrote its config, so its prompts are not known")
    sampling = {"max_tokens": config["sampling"]["max_tokens"]}
    return {"student": config["student"], "prompts": config["prompts"], "sampling": sampling}


def _long(option: str, is_run: bool) -> str:
    """`columns.prompt=question` in full."""
    if option.removeprefix("--").startswith("columns."):
        if is_run:
            raise ConfigError(f"{option}: nothing reads it: a run's rollouts have no columns to name")
        return f"prompts.sources.0.{option.removeprefix('--')}"
    return option


def _needed(config: Config, name: str) -> int:
    """Of the scorer's most likely tokens, those that the objective's terms compare."""
    terms = [t for t in config.objective.terms if isinstance(t, DivergenceTerm) and name in evidence(t)]
    return max((top_k_needed(term)[0] for term in terms), default=0)


def _folder(config: Config, name: str, out: str | Path | None) -> Path:
    cache = all_scorers(config)[name].cache
    if out is None and cache is None:
        raise ConfigError(f"where are the scores to be kept? --out FOLDER, or {option_of(config, name)}.cache.folder")
    return Path(out if out is not None else cache.folder if cache is not None else "").expanduser()


@dataclass
class _Tally:
    answers: int = 0
    tokens: int = 0
    valid: int = 0
    total: float = 0.0

    def add(self, scores_N: Sequence[Scores]) -> None:
        for scores in scores_N:
            valid_T = np.isfinite(scores.logprobs_T)
            self.answers += 1
            self.tokens += len(valid_T)
            self.valid += int(valid_T.sum())
            self.total += float(scores.logprobs_T[valid_T].sum(dtype=np.float64))
