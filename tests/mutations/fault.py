"""What a seeded fault is: a small change of the source that a test must notice. The list is in the .toml files here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent
SOURCE = TESTS.parent / "src"
LISTS = ("shapes", "supports", "kernel", "weights", "step", "crossing", "rooms")


@dataclass(frozen=True)
class Fault:
    """`old` stands once in the file, and the fault puts `new` there.

    name     what is wrong then.
    file     below src/opd.
    caught   "file::test" below tests/: each of them must fail; one failing case of a parametrised test is enough.
    """

    name: str
    file: str
    old: str
    new: str
    caught: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Below src."""
        return Path("opd") / self.file

    def apply(self, source: Path) -> None:
        """Changes the file in this copy of `src`. ValueError when `old` is not there, or more than once."""
        path = source / self.path
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"fault {self.name!r}: its text stands {count} times in {self.file}, not once: "
                f"{self.old!r}. The source has changed; change the fault with it."
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def listed() -> list[Fault]:
    """All faults, in the order of their files."""
    found = []
    for name in LISTS:
        data = tomllib.loads((HERE / f"{name}.toml").read_text(encoding="utf-8"))
        found += [Fault(**{**entry, "caught": tuple(entry["caught"])}) for entry in data["fault"]]
    return found


FAULTS = listed()
