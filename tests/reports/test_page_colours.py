"""Colours by computation: text can be read (WCAG 2.2, 1.4.3 AA), and the two ends differ for every kind of eye."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from opd.reports.page.base import asset

TEXT = 4.5  # contrast of small text, AA
SCHEMES = ("light", "dark")

# Linear RGB as seen without one kind of cone: Machado, Oliveira and Fernandes (2009), severity 1.
EYES = {
    "all three": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def colours(scheme: str) -> dict[str, np.ndarray]:
    """Variable to linear RGB [3] in one scheme."""
    found: dict[str, np.ndarray] = {}
    for sheet in ("base.css", "tokens.css"):
        light, _, dark = asset(sheet).partition("@media (prefers-color-scheme: dark)")
        dark = dark.split("\n}")[0]
        for part in (light, dark) if scheme == "dark" else (light,):
            for name, value in re.findall(r"--([\w-]+): #([0-9a-f]{6})", part):
                srgb = np.array([int(value[i : i + 2], 16) for i in (0, 2, 4)]) / 255
                found[name] = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return found


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    low, high = sorted(float(c @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* [3], D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    t = xyz / [0.9505, 1.0, 1.089]
    f = np.where(t > 0.008856, np.cbrt(np.maximum(t, 0)), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_on_every_colour_can_be_read(scheme: str):
    c = colours(scheme)
    scale = [f"t-{kind}{level}" for kind, level in product("mpk", range(1, 7))]
    pairs = [(f"{name}-ink", f"{name}-ground") for name in scale]
    pairs += [("t-masked-ink", "t-masked-ground"), ("t-masked-ink", "t-masked-hatch")]
    pairs += [(ink, ground) for ink in ("ink", "soft", "series-2", "focus") for ground in ("ground", "raised")]
    poor = {pair: round(contrast(c[pair[0]], c[pair[1]]), 2) for pair in pairs}
    assert {pair: value for pair, value in poor.items() if value < TEXT} == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_curves_stand_out_from_the_ground(scheme: str):
    c = colours(scheme)
    for series in range(1, 7):
        assert contrast(c[f"series-{series}"], c["ground"]) >= 3  # WCAG 1.4.11, graphical objects


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_less_and_more_differ_for_every_kind_of_eye(scheme: str, eye: str):
    c = {name: lab(np.clip(np.array(EYES[eye]) @ value, 0, 1)) for name, value in colours(scheme).items()}
    for level in range(1, 7):
        apart = float(np.linalg.norm(c[f"t-m{level}-ground"] - c[f"t-p{level}-ground"]))
        assert apart >= (5 if level == 1 else 10), (level, apart)  # 2.3 is just noticeable


@pytest.mark.parametrize("kind", list("mpk"))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scale_moves_away_from_the_ground_step_by_step(scheme: str, kind: str):
    c = colours(scheme)
    lightness = [lab(c[name])[0] for name in ("ground", *(f"t-{kind}{level}-ground" for level in range(1, 7)))]
    steps = np.diff(lightness) * (-1 if scheme == "light" else 1)
    assert (steps > 2).all(), steps
