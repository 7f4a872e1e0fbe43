"""Checkpoints: a folder for a step is there as a whole, with the sizes and hashes of its files, or it does not count.

step_000040/                manifest.json and what the writer put there: safetensors and JSON, nothing else
step_000040.tmp/            half written or half deleted; removed by the next write
step_000040.replaced/       the earlier one of the same step while the new one takes its place; as good as any

There is no pointer to the newest one: the names and the manifests say it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import OutOfSpace
from opd.journal.atomic import TEMPORARY, discard, room_for, sync

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
KINDS = (".safetensors", ".json")  # a pickle runs code when it is read
REPLACED = ".replaced"


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint. `facts` are its writer's; `skipped` says why newer ones were passed over."""

    path: Path
    step: int
    facts: dict[str, Any]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Nothing:
    """No good checkpoint. `skipped` says what is wrong with each, empty when there is none at all."""

    skipped: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run. Anyone may look; only the holder of the run's lock may write, retain and drop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: dict[Path, object] = {}  # what this process has read in full, and how the files looked then

    def write(
        self, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any], *, needed_bytes: int = 0
    ) -> Path:
        """Writes the checkpoint of `step`; it is on the disk when this returns.

        fill          writes `*.safetensors` and `*.json` files into the folder it is given, also into folders there.
        facts         plain JSON with finite numbers; comes back as JSON holds it (tuples as lists).
        needed_bytes  what `fill` is going to write: looked for beforehand.
        Raises OutOfSpace when it does not fit. After any failure the earlier checkpoints are as they were.
        """
        made = not self.folder.exists()
        with room_for(self.folder):
            self.folder.mkdir(exist_ok=True)
        if made:
            sync(self.folder.parent)
        self._tidy()
        free = shutil.disk_usage(self.folder).free
        if free < needed_bytes:
            raise OutOfSpace(
                f"{self.folder}: the checkpoint of step {step} needs {needed_bytes / 1e9:.3f} GB and {free / 1e9:.3f} "
                f"GB are free. Make room, then go on: opd resume"
            )
        path = self.folder / f"step_{step:06d}"
        temporary, replaced = path.with_name(path.name + TEMPORARY), path.with_name(path.name + REPLACED)
        try:
            with room_for(path):
                temporary.mkdir()
                fill(temporary)
                _seal(temporary, step, facts)
                if os.path.lexists(path):
                    os.replace(path, replaced)
                os.replace(temporary, path)
                sync(self.folder)
        except BaseException:
            discard(temporary)
            if replaced.exists() and not path.exists():
                os.replace(replaced, path)
            raise
        if replaced.exists():
            discard(replaced)
        self._verified[path] = _looks(path)
        return path

    def newest_good(self) -> Found | Nothing:
        """The newest checkpoint whose every file is as its manifest says, and why newer ones are passed over."""
        skipped: list[str] = []
        for step, path in self._all():
            try:
                return Found(path, step, self._verify(path, step), tuple(skipped))
            except (_Damaged, OSError) as damage:
                skipped.append(f"{self.folder.name}/{path.name} is passed over: {damage}")
        return Nothing(tuple(skipped))

    def retain(self, keep: int) -> None:
        """Deletes what is older than the newest `keep` good ones. A damaged one does not count, and ages with them."""
        assert keep >= 2, "the newest might be the one that was damaged"
        good = 0
        for step, path in self._all():
            if good == keep:
                discard(path)
                self._verified.pop(path, None)
            else:
                good += self._is_good(path, step)

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, good or not."""
        self._tidy()
        for later, path in self._all():
            if later > step:
                discard(path)

    def _all(self) -> list[tuple[int, Path]]:
        """Newest first; of one step the finished replacement first."""
        found: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            name = re.fullmatch(rf"step_(\d{{6,}})({re.escape(REPLACED)})?", path.name)
            if name is not None:
                found.append((int(name[1]), 0 if name[2] else 1, path))
        return [(step, path) for step, _, path in sorted(found, reverse=True)]

    def _tidy(self) -> None:
        """Finishes what a killed process left: half-written folders go, a replacement is completed or taken back."""
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if re.fullmatch(rf"step_\d{{6,}}({re.escape(REPLACED)})?{re.escape(TEMPORARY)}", path.name):
                discard(path)
            elif re.fullmatch(rf"step_\d{{6,}}{re.escape(REPLACED)}", path.name):
                place = path.with_name(path.name.removesuffix(REPLACED))
                if self._is_good(place, int(place.name[5:])):
                    discard(path)
                else:
                    discard(place)
                    os.replace(path, place)

    def _is_good(self, path: Path, step: int) -> bool:
        """As `_verify`, but a checkpoint that has not changed since this process read it in full is not read again."""
        try:
            if self._verified.get(path) != _looks(path):
                self._verify(path, step)
        except (_Damaged, OSError):
            return False
        return True

    def _verify(self, path: Path, step: int) -> dict[str, Any]:
        """Reads every file; returns the facts. Raises _Damaged or OSError with what is wrong."""
        looks = _looks(path)
        manifest = _read_manifest(path, step)
        files: dict[str, dict[str, Any]] = manifest["files"]
        there = {name: size for name, size in _files(path) if name != MANIFEST}
        for name in sorted(there.keys() - files.keys()):
            raise _Damaged(f"{name} is there, which its manifest does not name")
        for name, said in files.items():
            if name not in there:
                raise _Damaged(f"{name} is missing, which its manifest names")
            if there[name] != said["bytes"]:
                raise _Damaged(f"{name} has {there[name]:,} bytes, its manifest says {said['bytes']:,}")
        for name, said in files.items():
            found = _hash(path / name)
            if found != said["sha256"]:
                raise _Damaged(f"{name} has the sha256 {found[:12]}..., its manifest says {said['sha256'][:12]}...")
        self._verified[path] = looks
        return manifest["facts"]


class _Damaged(Exception):
    """A clause about a checkpoint that cannot be used."""


def _seal(folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Everything in `folder` is on the disk, then the manifest that names it."""
    files: dict[str, Any] = {}
    for name, size in _files(folder):
        path = folder / name
        assert path.suffix in KINDS and name != MANIFEST, f"{name}: a checkpoint holds {' and '.join(KINDS)} files"
        sync(path)
        files[name] = {"bytes": size, "sha256": _hash(path)}
    for inner in sorted({folder / parent for name in files for parent in Path(name).parents} - {folder}):
        sync(inner)
    body = json.loads(
        _canonical({"schema_version": SCHEMA_VERSION, "step": step, "facts": dict(facts), "files": files})
    )
    with open(folder / MANIFEST, "wb") as file:
        file.write(json.dumps({**body, "sha256": _own_hash(body)}, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def _read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest; its `files` name what is read, and have `bytes` and `sha256`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes(), parse_constant=_refuse)
    except FileNotFoundError:
        raise _Damaged(f"{MANIFEST} is missing") from None
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{MANIFEST} is no JSON ({error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema_version"), int):
        raise _Damaged(f"{MANIFEST} has no schema_version")
    said = manifest.pop("sha256", None)
    found = _own_hash(manifest)
    if found != said:
        raise _Damaged(f"{MANIFEST} has the sha256 {found[:12]}... and says {str(said)[:12]}... itself")
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise _Damaged(
            f"{MANIFEST} has schema {manifest['schema_version']}, this opd reads up to {SCHEMA_VERSION}; update opd"
        )
    if manifest.get("step") != step:
        raise _Damaged(f"{MANIFEST} is of step {manifest.get('step')}, the folder of step {step}")
    if not isinstance(manifest.get("facts"), dict) or not isinstance(manifest.get("files"), dict):
        raise _Damaged(f"{MANIFEST} lacks facts or files")
    for name, said in manifest["files"].items():
        if not name.endswith(KINDS):
            raise _Damaged(f"{name} is in its manifest, but only {' and '.join(KINDS)} files are read")
        if not isinstance(said, dict) or not {"bytes": int, "sha256": str} == {k: type(v) for k, v in said.items()}:
            raise _Damaged(f"{name} has no bytes and sha256 in its manifest")
    return manifest


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _files(folder: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """Relative name (with /) and size of every file; raises _Damaged at anything that is neither file nor folder."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name, about = below + entry.name, entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(about.st_mode):
            yield from _files(Path(entry.path), name + "/")
        elif stat.S_ISREG(about.st_mode):
            yield name, about.st_size
        else:
            raise _Damaged(f"{name} is a link or a device, not a file")


def _looks(folder: Path) -> object:
    """What changes when anything in the folder is changed by way of the file system."""
    if folder.is_symlink():
        raise _Damaged("it is a link, not a folder")
    stats = [(name, (folder / name).stat()) for name, _ in _files(folder)]
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """Of the manifest's content, so that a changed fact is found as well."""
    return hashlib.sha256(_canonical(manifest)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
