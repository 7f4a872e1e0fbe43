"""From the config of a served teacher to the teacher, tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from opd.config.servers import Server
from opd.errors import ConfigError
from opd.net.addresses import checked
from opd.net.client import BoundedClient, Limits
from opd.net.keys import Key
from opd.net.waiting import result_of
from opd.teachers.served import fireworks, together
from opd.teachers.served.backend import Backend, Identity
from opd.teachers.served.fireworks import Fireworks
from opd.teachers.served.http_service import HttpService
from opd.teachers.served.own import Own
from opd.teachers.served.probe import Needs, probe
from opd.teachers.served.served import ServedTeacher
from opd.teachers.served.sglang import SGLang
from opd.teachers.served.tinker import Tinker
from opd.teachers.served.together import Together
from opd.teachers.served.vllm import Vllm
from opd.text.agreement import PROBES, Agreement
from opd.text.crossing import Crossing
from opd.text.formats import PromptFormat
from opd.types import Prompt, Want

KEY_VARIABLES = {
    "tinker": "TINKER_API_KEY",
    "fireworks": "FIREWORKS_API_KEY",
    "together": "TOGETHER_API_KEY",
    "opd": "OPD_TEACHER_TOKEN",
}
ADDRESSES = {"fireworks": fireworks.ADDRESS, "together": together.ADDRESS, "tinker": "https://tinker"}
_SEQUENCES = 3
_SHORTEST = 8  # tokens: fewer say little


def served_teacher(
    name: str,
    server: Server,
    model: str,
    fmt: PromptFormat,
    agreement: Agreement | Crossing,
    *,
    temperature: float,
    vocab_size: int,
    parameter_count: int,
    probes: Sequence[Prompt] = (),
    wants: Iterable[Want] = (),
    on_wait: Callable[[str], None] | None = None,
) -> ServedTeacher:
    """Connects, tries the server out, and checks that it can say what the run wants. See `connect` and `ServedTeacher`.

    model            the scorer's: it names the tokenizer, and the model on the server where `server.model` does not.
    vocab_size       tokens that it knows, and the run counts on: `scored_tokens(agreement)`.
    parameter_count  of the served model, for the bill.
    probes           prompts of the run, on which the server is tried out.
    wants            what the run is going to ask; rollouts are of no matter.
    """
    wants = list(wants)
    service = connect(
        name,
        server,
        model,
        fmt,
        temperature=temperature,
        vocab_size=vocab_size,
        probes=probes,
        wants=wants,
        on_wait=on_wait,
    )
    try:
        teacher = ServedTeacher(
            service,
            fmt,
            agreement,
            name=name,
            temperature=temperature,
            vocab_size=vocab_size,
            parameter_count=parameter_count,
            max_invalid=server.max_invalid,
        )
        teacher.check_wants(wants)
    except BaseException:
        service.close()
        raise
    return teacher


def connect(
    name: str,
    server: Server,
    model: str,
    fmt: PromptFormat,
    *,
    temperature: float,
    vocab_size: int,
    probes: Sequence[Prompt] = (),
    wants: Iterable[Want] = (),
    on_wait: Callable[[str], None] | None = None,
) -> HttpService:
    """A server that was tried out. ConfigError where address, key, model or what it answers will not do;
    ServiceUnavailable where it does not answer for a minute."""
    client, backend = _backend(name, server, model, fmt, on_wait)
    try:
        probed = result_of(
            client.submit(
                lambda: probe(
                    backend,
                    _sequences(fmt, probes),
                    vocab_size=vocab_size,
                    temperature=temperature,
                    needs=Needs.of(wants),
                    repeatability=server.repeatability,
                )
            )
        )
        identity = probed.identity
        _same_tokenizer(client.host, identity, fmt, vocab_size)
    except BaseException:
        client.close()
        raise
    weights = f"{server.kind}:{identity.model}" + (f":{identity.fingerprint}" if identity.fingerprint else "")
    return HttpService(
        backend,
        probed,
        name=name,
        fingerprint=f"{weights}-{fmt.fingerprint[:8]}-T{temperature:g}",
        temperature=temperature,
        repeatability=server.repeatability,
    )


def address_and_key(name: str, server: Server) -> tuple[str, Key | None]:
    """Where a server is, and the key for it from the environment. ConfigError where either will not do; asks nobody."""
    kind, option = server.kind, f"{name}: server"
    if server.url is not None:
        url = checked(server.url, f"{option}.url").removesuffix("/v1")
    elif kind in ADDRESSES:
        url = ADDRESSES[kind]
    else:
        raise ConfigError(f"{option}.kind is {kind}, which needs {option}.url: http(s)://host:port")
    variable = server.key_env or KEY_VARIABLES.get(kind)
    key = None if variable is None else Key.from_environment(variable, f"{option}.key_env")
    return url, key


def _backend(
    name: str, server: Server, model: str, fmt: PromptFormat, on_wait: Callable[[str], None] | None
) -> tuple[BoundedClient, Backend]:
    kind = server.kind
    url, key = address_and_key(name, server)
    limits = Limits(
        concurrency=server.concurrency,
        tokens_in_flight=server.tokens_in_flight,
        response_bytes=int(server.response_mb * 1e6),
        timeout=server.timeout,
        patience=server.patience,
    )
    client = BoundedClient(url, limits, key=key, on_wait=on_wait)
    asked = server.model or model
    if kind == "vllm":
        return client, Vllm(client, server.model, model)
    if kind == "sglang":
        return client, SGLang(client, server.model)
    if kind == "fireworks":
        return client, Fireworks(client, asked)
    if kind == "together":
        return client, Together(client, asked, fmt.tokenizer)
    if kind == "tinker":
        assert key is not None
        return client, Tinker(client, asked, key, server.url)
    return client, Own(client, server.model)


def _sequences(fmt: PromptFormat, probes: Sequence[Prompt]) -> list[NDArray[np.int64]]:
    """What the server is tried out on: the run's own prompts as the scorer reads them, short ones behind one another;
    a sentence where there are none."""
    found = [fmt.prompt_ids(prompt.row) for prompt in probes[:_SEQUENCES]]
    long = [ids for ids in found if len(ids) >= _SHORTEST]
    if long or not found:
        return long or [np.array(fmt.tokenizer.encode(PROBES[0]), np.int64)]
    together = np.concatenate(found)
    return [np.tile(together, -(-_SHORTEST // len(together)))]


def _same_tokenizer(host: str, identity: Identity, fmt: PromptFormat, vocab_size: int) -> None:
    ours = fmt.tokenizer
    if identity.tokenizer_hash and identity.tokenizer_hash != ours.fingerprint:
        raise ConfigError(
            f"{host} serves {identity.model}, whose tokenizer is {identity.tokenizer_hash[:12]}, and that of "
            f"{ours.source} is {ours.fingerprint[:12]}: let model name the model that is served"
        )
    if identity.vocab_size is not None and identity.vocab_size < vocab_size:
        raise ConfigError(
            f"{host} knows {identity.vocab_size} tokens, and {vocab_size} are needed: let model name the model that is "
            "served"
        )
