"""Charts as data: what is drawn is what was measured, however long, broken or hostile it is."""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.reports.page.charts import (
    Reference,
    Series,
    line_chart,
    percent_label,
    score_chart,
    short_count,
    stacked_bar,
)
from opd.reports.page.scales import Scale, ticks_of
from opd.reports.page.thinning import smooth, thin, window_for
from tests.reports.runs import HOSTILE

numbers = st.floats(-1e9, 1e9) | st.none()
SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def paths(svg: str, kind: str) -> list[str]:
    return [p.get("d", "") for p in parse(svg).iter(f"{SVG}path") if (p.get("class") or "").startswith(kind)]


def texts(svg: str) -> list[str]:
    return [t.text or "" for t in parse(svg).iter(f"{SVG}text")]


@given(st.lists(numbers, min_size=1, max_size=300), st.integers(4, 40))
def test_thinning_keeps_ends_extremes_and_gaps(values: list[float | None], most: int) -> None:
    points = [(float(i), y) for i, y in enumerate(values)]
    made = thin(points, most)
    known = [y for y in values if y is not None]
    kept = [y for _, y in made if y is not None]
    assert len(made) <= 2 * most + 4  # a gap in a stretch costs one more
    assert made[0] == points[0] and made[-1] == points[-1]
    assert [x for x, _ in made] == sorted(x for x, _ in made)
    if known:
        assert (min(kept), max(kept)) == (min(known), max(known))
    assert (None in values) == any(y is None for _, y in made)


def test_a_thinned_line_is_broken_where_a_value_is_missing() -> None:
    made = thin([(float(i), None if i == 50 else 1.0) for i in range(101)], 10)
    assert [y for _, y in made].count(None) == 1 and made[0][1] == made[-1][1] == 1.0


def test_a_single_peak_of_ten_thousand_steps_is_still_drawn() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7_777] = (7_777.0, 5.0)
    assert (7_777.0, 5.0) in thin(points, 200)
    chart = line_chart([Series(name="a", points=points, window=window_for(len(points)))], title="t", max_points=240)
    assert len(chart.svg) < 12_000 and len(json.dumps(chart.hover)) < 8_000


@given(st.lists(numbers, max_size=60), st.sampled_from([1, 3, 11]))
def test_smoothing_is_the_mean_of_the_window(values: list[float | None], window: int) -> None:
    made = smooth(values, window)
    for i, value in enumerate(values):
        around = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if v is not None]
        if value is None:
            assert made[i] is None
        else:
            assert made[i] == pytest.approx(sum(around) / len(around), rel=1e-6, abs=1e-3)


def test_a_missing_value_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    ys = [1.0, 2.0, None, 3.0, None, 4.0, 5.0]
    svg = line_chart([Series(name="a", points=list(enumerate(ys)))], title="t").svg
    (curve,) = paths(svg, "curve")
    assert curve.count("M") == 3 and curve.count("L") == 2
    assert len(list(parse(svg).iter(f"{SVG}circle"))) == 1
    only = line_chart([Series(name="a", points=[(1, 0.5)])], title="t").svg
    assert len(list(parse(only).iter(f"{SVG}circle"))) == 1


def test_nothing_measured_says_so() -> None:
    for points in ([], [(1.0, None)]):
        chart = line_chart([Series(name="a", points=points)], title="t")
        assert texts(chart.svg) == ["nothing was measured"] and chart.hover["series"] == []
    assert "nothing was measured" in line_chart([Series(name="a", points=[(1, 0.0)])], title="t", log=True).svg


@given(
    st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=40),
    st.booleans(),
    st.sampled_from([(None, None), (0.0, 1.0)]),
)
def test_every_point_stands_inside_the_picture(ys: list[float], log: bool, limits) -> None:
    ys = [min(y, 1.0) for y in ys] if limits[1] else ys
    svg = line_chart([Series(name="a", points=list(enumerate(ys)))], title="t", log=log, limits=limits).svg
    places = [float(n) for d in paths(svg, "curve") for n in re.findall(r"-?[\d.]+", d)]
    assert all(math.isfinite(n) for n in places)
    assert all(0 <= x <= 390 for x in places[::2]) and all(24 <= y <= 194 for y in places[1::2])
    assert len(set(texts(svg))) >= 3  # at least a label on each axis, and the axis' name


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_inside_and_told_apart(low: float, width: float, about: int) -> None:
    width = max(width, abs(low) * 1e-3)
    scale = Scale(low=low, high=low + width)
    ticks = ticks_of(scale, about)
    values = [value for value, _ in ticks]
    assert 1 <= len(ticks) <= about + 2
    assert all(low - width * 1e-6 <= value <= low + width * (1 + 1e-6) for value in values)
    assert len({label for _, label in ticks}) == len(ticks) or width < 1e-2 * abs(low)


def test_ticks_of_steps_are_whole_and_those_of_magnitudes_are_decades() -> None:
    assert [label for _, label in ticks_of(Scale(low=1, high=3), 5, short_count, whole=True)] == ["1", "2", "3"]
    assert [label for _, label in ticks_of(Scale(low=1e-3, high=10, log=True), 5)] == [
        "0.001",
        "0.01",
        "0.1",
        "1",
        "10",
    ]
    assert [label for _, label in ticks_of(Scale(low=0, high=0.0015), 4)] == ["0", "5e-4", "1e-3", "1.5e-3"]
    assert [percent_label(x) for x in (0, 0.3, 0.125)] == ["0 %", "30 %", "12.5 %"]
    assert [short_count(x) for x in (0, 950, 9000, 1.5e6, 2e12)] == ["0", "950", "9k", "1.5M", "2T"]


def test_a_level_line_looks_level_and_intervals_are_never_cut() -> None:
    scale = Scale.of([100.0, 100.1], least=0.2)
    assert scale.high - scale.low >= 20
    low, high = 0.1, 0.9
    wide = Series(name="a", points=[(0, 0.5), (1, 0.5)], intervals=[(low, high), (0.4, 0.6)], marks=True)
    svg = line_chart([wide], title="t", limits=(0, 1), y_format=percent_label).svg
    whiskers = [e for e in parse(svg).iter(f"{SVG}line") if "whisker" in (e.get("class") or "")]
    spans = [abs(float(e.get("y1", 0)) - float(e.get("y2", 0))) for e in whiskers]
    assert len(whiskers) == 6 and max(spans) == pytest.approx(4 * sorted(spans)[-2], rel=0.02)


def test_a_single_value_stands_on_an_axis_from_zero() -> None:
    def ends(value: float, **given) -> tuple[float, float]:
        scale = Scale.of([value, value], **given)
        return scale.low, scale.high

    assert ends(0.0, exact=True) == (0, 1) and ends(5.0, exact=True) == (0, 5)
    assert ends(0.0) == (0, 1) and ends(8.0) == (0, 10) and ends(-8.0) == (-10, 0)
    assert ends(1.0, limits=(0.0, 1.0)) == ends(0.0, limits=(0.0, 1.0)) == (0, 1)


def test_many_intervals_become_a_band_and_a_reference_has_its_own() -> None:
    points = [(float(i), 0.5) for i in range(50)]
    many = Series(name="a", points=points, intervals=[(0.4, 0.6)] * 50)
    svg = line_chart([many], title="t", references=[Reference(name="teacher", value=0.9, interval=(0.8, 1.0))]).svg
    assert len(paths(svg, "band")) == 1
    bands = [r for r in parse(svg).iter(f"{SVG}rect") if "band" in (r.get("class") or "")]
    assert len(bands) == 1


def test_letters_at_the_ends_of_lines_do_not_lie_on_each_other() -> None:
    series = [Series(name=str(i), points=[(0, 1.0), (9, 2.0)], tag=chr(65 + i), colour=i + 1) for i in range(6)]
    tags = [t for t in parse(line_chart(series, title="t").svg).iter(f"{SVG}text") if "tag" in (t.get("class") or "")]
    heights = sorted(float(t.get("y", 0)) for t in tags)
    assert len(heights) == 6 and all(b - a >= 10 for a, b in itertools.pairwise(heights))


def test_S_6_names_are_text_and_every_drawing_is_well_formed() -> None:
    row = {"mean": 0.5, "low": 0.4, "high": 0.6}
    made = [
        line_chart(
            [Series(name=HOSTILE, points=[(0, 1.0)], tag=HOSTILE)], title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE
        ).svg,
        score_chart([(HOSTILE, row, 1)], title=HOSTILE),
        stacked_bar([(HOSTILE, 1.0, 1)], title=HOSTILE),
    ]
    for svg in made:
        assert {e.tag.removeprefix(SVG) for e in parse(svg).iter()} <= {
            *("svg", "text", "line", "path", "circle", "rect", "title"),
        }
        assert "\x1b" not in svg and "\u202e" not in svg and "style=" not in svg


def test_parts_of_a_bar_add_up() -> None:
    svg = parse(stacked_bar([("a", 3.0, 1), ("b", 1.0, 2)], title="t"))
    widths = [float(r.get("width", 0)) for r in svg.iter(f"{SVG}rect")]
    assert widths == [750.0, 250.0]
    assert stacked_bar([], title="t")
