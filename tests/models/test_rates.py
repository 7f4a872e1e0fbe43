"""Rates of this machine: plausible, remembered, and measured again where what was remembered cannot be read."""

from __future__ import annotations

import json

import pytest
import torch

from opd.models import rates
from opd.models.rates import cache_file, known_rates, rates_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "SECONDS", 0.001)
    monkeypatch.setattr(rates, "NEAR_BYTES", 400_000)
    monkeypatch.setattr(rates, "_CPU_SHAPES", ((64, 64, 64),))


@pytest.fixture
def measured(monkeypatch) -> list[torch.device]:
    """The devices that were measured."""
    found: list[torch.device] = []
    measure = rates.measure
    monkeypatch.setattr(rates, "measure", lambda device: (found.append(device), measure(device))[1])
    return found


def test_rates_are_measured_once_and_come_back_as_they_were(measured):
    assert known_rates(CPU) is None
    first = rates_of(CPU)
    assert known_rates(CPU) == rates_of(CPU) == first and measured == [CPU]
    assert 1e7 < first.products["float32"] < 1e15 and 1e7 < first.memory <= first.near < 1e13 and first.link is None
    assert cache_file().read_text().count("schema_version") == 1
    rates_of(CPU, again=True)
    assert measured == [CPU, CPU]


def test_a_cache_of_another_version_is_not_read(measured):
    rates_of(CPU)
    kept = json.loads(cache_file().read_text())
    cache_file().write_text(json.dumps({**kept, "schema_version": kept["schema_version"] + 1}))
    assert known_rates(CPU) is None


def test_other_threads_are_another_machine(measured):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            rates_of(CPU)
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 2 and len(json.loads(cache_file().read_text())["rates"]) == 2


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"schema_version": 2, "rates": {}}', '{"schema_version": 1}', "\0"])
def test_a_cache_that_cannot_be_read_is_measured_again(measured, text):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(text)
    assert known_rates(CPU) is None
    assert rates_of(CPU) == known_rates(CPU) and len(measured) == 1


def test_an_entry_that_lacks_a_number_is_measured_again(measured):
    rates_of(CPU)
    kept = json.loads(cache_file().read_text())
    for entry in kept["rates"].values():
        del entry["near"]
    cache_file().write_text(json.dumps(kept))
    assert known_rates(CPU) is None and rates_of(CPU) is not None and len(measured) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert rates_of(CPU).memory > 0 and rates_of(CPU).memory > 0 and len(measured) == 2


def test_without_the_variable_the_cache_is_in_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache" / "opd" / "rates.json"
