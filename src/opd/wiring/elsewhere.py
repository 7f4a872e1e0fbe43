"""Scorers that are not read in this process alone: served elsewhere, or with their scores on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opd.config.objective import DivergenceTerm
from opd.config.reads import evidence, most, top_k_needed
from opd.config.schema import Config, Scorer
from opd.config.scorers import all_scorers, loaded_as
from opd.teachers.as_read import scored_tokens
from opd.teachers.cached_service import CachedService
from opd.teachers.local import LocalTeacher
from opd.teachers.local_service import LocalService
from opd.teachers.score_cache import ScoreCache, check_folder
from opd.teachers.served.served import ServedTeacher
from opd.teachers.service import ScoreService
from opd.types import Prompt, Want
from opd.wiring.build import Texts, config_size, scorer_role
from opd.wiring.score import about, temperature_of

_OUT_OF_A_CACHE = 0.05  # share of tokens without a score that a run bears where no server says its own


def elsewhere(
    config: Config,
    name: str,
    texts: Texts,
    prompts: Sequence[Prompt],
    *,
    local: Callable[[], LocalTeacher],
    on_wait: Callable[[str], None] | None = None,
) -> ServedTeacher:
    """A scorer with a server or a cache, tried out on `prompts`.

    local    loads it, where it is only its scores that are kept.
    on_wait  told in words when the run waits for the server.

    ConfigError where it cannot be asked, or cannot say what the objective wants; ServiceUnavailable where it is away.
    """
    scorer = all_scorers(config)[name]
    fmt, agreement = texts.scorers[name], texts.agreements[name]
    vocab_size, temperature = scored_tokens(agreement), temperature_of(config, scorer)
    want = wanted(config, name)
    service: ScoreService | None = None
    if scorer.server is not None:
        from opd.teachers.served.connect import connect  # its HTTP client is for those who have a server

        service = connect(
            name,
            scorer.server,
            scorer.server.model or str(scorer.model),
            fmt,
            temperature=temperature,
            vocab_size=vocab_size,
            probes=prompts,
            wants=[want],
            on_wait=on_wait,
        )
    elif scorer.cache is not None and not scorer.cache.only:
        service = LocalService(local())
    try:
        asked = service if scorer.cache is None else _kept(config, name, scorer, service)
        assert asked is not None, "a scorer that is read in this process alone"
        teacher = ServedTeacher(
            asked,
            fmt,
            agreement,
            name=name,
            temperature=temperature,
            vocab_size=vocab_size,
            parameter_count=config_size(loaded_as(config, scorer), scorer_role(config, name)).parameters,
            max_invalid=scorer.server.max_invalid if scorer.server is not None else _OUT_OF_A_CACHE,
        )
        teacher.check_wants([want])
    except BaseException:
        if service is not None:
            service.close()
        raise
    return teacher


def check_elsewhere(config: Config, *, dry: bool = False) -> None:
    """What is known of servers and caches before anything is loaded or asked: addresses, keys, folders. ConfigError.

    dry  no folder is made.
    """
    for name, scorer in all_scorers(config).items():
        if scorer.server is not None:
            from opd.teachers.served.connect import address_and_key

            address_and_key(name, scorer.server)
        if scorer.cache is not None and (scorer.cache.only or not dry):
            check_folder(scorer.cache.folder, only=scorer.cache.only)


def wanted(config: Config, name: str) -> Want:
    """The most that any term of the objective asks of a scorer; about which rollouts is of no matter."""
    terms = [term for term in config.objective.terms if name in evidence(term)]
    tops = [top_k_needed(term) for term in terms if isinstance(term, DivergenceTerm)]
    asked = most([evidence(term)[name] for term in terms]) if terms else "sampled"
    return Want(asked, frozenset(), *(max(k) for k in zip((0, 0), *tops, strict=True)))


def _kept(config: Config, name: str, scorer: Scorer, service: ScoreService | None) -> CachedService:
    spec = scorer.cache
    assert spec is not None
    cache = ScoreCache(spec.folder, only=spec.only)
    return CachedService(service, cache, only=spec.only, name=name, about=about(config, name), scorer=spec.scorer)
