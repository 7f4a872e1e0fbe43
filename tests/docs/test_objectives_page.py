"""docs/objectives.md: what it states is what the code gives, what it writes as config is read, what it shows runs."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from opd.config.alignments import Alignment
from opd.config.behaviours import BehaviourKind
from opd.config.loading import load_config
from opd.config.objective import DivergenceTerm, Objective, OutcomeTerm, Reduction
from opd.config.presets import METHODS
from opd.config.schema import Scorer
from opd.config.shapes import FORMULAS
from opd.config.slots import Support, Weighting
from opd.config.targets import Target

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "objectives.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")


@pytest.fixture(scope="module")
def page_maker() -> Any:
    sys.path.insert(0, str(DOCS))
    try:
        import make_objectives_page  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(DOCS))
    return make_objectives_page


def differences(found: str, wanted: str, units: float) -> list[str]:
    """Where two texts differ: in words, or in a number by more than so many units of its last printed digit."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", wanted):
        lines = zip(NUMBER.sub("#", found).splitlines(), NUMBER.sub("#", wanted).splitlines(), strict=False)
        return [f"{a!r} is not {b!r}" for a, b in lines if a != b] or ["one text is longer"]
    pairs = zip(NUMBER.findall(found), NUMBER.findall(wanted), strict=True)
    return [f"{a} is not {b}" for a, b in pairs if abs(float(a) - float(b)) > (units + 1e-6) * last_place(b)]


def last_place(number: str) -> float:
    return 10.0 ** -len(number.partition(".")[2])


def test_the_committed_page_and_its_pictures_are_what_the_script_makes(page_maker: Any) -> None:
    """run `python docs/make_objectives_page.py` when this fails, and look at what changed."""
    for path, text in page_maker.made().items():
        wrong = differences(path.read_text(encoding="utf-8"), text, units=1.0 if path.suffix == ".md" else 2.0)
        assert not wrong, f"{path.name}: {wrong[:5]}"


def test_a_number_that_rotted_and_a_word_that_rotted_are_seen() -> None:
    text = "P_S 0.254 and 12 methods, x=1e-9 at q_2"
    assert differences(text, text, 1.0) == []
    assert differences("P_S 0.255 and 12 methods, x=1e-9 at q_2", text, 1.0) == []
    assert differences("P_S 0.256 and 12 methods, x=1e-9 at q_2", text, 1.0) == ["0.256 is not 0.254"]
    assert differences(text.replace("methods", "presets"), text, 1.0)


def test_a_section_without_a_place_and_a_place_without_a_section_are_refused(page_maker: Any) -> None:
    page = "a\n<!-- made: one -->\nold\n<!-- end -->\nb\n"
    assert page_maker.filled(page, {"one": "new"}) == page.replace("old", "new")
    for sections in ({}, {"one": "", "two": ""}):
        with pytest.raises(ValueError, match="the page has places for"):
            page_maker.filled(page, sections)


def test_what_the_presets_say_is_on_the_page_to_the_letter(page_maker: Any) -> None:
    """Their numbers are settings: one unit of the last digit is another method."""
    methods = page_maker.methods
    for text in (methods.points(), methods.sources(), methods.counts()):
        assert text in PAGE
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) >= set(METHODS)


# ---- config lines ------------------------------------------------------------------------------------------------


def config_lines() -> list[tuple[str, Any]]:
    lines = (line for block in BLOCKS if not block.startswith("objective:") for line in block.splitlines())
    return [next(iter(yaml.safe_load(line).items())) for line in lines]


def test_whole_objectives_load() -> None:
    whole = [yaml.safe_load(block) for block in BLOCKS if block.startswith("objective:")]
    rows = {"prompts": {"sources": [{"kind": "jsonl", "path": "a.jsonl"}]}}
    for block in whole:
        base = {"student": {"model": "s"}, "teacher": {"model": "t"}, **rows}
        assert load_config([base | block]).config.objective.terms
    assert len(whole) == 1


@pytest.mark.parametrize(("slot", "value"), config_lines(), ids=lambda value: str(value)[:40])
def test_every_config_line_is_read(slot: str, value: Any) -> None:
    if slot == "scorers":
        for name, scorer in value.items():
            assert isinstance(name, str) and re.fullmatch("[a-z0-9_]+", name)  # `off` would be false in YAML
            Scorer.model_validate(scorer)
    elif slot == "behaviour":
        Objective.model_validate({slot: value})
    elif slot == "advantage":
        OutcomeTerm.model_validate({"name": "x", slot: value})
    else:
        DivergenceTerm.model_validate({"name": "x", slot: value})


def test_the_slots_are_shown_in_full() -> None:
    """Every choice that the config has is on the page."""
    shown: dict[str, set[Any]] = defaultdict(set)
    for slot, value in config_lines():
        items = value.values() if slot == "scorers" else [value]
        for item in items:
            shown[slot] |= {item.get("kind", item.get("weights"))} if isinstance(item, dict) else {item}
            shown[f"{slot} options"] |= set(item) if isinstance(item, dict) else set()
    tails = {value["tail"] for slot, value in config_lines() if slot == "support" and "tail" in value}
    assert shown["behaviour"] == {*get_args(BehaviourKind), "mixture"}
    assert shown["scorers"] == set(get_args(Scorer.model_fields["weights"].annotation))
    assert shown["target"] == kinds(Target)
    assert shown["shape"] == set(FORMULAS)
    assert shown["support"] == kinds(Support)
    assert tails == {"bucket", "sampled_correction", "renormalise", "drop"}
    assert shown["alignment"] == kinds(Alignment)
    assert shown["importance"] == kinds(Weighting)
    assert shown["reduction"] == set(get_args(Reduction))
    assert shown["advantage"] == set(get_args(OutcomeTerm.model_fields["advantage"].annotation))
    assert shown["advantage_under"] == set(get_args(DivergenceTerm.model_fields["advantage_under"].annotation))
    for slot in ("credit", "tokens"):
        model: Any = DivergenceTerm.model_fields[slot].annotation
        assert shown[f"{slot} options"] == set(model.model_fields), slot
    assert set(shown) >= set(DivergenceTerm.model_fields) - {"kind", "name", "written_by", "domains"}


def kinds(union: Any) -> set[str]:
    return {kind for choice in get_args(union) for kind in get_args(choice.model_fields["kind"].annotation)}


# ---- code and links ----------------------------------------------------------------------------------------------


def test_the_code_runs_and_gives_the_mean_divergence() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)  # the page's own text
    p = names["student_head"](names["hidden_TD"]).softmax(-1)
    q = names["teacher_head"](names["teacher_TD"]).softmax(-1)
    m = (p + q) / 2
    jsd = (p * (p / m).log() + q * (q / m).log()).sum(-1) / 2
    wanted = 4 * jsd.mean()
    torch.testing.assert_close(names["loss"], wanted, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(wanted, names["hidden_TD"])
    torch.testing.assert_close(names["hidden_TD"].grad, gradient, atol=1e-6, rtol=1e-4)


def test_links_and_named_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    missing = [link for link in links if not (DOCS / link).exists()]
    named = re.findall(r"`((?:tests|docs|examples)/[\w/.]+)`", PAGE)
    missing += [name for name in named if not (DOCS.parent / name).exists()]
    assert named and not missing


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors


def test_the_files_that_architecture_names_exist() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = DOCS.parent / "src" / "opd"
    named = set(re.findall(r"`([a-z_]+/[\w/]+(?:\.py|/))`", text))
    assert len(named) > 30
    missing = sorted(name for name in named if not (rooms / name).exists() and not (DOCS.parent / name).exists())
    assert not missing
