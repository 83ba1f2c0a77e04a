"""The versions on storage: whole or not there, loaded to the bit, and on any filesystem that pyarrow knows."""

import os
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from lib.data.catalog import Catalog
from lib.errors import InputError
from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner
from lib.live.settings import LearnerConfig
from lib.model.delta import Delta, DeltaMismatch
from lib.model.encoder import BehaviourEncoder
from lib.model.facts import VersionFacts
from lib.model.folder import MANIFEST, Manifest, load_model, save_model
from lib.model.version_format import FORMAT, ORDERED_LISTS, OtherFormat
from lib.versions.folder import OPTIMIZER_FILE
from lib.versions.registry import Registry
from tests.helpers.learners import recommender_of
from tests.helpers.tiny import (
    COUNTED,
    assert_same_state,
    copied_state,
    history,
    item_ids,
    micro_batch,
    started_registry,
    tiny_encoder,
)

CONFIG = LearnerConfig(negatives=8, gate=GateConfig(held_out_users=0), new_item_users=1, snapshot_every=1000)


class UploadingRegistry(Registry):
    """A registry on a filesystem that is not the local one: the path that object stores take."""

    def __init__(self, location: Path):
        super().__init__(location)
        location.mkdir(exist_ok=True)
        self.store.fs = fs.SubTreeFileSystem(str(location), fs.LocalFileSystem())
        self.store.root, self.store.local = "bucket", False


@pytest.fixture(params=[Registry, UploadingRegistry], ids=["folder", "object store"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    made = request.param(tmp_path / "store")
    made.publish_snapshot(tiny_encoder(), Catalog(item_ids(24)), Manifest(version=1), None)
    return made


def files_of(registry: Registry) -> Path:
    """Where the registry's files lie on this machine's disk."""
    if registry.store.local:
        return Path(registry.store.root)
    assert isinstance(registry.store.fs, fs.SubTreeFileSystem)
    return Path(registry.store.fs.base_path) / registry.store.root


def learn(registry: Registry, updates: int, config: LearnerConfig = CONFIG) -> dict[int, dict]:
    """Publish deltas, each with a new item; the state of every version."""
    learner = NearlineLearner(registry, config)
    states = {learner.version: copied_state(learner.model.encoder)}
    for _ in range(updates):
        number = learner.version
        delta = learner.learn(micro_batch(number * 10, [history([1, 2 + number, f"new{number}"])]))
        assert isinstance(delta, Delta)
        states[delta.version] = copied_state(learner.model.encoder)
    return states


def test_an_empty_registry_has_no_versions(tmp_path):
    empty = Registry(tmp_path / "nothing")
    assert empty.head() is None
    assert empty.oldest() is None
    assert empty.versions() == []
    with pytest.raises(InputError, match="stored are none"):
        empty.load()


def test_any_stored_version_is_loaded_to_the_bit(registry):
    states = learn(registry, 5)
    assert registry.head() == 6
    assert registry.snapshots() == [1]
    assert registry.deltas() == [2, 3, 4, 5, 6]
    for version, state in states.items():
        loaded = registry.load(version)
        assert_same_state(state, copied_state(loaded.encoder))
        assert loaded.version == version
        assert loaded.log_offset == 10 * (version - 1)
        assert loaded.catalog.item_ids[25:] == [f"new{number}" for number in range(1, version)]
    assert registry.load().version == 6


def test_versions_are_listed_with_what_is_known_of_them(registry):
    learn(registry, 2)
    base, *deltas = registry.versions()
    assert (base.version, base.kind, base.facts.kind) == (1, "snapshot", "base")
    assert base.size > 10_000
    assert [(v.version, v.kind, v.log_offset, v.facts.kind) for v in deltas] == [
        (2, "delta", 10, "nearline"),
        (3, "delta", 20, "nearline"),
    ]
    assert all(v.size == len(registry.read_delta(v.version).to_bytes()) for v in deltas)
    assert base.created <= deltas[0].created <= deltas[1].created


@pytest.mark.parametrize("version", [0, 7, -1])
def test_a_version_that_is_not_stored_is_refused(registry, version):
    learn(registry, 2)
    with pytest.raises(InputError, match=rf"version: {version} is not stored .* stored are 1 to 3"):
        registry.load(version)


def test_a_version_is_never_published_twice(registry):
    learn(registry, 1)
    delta = registry.read_delta(2)
    before = (files_of(registry) / "deltas" / "0000000002").read_bytes()
    delta.facts = VersionFacts(events=17)
    with pytest.raises(FileExistsError, match="another learner"):
        registry.publish_delta(delta, {})
    assert (files_of(registry) / "deltas" / "0000000002").read_bytes() == before
    two = NearlineLearner(registry, CONFIG), NearlineLearner(registry, CONFIG)
    two[0].learn(micro_batch(30, [history([1, 2])]))
    with pytest.raises(FileExistsError):
        two[1].learn(micro_batch(30, [history([1, 2])]))


def test_a_snapshot_that_exists_stays_as_it_is(registry):
    registry.publish_snapshot(tiny_encoder(seed=4), Catalog(item_ids(24)), Manifest(version=1), None)
    assert_same_state(copied_state(tiny_encoder()), copied_state(registry.load(1).encoder))


def test_an_unfinished_write_is_not_a_version(registry):
    learn(registry, 1)
    files = files_of(registry)
    (files / "deltas" / ".0000000003.4711").write_bytes(b"half a delta")
    unfinished = files / "snapshots" / "0000000003"
    shutil.copytree(files / "snapshots" / "0000000001", unfinished)
    (unfinished / MANIFEST).unlink()
    (files / "snapshots" / "notes").mkdir()
    (files / "snapshots" / "notes" / MANIFEST).write_text("not ours")
    (files / "snapshots" / "0000000004").write_text("a file, no folder")
    assert registry.head() == 2
    assert registry.load().version == 2
    assert [info.version for info in registry.versions()] == [1, 2]
    assert len(learn(registry, 1)) == 2  # version 3 is free
    learner = NearlineLearner(registry, CONFIG)
    learner.lineage.save_snapshot(learner.model)  # and what was left of the snapshot is replaced
    assert registry.snapshots() == [1, 3]
    assert_same_state(copied_state(learner.model.encoder), copied_state(registry.load(3).encoder))


@pytest.mark.parametrize("survived", range(5))
def test_a_crash_between_the_files_leaves_no_snapshot(registry, monkeypatch, survived):
    learner = NearlineLearner(registry, CONFIG)
    learner.learn(micro_batch(10, [history([1, 2])]))
    path = "lib.durable.sync" if registry.store.local else "lib.versions.store.Store.write"
    module, name = path.rsplit(".", 1)
    work = getattr(pkgutil.resolve_name(module), name)
    done = []

    def crash(*arguments, **named):
        if len(done) == survived:
            raise OSError("killed")
        done.append(work(*arguments, **named))

    with monkeypatch.context() as patch:
        patch.setattr(path, crash)
        with pytest.raises(OSError, match="killed"):
            learner.lineage.save_snapshot(learner.model)
    assert registry.snapshots() == [1]
    assert registry.load().version == 2
    learner.lineage.save_snapshot(learner.model)
    assert registry.snapshots() == [1, 2]
    assert len(list((files_of(registry) / "snapshots" / "0000000002").iterdir())) == 5


def test_writes_leave_no_temporary_files(registry):
    learn(registry, 2)
    assert not [path for path in files_of(registry).rglob("*") if path.name.startswith(".")]


def test_snapshots_in_between_and_pruning(registry):
    config = CONFIG.model_copy(update={"snapshot_every": 2, "keep_bytes": 1})
    states = learn(registry, 8, config)  # snapshots 1, 2, 4, 6, 8; the newest two stay, and the first
    assert registry.snapshots() == [1, 6, 8]
    assert registry.deltas() == [7, 8, 9]
    assert registry.oldest() == 1
    assert [info.version for info in registry.versions()] == [1, 6, 7, 8, 9]
    for version in (1, 6, 7, 8, 9):
        assert_same_state(states[version], copied_state(registry.load(version).encoder))
    with pytest.raises(
        InputError, match=r"^version: 3 is not stored in .* any more, .*keep_bytes\); stored are 1, 6 to 9$"
    ):
        registry.load(3)
    with pytest.raises(InputError, match=r"^version: 10 is not stored in \S+; stored are 1, 6 to 9$"):
        registry.load(10)


def test_what_versions_take_is_bounded_and_the_newest_can_be_loaded(registry):
    snapshot, room = sum(registry.sizes()[0].values()), 600_000
    learner = NearlineLearner(registry, CONFIG.model_copy(update={"keep_bytes": room}))
    largest, (snapshots, deltas) = 0, registry.sizes()
    for number in range(1, 61):
        learner.learn(micro_batch(number, [history([1, 2 + number % 20])]))
        snapshots, deltas = registry.sizes()
        used = sum(snapshots.values()) + sum(deltas.values())
        largest = max(largest, *deltas.values())
        assert used == learner.lineage.retention.used
        assert used <= room + 2 * largest, "a span of deltas ends behind the delta that fills it"
        assert registry.load().version == learner.version
    assert 1 < len(snapshots) <= room / 3 / snapshot + 1
    assert max(snapshots) > min(deltas), "some versions before the newest snapshot can be restored"
    kept = set(snapshots) | set(deltas)
    assert learner.lineage.retention.pruned == 61 - len(kept)
    again = NearlineLearner(registry, learner.config)
    assert again.lineage.retention.used == learner.lineage.retention.used
    assert again.model.checksum == learner.model.checksum


def test_a_snapshot_is_due_when_the_deltas_weigh_as_much(registry):
    snapshot, waiting = sum(registry.sizes()[0].values()), 0
    learner = NearlineLearner(registry, CONFIG.model_copy(update={"keep_bytes": 1}))
    while registry.snapshots() == [1]:
        waiting = sum(registry.sizes()[1].values())
        learner.learn(micro_batch(learner.version * 10, [history([1, 2])]))
    assert waiting < snapshot
    assert waiting + registry.sizes()[1][learner.version] >= snapshot


def test_what_killed_processes_left_is_swept_when_a_learner_starts(registry, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    learn(registry, 1)
    files, whole = files_of(registry), files_of(registry) / "snapshots" / "0000000001"
    shutil.copytree(whole, files / "snapshots" / "0000000007")
    (files / "snapshots" / "0000000007" / MANIFEST).unlink()
    shutil.copytree(whole, files / "snapshots" / ".0000000008.4711")
    for name in (
        "deltas/.0000000003.4711",
        "rejections/.0000000001.4711",
        ".ledger.json.4711",
        ".feedback.sqlite.4711",
    ):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(b"half")
    for name in ("fresh", "abandoned", "whole"):
        shutil.copytree(whole, files / "offers" / name)
        if name != "whole":
            (files / "offers" / name / MANIFEST).unlink()
    for name in ("offers/abandoned", ".ledger.json.4711"):
        os.utime(files / name, (0, 0))
    ended = subprocess.Popen(["true"])
    ended.wait()
    for process in (ended.pid, os.getpid()):
        shutil.copytree(whole, tmp_path / f"afterclick-scratch-{process}-copy")
    learner = NearlineLearner(registry, CONFIG)
    left = sorted(str(path.relative_to(files)) for path in files.rglob("*") if path.name.startswith("."))
    assert left == [".feedback.sqlite.4711"], "another process may be writing it"
    assert registry.store.folders("snapshots") == ["0000000001"]
    assert registry.store.folders("offers") == ["fresh", "whole"]
    assert [path.name for path in tmp_path.glob("afterclick-*")] == [f"afterclick-scratch-{os.getpid()}-copy"]
    assert learner.version == 2


def test_a_snapshot_holds_the_optimiser_and_the_catalog(registry):
    learn(registry, 2)
    learner = NearlineLearner(registry, CONFIG)
    learner.lineage.save_snapshot(learner.model)
    for version in registry.deltas():
        registry.store.fs.delete_file(f"{registry.store.root}/deltas/{version:010d}")
    again = NearlineLearner(registry, CONFIG)
    assert again.version == 3
    assert again.log_offset == 20
    assert again.lineage.events_trained == 2
    assert again.model.checksum == learner.model.checksum
    assert again.model.catalog.item_ids == learner.model.catalog.item_ids
    mine, theirs = learner.model.trainer.optimizer_state(), again.model.trainer.optimizer_state()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 20, 200, -1])
def test_a_damaged_delta_is_named(registry, place):
    learn(registry, 3)
    path = files_of(registry) / "deltas" / "0000000003"
    flip(path, place)
    with pytest.raises(InputError, match=r"deltas/0000000003 is damaged"):
        registry.load(4)
    assert registry.load(2).damage == []
    with pytest.raises(DeltaMismatch):
        registry.read_delta(3)


def test_a_torn_delta_is_named_and_the_newest_whole_version_loaded(registry):
    states = learn(registry, 3)
    path = files_of(registry) / "deltas" / "0000000004"
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"deltas/0000000004 is damaged"):
            registry.load(4)
        loaded = registry.load()
        assert (loaded.version, loaded.log_offset, loaded.facts.events_trained) == (3, 20, 2)
        assert_same_state(states[3], copied_state(loaded.encoder))
        [damage] = loaded.damage
        assert damage.startswith(f"version: {registry.store.root}/deltas/0000000004 is damaged: ")
        kinds = [info.kind for info in registry.versions()]
        assert kinds == ["snapshot", "delta", "delta", "damaged" if length <= 100 else "delta"]  # it reads the header


def test_a_delta_is_not_laid_over_a_version_that_it_does_not_follow(registry):
    learn(registry, 3)
    deltas = files_of(registry) / "deltas"
    (deltas / "0000000003").write_bytes((deltas / "0000000004").read_bytes())
    loaded = registry.load()
    assert loaded.version == 2
    assert "it follows version 3, not 2" in loaded.damage[0]


@pytest.mark.parametrize("name", ["model.safetensors", "catalog.parquet", "config.json", OPTIMIZER_FILE])
def test_a_damaged_or_missing_file_of_a_snapshot_is_named(registry, name):
    states = learn(registry, 1)
    learner = NearlineLearner(registry, CONFIG)
    learner.lineage.save_snapshot(learner.model)
    path = files_of(registry) / "snapshots" / "0000000002" / name
    flip(path, 50)
    for damage in (lambda: None, path.unlink):
        damage()
        loaded = registry.load()  # from the snapshot before it and the delta
        assert loaded.version == 2
        assert_same_state(states[2], copied_state(loaded.encoder))
        assert [name in text for text in loaded.damage] == [True]
    (files_of(registry) / "deltas" / "0000000002").unlink()
    assert registry.load().version == 1
    with pytest.raises(InputError, match=re.escape(name)):
        registry.load(2)


def test_a_damaged_manifest_of_a_snapshot_is_named(registry):
    (files_of(registry) / "snapshots" / "0000000001" / MANIFEST).write_text("{")
    with pytest.raises(InputError, match=MANIFEST):
        registry.load()
    assert [info.kind for info in registry.versions()] == ["damaged"]


def test_a_missing_delta_is_named(registry):
    learn(registry, 3)
    (files_of(registry) / "deltas" / "0000000003").unlink()
    with pytest.raises(InputError, match=r"delta 3 is missing in .* so 4 cannot be made"):
        registry.load(4)
    assert registry.load().version == 2
    with pytest.raises(FileNotFoundError):
        registry.read_delta(3)


def test_a_whole_delta_that_does_not_fit_is_passed_over_as_damage(registry):
    states = learn(registry, 2)
    unfit = registry.read_delta(3)
    unfit.tensors["interest_to_item"] = unfit.tensors["interest_to_item"][:-1]
    (files_of(registry) / "deltas" / "0000000003").write_bytes(unfit.to_bytes({}))
    loaded = registry.load()
    assert loaded.version == 2
    assert_same_state(states[2], copied_state(loaded.encoder))
    assert "interest_to_item is float32 (15, 16)" in loaded.damage[0]


@pytest.mark.parametrize("kind", ["delta", "snapshot"])
def test_versions_of_a_newer_release_are_refused_in_one_line_and_stay(registry, monkeypatch, kind):
    learner = NearlineLearner(registry, CONFIG)
    with monkeypatch.context() as patch:
        for module in ("lib.model.delta", "lib.model.folder"):
            patch.setattr(f"{module}.FORMAT", FORMAT + 1)
        learner.learn(micro_batch(10, [history([1, 2])]))
        if kind == "snapshot":
            learner.lineage.save_snapshot(learner.model)
            (files_of(registry) / "deltas" / "0000000002").unlink()
    refusals = (
        registry.load,
        registry.check_format,
        lambda: registry.load(2),
        lambda: NearlineLearner(registry, CONFIG),  # to go on from version 1 would give up what was learned
    )
    for refused in refusals:
        with pytest.raises(OtherFormat, match=rf"^version: .* has format {FORMAT + 1}, .*; install the release"):
            refused()
    assert [(info.version, info.kind) for info in registry.versions()] == [(1, "snapshot"), (2, "damaged")]
    assert f"has format {FORMAT + 1}" in (registry.versions()[-1].facts.reason or "")
    assert registry.load(1).damage == []


def strengths(encoder: BehaviourEncoder) -> dict[str, np.ndarray]:
    """Return (N, K) how strong the entries of each kind of list are, in their order."""
    assert encoder.counts is not None
    own = encoder.counts.arrays()
    return {
        "next": own["next_counts"],
        "together": own["together_counts"] / np.sqrt(own["events"][own["together_rows"]] + 1),
    }


def in_order(encoder: BehaviourEncoder) -> bool:
    return all((np.diff(own, axis=1) <= 0).all() for own in strengths(encoder).values())


def test_lists_of_an_earlier_release_are_sorted_as_they_are_loaded_and_replicas_stay_equal(tmp_path, monkeypatch):
    def learn_pairs(learner: NearlineLearner, *pairs: tuple[int, int]) -> Delta:
        outcome = learner.learn(micro_batch(learner.log_offset + len(pairs), [history(pair) for pair in pairs]))
        assert isinstance(outcome, Delta)
        return outcome

    with monkeypatch.context() as patch:  # a release whose lists had no order
        for module in ("lib.model.delta", "lib.model.folder"):
            patch.setattr(f"{module}.FORMAT", ORDERED_LISTS - 1)
        patch.setattr("lib.model.item_counts._sort", lambda *_: None)
        registry = started_registry(tmp_path / "store", **COUNTED)
        before = NearlineLearner(registry, CONFIG)
        learn_pairs(before, (1, 2), (1, 3), (5, 6), (5, 7))
        learn_pairs(before, (1, 3), (1, 3), (5, 6), (8, 2))
        before.lineage.save_snapshot(before.model)
        learn_pairs(before, (1, 9), (1, 9), (1, 9), (5, 7), (5, 7))
    assert not in_order(before.model.encoder)
    learner = NearlineLearner(registry, CONFIG)
    assert in_order(learner.model.encoder)
    for name, own in strengths(before.model.encoder).items():
        assert np.array_equal(np.sort(own), np.sort(strengths(learner.model.encoder)[name]))
    model = tmp_path / "store" / "snapshots" / "0000000003"
    assert in_order(load_model(model)[0])

    replica = recommender_of(registry)
    for _ in range(3):  # what goes with 1 changes, and with it how strong the others are, whose lists are as they were
        replica.apply(Delta.from_bytes(learn_pairs(learner, (1, 2), (9, 2), (1, 2)).to_bytes()))
    learned = learner.model.checksum
    assert replica.checksum == learned
    assert [recommender_of(registry).checksum, NearlineLearner(registry, CONFIG).model.checksum] == [learned] * 2
    shutil.rmtree(model)  # from the first version on it is the same
    assert recommender_of(registry).checksum == learned


# ---------------------------------------------------------------------------------------------------------------------
# Where it starts, and where it lies


def test_it_starts_from_a_model_folder_once(tmp_path):
    model = tmp_path / "model"
    save_model(model, tiny_encoder(seed=3), Catalog(item_ids(24)), Manifest(version=1, facts=VersionFacts(kind="base")))
    registry = Registry(tmp_path / "store")
    registry.start_from(model)
    assert registry.load().optimizer is None
    assert_same_state(copied_state(tiny_encoder(seed=3)), copied_state(registry.load().encoder))
    learn(registry, 1)
    save_model(model, tiny_encoder(seed=4), Catalog(item_ids(24)), Manifest(version=1))
    registry.start_from(model)  # versions exist: the model is not looked at
    assert registry.head() == 2
    with pytest.raises(InputError, match="no folder"):
        Registry(tmp_path / "other").start_from(tmp_path / "missing")


def test_a_snapshot_is_a_model_folder(tmp_path):
    registry = started_registry(tmp_path / "store")
    encoder, catalog, manifest = load_model(Path(registry.store.root) / "snapshots" / "0000000001")
    assert_same_state(copied_state(tiny_encoder()), copied_state(encoder))
    assert len(catalog) == 24
    assert manifest.version == 1


def test_a_file_uri_is_the_folder(tmp_path):
    learn(started_registry(tmp_path / "my store"), 1)
    registry = Registry((tmp_path / "my store").as_uri())
    assert registry.store.local
    assert registry.head() == 2
    learn(registry, 1)
    assert Registry(tmp_path / "my store").load().version == 3


def test_an_unknown_kind_of_storage_is_refused():
    with pytest.raises(InputError, match="gopher"):
        Registry("gopher://models/live")
