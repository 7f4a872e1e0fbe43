"""Writes that hold: a file is the old one or the whole new one, a line is there or not, also after a power cut or on
a full disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opd.errors import OutOfSpace

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TEMPORARY = ".tmp"  # what bears it is half written or half deleted, and never read


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raises OutOfSpace in place of the error of a disk, quota or file-size limit that was reached."""
    try:
        yield
    except OutOfSpace:
        raise
    except Exception as error:
        number = _number(error)
        if number not in FULL:
            raise
        raise OutOfSpace(f"{path} does not fit: {os.strerror(number)}. Make room, then go on: opd resume") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Writes beside `path`, syncs, renames over it and syncs the folder, so that a reader never sees half a file.

    Raises OutOfSpace when it does not fit; the old file stays.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with room_for(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what matters
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)  # the rename itself lives in the folder's own data


def append_line(path: Path, data: bytes) -> None:
    """Appends `data`, a line with its end, as a whole or not at all. An incomplete last line, left by a process that
    was killed, is removed before. Raises OutOfSpace when it does not fit; the file is then as long as it was."""
    with room_for(path), open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as file:
        whole = _mend(file.fileno())
        file.seek(whole)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]  # the part that still fits is written before the error comes
        except BaseException:
            file.truncate(whole)
            raise


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on the disk when this returns."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def discard(path: Path) -> None:
    """Deletes a file, a link (not what it points to) or a folder. A folder that is half deleted bears another name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(TEMPORARY):
        temporary = path.with_name(path.name + TEMPORARY)
        discard(temporary)
        os.replace(path, temporary)
        sync(path.parent)
        path = temporary
    shutil.rmtree(path)


def _mend(opened: int) -> int:
    """The length of a file of lines after its last one has been completed or removed."""
    size = os.lseek(opened, 0, os.SEEK_END)
    if size == 0 or os.pread(opened, 1, size - 1) == b"\n":
        return size
    start, tail = size, b""
    while start and b"\n" not in tail:
        step = min(start, 2**16)
        start -= step
        tail = os.pread(opened, step, start) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    with suppress(ValueError):
        if isinstance(json.loads(torn), dict):  # only the line end is missing
            return size + os.pwrite(opened, b"\n", size)
    os.ftruncate(opened, size - len(torn))
    return size - len(torn)


def _number(error: BaseException | None) -> int:
    """The operating system's error number behind an exception, 0 where there is none; safetensors only spells it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        spelled = re.search(r"\(os error (\d+)\)", str(error))
        if spelled is not None:
            return int(spelled.group(1))
        error = error.__cause__
    return 0
