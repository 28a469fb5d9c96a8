"""Files and folders that replace what is there whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dti_dist.files import replacing, write_atomically


def make_folder(path: Path, content: str) -> None:
    path.mkdir()
    (path / "a").write_text(content)
    (path / "inner").mkdir()
    (path / "inner" / "b").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_a_file_replaces_what_was_there(tmp_path, there):
    path = tmp_path / "file"
    if there:
        path.write_text("old")
    with replacing(path) as staging:
        staging.write_text("new")
        assert path.exists() == there
        assert not there or path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a full folder"])
def test_a_folder_replaces_what_was_there(tmp_path, there, durable):
    path = tmp_path / "folder"
    if there == "a full folder":
        make_folder(path, "old")
        (path / "only in the old one").write_text("")
    elif there == "an empty folder":
        path.mkdir()
    with replacing(path, durable=durable) as staging:
        make_folder(staging, "new")
    assert names(path) == ["a", "inner"]
    assert (path / "inner" / "b").read_text() == "new"
    assert names(tmp_path) == ["folder"]


def test_the_staging_path_may_lie_in_another_folder(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with replacing(tmp_path / "file", staging_folder=scratch) as staging:
        staging.write_text("new")
        assert staging.parent == scratch
        assert names(tmp_path) == ["scratch"]
    assert (tmp_path / "file").read_text() == "new"
    assert not names(scratch)


@pytest.mark.parametrize("make", [Path.write_text, make_folder], ids=["file", "folder"])
def test_an_error_in_the_block_leaves_the_old_content_and_nothing_else(tmp_path, make):
    path = tmp_path / "path"
    make(path, "old")
    before = {found: found.is_file() and found.read_text() for found in tmp_path.rglob("*")}

    def fail():
        with replacing(path) as staging:
            make(staging, "new")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert {found: found.is_file() and found.read_text() for found in tmp_path.rglob("*")} == before


def test_an_error_before_anything_is_made_is_raised_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="early"), replacing(tmp_path / "path"):
        raise ValueError("early")
    assert not names(tmp_path)


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "path").write_text("a file")
    with pytest.raises(NotADirectoryError), replacing(tmp_path / "path") as staging:
        make_folder(staging, "new")
    assert (tmp_path / "path").read_text() == "a file"
    assert names(tmp_path) == ["path"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    make_folder(path, "old")
    rename = os.rename

    def fail(source, target):
        if "replaced" not in f"{source}{target}":
            raise OSError("no rename")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no rename"), replacing(path) as staging:
        make_folder(staging, "new")
    assert (path / "inner" / "b").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_is_to_be_kept_stays(tmp_path):
    path = tmp_path / "folder"
    for content, expected in [("first", "first"), ("second", "first")]:
        with replacing(path, keep=lambda: (path / "a").read_text() == "first") as staging:
            make_folder(staging, content)
        assert (path / "a").read_text() == expected
    (path / "a").write_text("damaged")
    with replacing(path, keep=lambda: (path / "a").read_text() == "first") as staging:
        make_folder(staging, "third")
    assert (path / "a").read_text() == "third"
    assert names(tmp_path) == ["folder"]


BUILDER = """
import sys
from pathlib import Path
from dti_dist.files import replacing
path = Path(sys.argv[1])
sys.stdin.readline()  # all begin at once
for number in range(100):
    one = path.with_name(f"{path.name}-{number % 10}")
    with replacing(one, keep=lambda: (one / "b").exists()) as staging:
        staging.mkdir()
        for name in "ab":
            (staging / name).write_text("content")
    assert (one / "b").read_text() == "content"
"""


def test_several_processes_may_build_the_same_folder_at_once(tmp_path):
    builders = [
        subprocess.Popen([sys.executable, "-c", BUILDER, tmp_path / "f"], stdin=subprocess.PIPE)
        for _ in range(3)
    ]
    for builder in builders:
        builder.stdin.write(b"\n")
        builder.stdin.close()
    assert [builder.wait() for builder in builders] == [0, 0, 0]
    assert names(tmp_path) == [f"f-{number}" for number in range(10)]
    assert all(names(folder) == ["a", "b"] for folder in tmp_path.iterdir())


def test_a_killed_process_leaves_the_old_content_and_a_staging_path(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    script = f"""
import os, signal
from pathlib import Path
from dti_dist.files import replacing
with replacing(Path({str(path)!r})) as staging:
    staging.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = set(names(tmp_path)) - {"file"}
    assert left.startswith(".file.partial-")


def test_a_small_file_is_flushed_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    seen = []
    fsync = os.fsync

    def noted(handle):
        seen.append((os.readlink(f"/proc/self/fd/{handle}"), path.read_text()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    write_atomically(path, b"new")
    assert path.read_text() == "new"
    (file, before), (folder, after) = seen
    assert ".file.partial-" in file
    assert before == "old"
    assert (folder, after) == (str(tmp_path), "new")
