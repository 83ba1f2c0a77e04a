"""A model folder: read back as it was written, and refused with the file's name whatever is wrong with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lib.data.catalog import Catalog
from lib.errors import InputError
from lib.model.facts import NewcomerShare, RejectedSpan, VersionFacts
from lib.model.folder import (
    FILES,
    MANIFEST,
    Manifest,
    check_file,
    load_model,
    read_manifest,
    save_model,
    write_manifest,
)
from lib.model.version_format import FORMAT, OLDEST_FORMAT, OtherFormat
from tests.helpers.tiny import assert_same_state, copied_state, item_ids, tiny_encoder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    titles = pa.table({"item_id": item_ids(24), "title": [f"Item {number}" for number in range(1, 25)]})
    manifest = Manifest(version=3, parent=2, log_offset=17, metrics={"ndcg@10": 0.25}, facts=VersionFacts(kind="base"))
    save_model(folder, tiny_encoder(), Catalog(item_ids(24), titles), manifest)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


def test_a_model_is_read_as_it_was_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, MANIFEST])
    encoder, catalog, manifest = load_model(folder)
    assert_same_state(copied_state(tiny_encoder()), copied_state(encoder))
    assert catalog.item_ids[1:] == item_ids(24)
    assert catalog.titles["i3"] == "Item 3"
    assert (manifest.version, manifest.parent, manifest.log_offset) == (3, 2, 17)
    assert manifest.metrics == {"ndcg@10": 0.25}
    assert manifest.created > 1_700_000_000_000


def test_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"no folder at .*nowhere; make one with `afterclick pretrain"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named_with_the_remedy(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name}.*pretrain"):
        load_model(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_named_with_the_remedy(folder, name):
    path = folder / name
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 20).tolist():
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{name} is not the file.*restore it or pretrain again"):
            load_model(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=name):
        load_model(folder)


def test_a_truncated_manifest(folder):
    text = (folder / MANIFEST).read_bytes()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        (folder / MANIFEST).write_bytes(text[:length])
        with pytest.raises(InputError, match=rf"{MANIFEST} is damaged .*restore it or pretrain again"):
            read_manifest(folder)


def test_a_flipped_bit_in_the_manifest_is_refused_or_changes_nothing_that_it_says(folder):
    text = (folder / MANIFEST).read_bytes()
    whole = read_manifest(folder)
    refused = 0
    for place in range(len(text)):
        damaged = bytearray(text)
        damaged[place] ^= 1
        (folder / MANIFEST).write_bytes(damaged)
        try:
            manifest = load_model_manifest(folder)
        except InputError:
            refused += 1
            continue
        # it was white space, or the name of a checksum that is then not looked for
        assert manifest.model_dump(exclude={"checksums"}) == whole.model_dump(exclude={"checksums"})
    assert refused > 0.7 * len(text)


def load_model_manifest(folder: Path) -> Manifest:
    """What load_model looks at, without the weights."""
    manifest = read_manifest(folder)
    for name in FILES:
        check_file(folder / name, manifest)
    return manifest


def test_a_manifest_that_was_edited_is_refused(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"log_offset": 17', '"log_offset": 18'))
    with pytest.raises(InputError, match=f"{MANIFEST} was changed"):
        load_model(folder)


def test_a_manifest_of_an_earlier_release_is_read(tmp_path):
    """Its checksum covers names in an order of their own, and one that is unknown now."""
    (tmp_path / MANIFEST).write_text(
        """{
  "version": 7, "parent": 6, "log_offset": 310, "created": 1764400000123, "training": {},
  "metrics": {"ndcg@10": 0.00001, "é": 1.0},
  "facts": {
    "kind": "rollback", "restored": 3, "reason": "it did härm", "rejected": [120, 190], "events_trained": 100,
    "events_rejected": 210, "base": 1, "adopted": 0, "newcomers": [0.1, 17], "created": 1764400000123, "gone": true
  },
  "checksums": {"manifest.json": "a1223d1468082f973a07abf70fce51cc0a56e8e39d3bd7ec452b7ddf14990681"}
}"""
    )
    facts = read_manifest(tmp_path).facts
    assert facts == VersionFacts(
        kind="rollback",
        restored=3,
        reason="it did härm",
        rejected=RejectedSpan(after_offset=120, events=190),
        events_trained=100,
        events_rejected=210,
        base=1,
        adopted=0,
        newcomers=NewcomerShare(usual=0.1, updates=17),
        created=1764400000123,
    )


def test_saving_again_replaces_all_of_it(folder):
    save_model(folder, tiny_encoder(seed=5), Catalog(item_ids(24)), Manifest(version=9))
    encoder, catalog, manifest = load_model(folder)
    assert_same_state(copied_state(tiny_encoder(seed=5)), copied_state(encoder))
    assert catalog.attributes is None
    assert manifest.version == 9


def test_an_interrupted_save_leaves_no_finished_model(folder, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(Catalog, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(folder, tiny_encoder(seed=5), Catalog(item_ids(24)), Manifest())
    with pytest.raises(InputError, match="no finished model"):
        load_model(folder)


def test_a_manifest_may_be_written_again_with_what_was_measured(folder):
    manifest = read_manifest(folder)
    manifest.metrics["recall@10"] = float("nan")  # JSON has no NaN
    write_manifest(folder, manifest)
    assert read_manifest(folder).metrics == {"ndcg@10": 0.25, "recall@10": None}
    load_model(folder)


@pytest.mark.parametrize("number", [None, 0, *range(OLDEST_FORMAT, FORMAT + 2)])
def test_a_manifest_says_which_releases_can_read_it(tmp_path, number):
    save_model(tmp_path, tiny_encoder(), Catalog(item_ids(24)), Manifest(version=7))
    said = json.loads((tmp_path / MANIFEST).read_text())
    assert said.pop("format") == FORMAT
    del said["checksums"][MANIFEST]  # as what another release wrote is whole
    (tmp_path / MANIFEST).write_text(json.dumps(said if number is None else said | {"format": number}))
    if number is None or OLDEST_FORMAT <= number <= FORMAT:
        assert load_model(tmp_path)[2].version == 7
        return
    with pytest.raises(
        OtherFormat, match=rf"manifest\.json has format {number}, .*; install the release that wrote it"
    ):
        load_model(tmp_path)
