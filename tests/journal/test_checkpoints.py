"""What is found on resume: the newest whole checkpoint, and what is wrong with the others."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from opd.errors import OutOfSpace
from opd.journal import checkpoints as module
from opd.journal.checkpoints import MANIFEST, Checkpoints, Found, Nothing

FILES = ("weights.safetensors", "state.json", "adapter/a.safetensors")


def fill(folder: Path, value: int = 0) -> None:
    save_file({"a": np.full(50, value, np.float32)}, folder / "weights.safetensors")
    (folder / "state.json").write_text(json.dumps({"value": value}))
    (folder / "adapter").mkdir()
    save_file({"b": np.arange(9) + value}, folder / "adapter" / "a.safetensors")


def write(folder: Path, *steps: int) -> Checkpoints:
    made = Checkpoints(folder / "checkpoints")
    for step in steps:
        made.write(step, lambda path, step=step: fill(path, step), {"step": step, "loss": 1 / 3, "seeds": (1, 2**63)})
    return made


def names(made: Checkpoints) -> list[str]:
    return sorted(path.name for path in made.folder.iterdir())


def newest(made: Checkpoints) -> Found:
    found = made.newest_good()
    assert isinstance(found, Found), found
    return found


def forge(folder: Path, **changes: object) -> None:
    """A manifest that somebody wrote who knows how, with a hash that fits."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    manifest.update(changes)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": module._own_hash(manifest)}))


def test_what_is_written_is_found(tmp_path):
    made = write(tmp_path, 9, 40, 1_000_000)
    assert names(made) == ["step_000009", "step_000040", "step_1000000"]
    found = newest(made)
    assert found == Found(
        made.folder / "step_1000000", 1_000_000, {"step": 1_000_000, "loss": 1 / 3, "seeds": [1, 2**63]}, ()
    )
    assert load_file(found.path / "weights.safetensors")["a"].tolist() == [1_000_000] * 50
    manifest = json.loads((found.path / MANIFEST).read_text())
    assert set(manifest["files"]) == set(FILES) and manifest["schema_version"] == 1
    assert manifest["files"]["state.json"]["bytes"] == len('{"value": 1000000}')


def test_nothing_to_find(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").newest_good() == Nothing(())
    made = write(tmp_path, 1)
    (made.folder / "step_000001").rename(made.folder / "step_000001.tmp")
    (made.folder / "notes").mkdir()
    (made.folder / "step_7").mkdir()
    assert made.newest_good() == Nothing(())


# ---- damage -----------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped byte": (
        lambda f: flip(f / "weights.safetensors"),
        r"weights\.safetensors has the sha256 \w{12}.*says",
    ),
    "flipped byte below": (lambda f: flip(f / FILES[2]), r"adapter/a\.safetensors has the sha256"),
    "truncated": (lambda f: os.truncate(f / "state.json", 3), r"state\.json has 3 bytes, its manifest says 13"),
    "deleted": (lambda f: (f / "state.json").unlink(), r"state\.json is missing, which its manifest names"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), r"manifest\.json is missing"),
    "half a manifest": (lambda f: os.truncate(f / MANIFEST, 99), r"manifest\.json is no JSON"),
    "empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), r"manifest\.json is no JSON"),
    "deep manifest": (lambda f: (f / MANIFEST).write_text("[" * 10**5), r"manifest\.json is no JSON"),
    "NaN in the manifest": (lambda f: (f / MANIFEST).write_text('{"a": NaN}'), r"NaN is no number"),
    "another's manifest": (lambda f: (f / MANIFEST).write_text("[]"), r"manifest\.json has no schema_version"),
    "another step's": (lambda f: forge(f, step=20), r"manifest\.json is of step 20, the folder of step 40"),
    "newer": (lambda f: forge(f, schema_version=2), r"has schema 2, this opd reads up to 1; update opd"),
    "no files": (lambda f: forge(f, files=[]), r"lacks facts or files"),
    "file without a hash": (lambda f: forge(f, files={"state.json": 3}), r"state\.json has no bytes and sha256"),
    "a file": (lambda f: (f.rename(f.with_name("x")), f.write_text("")), r"Not a directory"),
    "a link": (lambda f: f.symlink_to(f.rename(f.with_name("x"))), r"it is a link"),
    "link inside": (
        lambda f: (f / "state.json").symlink_to((f / "state.json").rename(f.parent / "x.json")),
        r"state\.json is a link or a device",
    ),
    "pipe inside": (lambda f: os.mkfifo(f / "state2.json"), r"state2\.json is a link or a device"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_R_7_damaged_checkpoint_is_passed_over_and_the_reason_named(tmp_path, name):
    damage, sentence = DAMAGES[name]
    made = write(tmp_path, 20, 40)
    damage(made.folder / "step_000040")
    found = newest(made)
    assert found.step == 20 and len(found.skipped) == 1
    assert found.skipped[0].startswith("checkpoints/step_000040 is passed over: ")
    assert re.search(sentence, found.skipped[0])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_R_7_any_flipped_bit_is_found_or_changes_nothing_that_is_read(tmp_path, data):
    made = Checkpoints(tmp_path / "checkpoints")
    if not made.folder.exists():
        write(tmp_path, 20, 40)
    folder = made.folder / "step_000040"
    path = folder / data.draw(st.sampled_from([*FILES, MANIFEST]))
    whole, facts = path.read_bytes(), newest(made).facts
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    found = newest(made)
    path.write_bytes(whole)
    if found.step == 40:
        assert path.name == MANIFEST and found.facts == facts, "white space between the values"
        assert whole[at : at + 1].isspace()
    else:
        assert found.step == 20 and "step_000040" in found.skipped[0]


def test_R_7_when_all_are_damaged_every_reason_is_kept(tmp_path):
    made = write(tmp_path, 20, 40)
    flip(made.folder / "step_000020" / "state.json")
    (made.folder / "step_000040" / MANIFEST).unlink()
    found = made.newest_good()
    assert isinstance(found, Nothing)
    assert [reason[:23] for reason in found.skipped] == ["checkpoints/step_000040", "checkpoints/step_000020"]


@pytest.mark.parametrize("name", ["rng.pkl", "pytorch_model.bin", "optimizer.pt", "adapter/x.safetensors", "x.json"])
def test_S_3_foreign_file_is_refused(tmp_path, name):
    made = write(tmp_path, 20, 40)
    (made.folder / "step_000040" / name).write_bytes(pickle.dumps({"a": 1}))
    found = newest(made)
    assert found.step == 20
    assert found.skipped == (
        f"checkpoints/step_000040 is passed over: {name} is there, which its manifest does not name",
    )


def test_S_3_pickle_is_refused_also_when_a_manifest_names_it(tmp_path):
    made = write(tmp_path, 20, 40)
    folder = made.folder / "step_000040"
    (folder / "rng.pkl").write_bytes(b"x")
    forge(folder, files={"rng.pkl": {"bytes": 1, "sha256": module._hash(folder / "rng.pkl")}})
    found = newest(made)
    assert found.step == 20 and "rng.pkl is in its manifest, but only .safetensors and .json" in found.skipped[0]


def test_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    made = write(tmp_path, 20, 40)
    (tmp_path / "outside.json").write_text("{}")
    folder = made.folder / "step_000040"
    about = {"bytes": 2, "sha256": module._hash(tmp_path / "outside.json")}
    files = json.loads((folder / MANIFEST).read_text())["files"]
    for name in ("../../outside.json", str(tmp_path / "outside.json")):
        forge(folder, files={**files, name: about})
        found = newest(made)
        assert found.step == 20 and f"{name} is missing" in found.skipped[0]


# ---- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rng.pkl", MANIFEST, "notes"])
def test_S_3_writer_cannot_put_other_files_there(tmp_path, name):
    made = write(tmp_path, 20)
    with pytest.raises(AssertionError, match=name):
        made.write(40, lambda folder: (folder / name).write_bytes(b"{}") and None, {})
    assert names(made) == ["step_000020"]


@pytest.mark.parametrize("facts", [{"loss": float("nan")}, {"path": Path("x")}])
def test_facts_that_json_cannot_hold_are_refused(tmp_path, facts):
    made = write(tmp_path, 20)
    with pytest.raises((ValueError, TypeError)):
        made.write(40, fill, facts)
    assert names(made) == ["step_000020"] and newest(made).step == 20


def test_same_step_again_takes_the_place_of_the_first(tmp_path):
    made = write(tmp_path, 40)
    made.write(40, lambda folder: fill(folder, 7), {"second": True})
    assert names(made) == ["step_000040"]
    assert newest(made).facts == {"second": True}
    (made.folder / "step_000040").rename(tmp_path / "elsewhere")
    (made.folder / "step_000040").symlink_to(tmp_path / "elsewhere")
    made.write(40, fill, {"third": True})
    assert newest(made).facts == {"third": True} and (tmp_path / "elsewhere" / MANIFEST).exists()


def test_R_4_replacement_that_was_killed_half_way_is_finished_or_taken_back(tmp_path):
    made = write(tmp_path, 20, 40)
    (made.folder / "step_000040").rename(made.folder / "step_000040.replaced")  # killed between the two renames
    assert newest(made).path.name == "step_000040.replaced" and newest(made).facts["step"] == 40
    write(tmp_path, 60)
    assert names(made) == ["step_000020", "step_000040", "step_000060"] and newest(made).skipped == ()
    (made.folder / "step_000060").rename(made.folder / "step_000060.replaced")
    (made.folder / "step_000040").rename(made.folder / "step_000060")
    forge(made.folder / "step_000060", step=60, facts={"second": True})  # killed after both
    made.drop_after(60)
    assert names(made) == ["step_000020", "step_000060"] and newest(made).facts == {"second": True}


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt()])
def test_failed_writer_leaves_the_earlier_ones_as_they_were(tmp_path, error):
    def broken(folder: Path) -> None:
        fill(folder)
        raise error

    made = write(tmp_path, 20, 40)
    for step in (40, 60):
        with pytest.raises(type(error)):
            made.write(step, broken, {})
        assert names(made) == ["step_000020", "step_000040"] and newest(made).facts["step"] == 40


def test_failure_between_the_two_renames_takes_the_earlier_one_back(tmp_path, monkeypatch):
    made = write(tmp_path, 40)
    real, calls = os.replace, []

    def broken(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="Input/output"):
        made.write(40, fill, {})
    assert newest(made).facts["step"] == 40 and newest(made).path.name == "step_000040"


def test_room_is_looked_for_before_anything_is_written(tmp_path):
    made = write(tmp_path, 20)
    with pytest.raises(OutOfSpace, match=r"step 40 needs 1000000\.000 GB and .* GB are free") as caught:
        made.write(40, pytest.fail, {}, needed_bytes=10**15)
    assert caught.value.exit_code == 75 and names(made) == ["step_000020"]


def test_R_5_everything_is_on_the_disk_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    made = write(tmp_path, 20)
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(opened: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{opened}"))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), replace(old, new)))
    path = made.write(40, fill, {})
    temporary = str(path) + ".tmp"
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert set(before) == {temporary, f"{temporary}/adapter", *(f"{temporary}/{name}" for name in (*FILES, MANIFEST))}
    assert before[-2:] == [f"{temporary}/{MANIFEST}", temporary], "the manifest last, then the names"
    assert after == [str(made.folder)]


# ---- how many stay ----------------------------------------------------------------------------------------------


def test_R_8_keeping_one_is_refused(tmp_path):
    made = write(tmp_path, 1, 2)
    with pytest.raises(AssertionError, match="damaged"):
        made.retain(1)
    assert len(names(made)) == 2


def test_oldest_go_and_damaged_ones_do_not_count(tmp_path):
    made = write(tmp_path, 1, 2, 3, 4, 5)
    flip(made.folder / "step_000001" / "state.json")
    flip(made.folder / "step_000004" / "state.json")
    (made.folder / "step_000006.tmp").mkdir()
    (made.folder / "notes").mkdir()
    Checkpoints(made.folder).retain(4)
    assert names(made) == ["notes", *(f"step_00000{n}" for n in (1, 2, 3, 4, 5)), "step_000006.tmp"]
    Checkpoints(made.folder).retain(2)
    assert names(made) == ["notes", "step_000003", "step_000004", "step_000005", "step_000006.tmp"]
    made.write(6, fill, {})
    made.retain(2)
    assert names(made) == ["notes", "step_000005", "step_000006"], "the stale .tmp went with the write"


def test_retention_reads_no_checkpoint_twice_but_notices_a_change(tmp_path, monkeypatch):
    made = write(tmp_path, 1, 2, 3)
    read: list[Path] = []
    real = module._hash
    monkeypatch.setattr(module, "_hash", lambda path: (read.append(path), real(path))[1])
    made.retain(3)
    assert not read, "it wrote them itself"
    flip(made.folder / "step_000003" / "state.json")
    made.retain(2)
    assert names(made) == ["step_000001", "step_000002", "step_000003"]
    again = Checkpoints(made.folder)
    again.newest_good()
    read.clear()
    again.retain(2)
    assert {path.parts[-2] for path in read} <= {"step_000001", "step_000003", "adapter"}, "not the one it found"


def test_half_deleted_checkpoint_never_looks_like_one(tmp_path, monkeypatch):
    made = write(tmp_path, 1, 2, 3)

    def killed(folder: Path) -> None:
        os.unlink(folder / "state.json")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            made.retain(2)
    assert names(made) == ["step_000001.tmp", "step_000002", "step_000003"]
    assert newest(made).skipped == ()
    made.drop_after(2)
    assert names(made) == ["step_000002"]
