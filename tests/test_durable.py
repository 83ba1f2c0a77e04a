"""Files that are there whole or not at all."""

import os

import pytest

from lib import durable
from lib.durable import make_durably, rename_durably, write_durably


def test_a_file_is_written_with_the_folders_on_the_way_and_replaced(tmp_path):
    path = tmp_path / "new" / "file"
    write_durably(path, b"one")
    write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_that_must_be_new_is_not_replaced(tmp_path):
    write_durably(tmp_path / "file", b"one", replace=False)
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "file", b"two", replace=False)
    assert (tmp_path / "file").read_bytes() == b"one"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "unfinished" / "inner").mkdir(parents=True)
    (tmp_path / "unfinished" / "inner" / "file").write_bytes(b"one")
    synced = []
    monkeypatch.setattr(durable, "sync", lambda path: synced.append(path.name))
    rename_durably(tmp_path / "unfinished", tmp_path / "folder")
    assert sorted(synced[:2]) == ["file", "inner"]
    assert synced[2:] == ["unfinished", tmp_path.name]
    assert (tmp_path / "folder" / "inner" / "file").read_bytes() == b"one"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def fail(unfinished):
        unfinished.write_bytes(b"half")
        raise OSError("the disk is full")

    write_durably(tmp_path / "file", b"old")
    with pytest.raises(OSError, match="the disk is full"):
        make_durably(tmp_path / "file", fail)
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_file_and_folder_are_synced_in_this_order(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(durable, "sync", lambda path: calls.append(path.is_dir()))
    rename = os.rename
    monkeypatch.setattr("pathlib.Path.rename", lambda own, to: (calls.append("rename"), rename(own, to)))
    write_durably(tmp_path / "file", b"one")
    assert calls == [False, "rename", True]
