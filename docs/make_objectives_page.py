"""Fills docs/objectives.md with what the presets say and the exact oracle gives, and draws its pictures.

python docs/make_objectives_page.py

Only the text between <!-- made: NAME --> and <!-- end --> is written; the rest of the page is prose.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from measures import estimators, extrapolation, limits, methods, shapes, top_k

DOCS = Path(__file__).parent
PAGE, FIGURES = DOCS / "objectives.md", DOCS / "figures"
SECTION = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def made() -> dict[Path, str]:
    """Every file that this script writes, and what belongs into it."""
    distances = extrapolation.distances()
    sections = {
        "counts": methods.counts(),
        "points": methods.points(),
        "sources": methods.sources(),
        "shapes": shapes.table(),
        "jsd": shapes.jumps(),
        "estimators": estimators.table(),
        "top_k": top_k.table(),
        "extrapolation": extrapolation.table(distances),
        "limits": limits.bullets(distances),
    }
    return {
        PAGE: filled(PAGE.read_text(encoding="utf-8"), sections),
        FIGURES / "shapes.svg": shapes.picture(),
        FIGURES / "jsd.svg": shapes.jsd(),
        FIGURES / "top_k.svg": top_k.picture(),
        FIGURES / "extrapolation.svg": extrapolation.picture(distances),
    }


def filled(page: str, sections: Mapping[str, str]) -> str:
    """The page with its sections; ValueError unless it has a place for each of them, and no other."""
    places = [name for _, name, _ in SECTION.findall(page)]
    if sorted(places) != sorted(sections):
        raise ValueError(f"the page has places for {sorted(places)}, and there are {sorted(sections)}")
    return SECTION.sub(lambda found: f"{found[1]}{sections[found[2]]}\n{found[3]}", page)


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for path, text in made().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS)}")
