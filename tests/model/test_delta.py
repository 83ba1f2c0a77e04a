"""Snapshots, deltas and fingerprints: two copies are equal to the bit, or it is noticed."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lib.model.delta import (
    NO_ROWS,
    OPTIMIZER_PREFIX,
    ROW_TENSORS,
    Delta,
    DeltaMismatch,
    apply_delta,
    difference,
    grow_items,
    state_of,
)
from lib.model.encoder import BehaviourEncoder
from lib.model.facts import NewcomerShare, RejectedSpan, VersionFacts
from lib.model.fingerprint import Fingerprint, fingerprint
from lib.model.item_counts import COUNT_TENSORS
from lib.model.version_format import FORMAT, OLDEST_FORMAT, OtherFormat
from tests.helpers.tiny import assert_same_state, copied_state, tiny_encoder


def changed(encoder: BehaviourEncoder, seed: int, rows: list[int], dense: bool, item_rows: int | None = None) -> Delta:
    """Change an encoder at random and say how."""
    random = torch.Generator().manual_seed(seed)
    before = tiny_encoder()
    grow_items(before, encoder.config.item_rows)
    before.load_state_dict(copied_state(encoder))
    grow_items(encoder, item_rows or encoder.config.item_rows)
    grow_items(before, encoder.config.item_rows)
    with torch.no_grad():
        encoder.item_embeddings.weight[rows] += torch.randn(len(rows), 16, generator=random)
        encoder.item_popularity[rows] += torch.rand(len(rows), generator=random)
        if dense:
            encoder.interest_to_item.add_(torch.randn(16, 16, generator=random))
            encoder.popularity_reference += seed
    found, tensors = difference(before, state_of(encoder))
    return Delta(seed + 1, seed, fingerprint(encoder), seed * 10, encoder.config.item_rows, found, tensors)


@pytest.fixture
def delta() -> Delta:
    made = changed(tiny_encoder(), 1, [2, 5], dense=True)
    made.new_items, made.facts = ["ä", 'quote"'], VersionFacts(loss=1.5, kind="nearline")
    return made


def test_a_delta_survives_its_bytes(delta):
    read = Delta.from_bytes(delta.to_bytes())
    assert {**vars(read), "rows": 0, "count_rows": 0, "tensors": 0} == {
        **vars(delta),
        "rows": 0,
        "count_rows": 0,
        "tensors": 0,
    }
    assert np.array_equal(read.rows, delta.rows)
    assert read.tensors.keys() == delta.tensors.keys()
    for name, values in delta.tensors.items():
        assert read.tensors[name].dtype == values.dtype
        assert np.array_equal(read.tensors[name], values)


def test_what_a_delta_says_of_itself_is_plain_json(delta):
    delta.facts = VersionFacts(kind="rollback", rejected=RejectedSpan(3, 4), loss=None, newcomers=NewcomerShare(0.5, 2))
    data = delta.to_bytes()
    length = int.from_bytes(data[:8], "little")
    facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["delta"])["facts"]
    assert facts == {"kind": "rollback", "rejected": [3, 4], "loss": None, "newcomers": [0.5, 2]}


def test_a_delta_holds_what_changed_and_nothing_else(delta):
    assert delta.rows.tolist() == [2, 5]
    assert set(delta.tensors) == {*ROW_TENSORS, "interest_to_item", "popularity_reference"}
    assert delta.tensors["item_embeddings.weight"].shape == (2, 16)
    small = changed(tiny_encoder(), 1, [3], dense=False)
    assert set(small.tensors) == set(ROW_TENSORS)
    assert len(small.to_bytes()) < 1200


def test_the_optimisers_state_goes_to_storage_and_not_to_the_replicas(delta):
    moments = {"rows.first": np.ones((2, 16), np.float32), "steps": np.array([7]), "scalar": np.array(2.0, np.float32)}
    stored = Delta.from_bytes(delta.to_bytes(moments))
    for name, values in moments.items():
        assert np.array_equal(stored.tensors[OPTIMIZER_PREFIX + name], values)
        assert stored.tensors[OPTIMIZER_PREFIX + name].shape == values.shape
    assert not any(name.startswith(OPTIMIZER_PREFIX) for name in Delta.from_bytes(delta.to_bytes()).tensors)
    encoder = tiny_encoder()
    apply_delta(encoder, stored)  # takes the weights alone
    assert fingerprint(encoder) == delta.checksum


def test_a_snapshot_and_its_deltas_give_the_final_state_to_the_bit():
    leader, follower = tiny_encoder(), tiny_encoder()
    plans = [([1, 4], True, None), ([], True, None), ([24, 26], False, 30), ([], False, None), ([0 + 2], False, 41)]
    for seed, (rows, dense, item_rows) in enumerate(plans, start=1):
        delta = changed(leader, seed, rows, dense, item_rows)
        apply_delta(follower, Delta.from_bytes(delta.to_bytes()))
        assert_same_state(copied_state(leader), copied_state(follower))
        assert follower.config.item_rows == leader.config.item_rows == len(follower.item_embeddings.weight)
        assert fingerprint(follower) == delta.checksum


def test_applying_does_not_bind_the_encoder_to_the_deltas_memory(delta):
    encoder = tiny_encoder()
    apply_delta(encoder, delta)
    before = copied_state(encoder)
    for values in delta.tensors.values():
        values += 1
    assert_same_state(before, copied_state(encoder))


def test_growth_keeps_the_rows_and_adds_zeros():
    encoder = tiny_encoder()
    before = copied_state(encoder)
    grow_items(encoder, 40)
    after = state_of(encoder)
    for name in ROW_TENSORS:
        assert torch.equal(after[name][:25], before[name])
        assert not after[name][25:].any()
    grow_items(encoder, 30)  # never shrinks
    assert encoder.config.item_rows == encoder.item_embeddings.num_embeddings == 40


@pytest.mark.parametrize(
    "spoil",
    [
        lambda delta: delta.tensors.update({"blocks.9.weight": np.zeros(3, np.float32)}),
        lambda delta: delta.tensors.update({"interest_to_item": np.zeros((16, 15), np.float32)}),
        lambda delta: delta.tensors.update({"interest_to_item": np.zeros((16, 16), np.float64)}),
        lambda delta: delta.tensors.update({"item_popularity": np.zeros(3, np.float32)}),
        lambda delta: delta.rows.__setitem__(1, 40),
        lambda delta: delta.rows.__setitem__(0, -1),
    ],
    ids=["name", "shape", "type", "rows", "row beyond the table", "row before it"],
)
def test_a_delta_that_does_not_fit_changes_nothing(spoil):
    leader, follower = tiny_encoder(), tiny_encoder()
    delta = changed(leader, 1, [2, 26], dense=True, item_rows=30)
    spoil(delta)
    before = copied_state(follower)
    with pytest.raises(DeltaMismatch, match=r"^delta 2"):
        apply_delta(follower, delta)
    assert_same_state(before, copied_state(follower))
    assert follower.config.item_rows == 25


# ---------------------------------------------------------------------------------------------------------------------
# The fingerprint


def bits_of(encoder: BehaviourEncoder) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in state_of(encoder).items():
        yield name, tensor.numpy().reshape(-1).view(np.uint32)


def test_the_fingerprint_changes_with_any_bit_of_any_tensor():
    encoder = tiny_encoder()
    original = fingerprint(encoder)
    random = np.random.default_rng(0)
    for name, words in bits_of(encoder):
        for bit in range(32):
            place = int(random.integers(len(words)))
            words[place] ^= np.uint32(1 << bit)
            assert fingerprint(encoder) != original, f"bit {bit} of word {place} of {name}"
            words[place] ^= np.uint32(1 << bit)
    assert fingerprint(encoder) == original


def test_the_fingerprint_sees_what_changes_places():
    encoder = tiny_encoder()
    original = fingerprint(encoder)
    state = state_of(encoder)
    table = state["item_embeddings.weight"]
    table[[3, 4]] = table[[4, 3]]
    assert fingerprint(encoder) != original
    table[[3, 4]] = table[[4, 3]]
    one, other = state["blocks.0.attention_norm.weight"], state["blocks.0.feed_forward_norm.weight"]
    one[:], other[:] = 2.0, 3.0
    before = fingerprint(encoder)
    one[:], other[:] = 3.0, 2.0
    assert fingerprint(encoder) != before


def test_the_fingerprint_of_a_longer_table_is_another():
    encoder = tiny_encoder()
    before = fingerprint(encoder)
    grow_items(encoder, 26)
    assert fingerprint(encoder) != before


@pytest.mark.parametrize(
    ("rows", "dense", "item_rows"),
    [
        ([2, 9], False, None),
        ([], True, None),
        ([24], True, None),
        ([24, 27], False, 30),
        ([], False, 26),
        ([], False, None),
    ],
    ids=["rows", "dense", "both", "growth", "spare rows", "nothing"],
)
def test_a_followed_fingerprint_is_the_one_made_from_scratch(rows, dense, item_rows):
    encoder = tiny_encoder()
    followed = Fingerprint(encoder)
    for seed in (1, 2):  # growing happens once, the rest twice
        delta = changed(encoder, seed, rows, dense, item_rows)
        found = followed.update(state_of(encoder), delta.rows, set(delta.tensors))
        assert found == followed.checksum == fingerprint(encoder)
    assert len(found) == 16
    int(found, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Counts, whose rows change apart from those of the weights


def counting_encoder() -> BehaviourEncoder:
    encoder = tiny_encoder()
    encoder.add_ranker(neighbours=3, features=4)
    return encoder


def counted(encoder: BehaviourEncoder, item: int, before: int, item_rows: int = 25) -> Delta:
    """Count an event of an item after another, move the ranker, and say what has changed."""
    assert encoder.counts is not None
    assert encoder.ranker is not None
    grow_items(encoder, item_rows)
    context = np.array([[before]])
    time = int(encoder.counts.clock) + 1
    encoder.counts.count(context, np.array([item]), np.ones(1), np.array([time]))
    encoder.ranker.weights += 0.25
    state, rows = state_of(encoder), encoder.counts.rows_of(context, np.array([item]))
    tensors = {name: state[name].numpy()[rows] for name in COUNT_TENSORS}
    tensors |= {name: state[name].numpy().copy() for name in ("counts.clock", "ranker.weights")}
    return Delta(time + 1, time, fingerprint(encoder), 7, item_rows, NO_ROWS, tensors, count_rows=rows)


def test_deltas_of_counts_give_the_final_state_to_the_bit():
    leader, follower = counting_encoder(), counting_encoder()
    followed = Fingerprint(follower)
    for item, before, item_rows in [(3, 5, 25), (5, 3, 25), (27, 3, 30), (1, 27, 30)]:
        read = Delta.from_bytes(counted(leader, item, before, item_rows).to_bytes())
        assert read.count_rows.tolist() == sorted([item, before])
        assert not len(read.rows)
        apply_delta(follower, read)
        assert_same_state(copied_state(leader), copied_state(follower))
        found = followed.update(state_of(follower), read.rows, set(read.tensors), read.count_rows)
        assert found == read.checksum == fingerprint(follower)
    assert int(state_of(follower)["counts.clock"]) == 4
    assert state_of(follower)["counts.next_rows"].any()


def test_the_fingerprint_follows_counts_only_at_the_rows_that_are_named():
    encoder = counting_encoder()
    followed = Fingerprint(encoder)
    delta = counted(encoder, 3, 5)
    unnamed = followed.update(state_of(encoder), delta.rows, set(delta.tensors))
    assert unnamed != delta.checksum
    assert followed.update(state_of(encoder), delta.rows, set(delta.tensors), delta.count_rows) == delta.checksum


@pytest.mark.parametrize(
    "spoil",
    [
        lambda delta: delta.count_rows.__setitem__(1, 30),
        lambda delta: delta.count_rows.__setitem__(0, -1),
        lambda delta: setattr(delta, "count_rows", delta.count_rows[:1]),
        lambda delta: setattr(delta, "count_rows", delta.count_rows.astype(np.int32)),
        lambda delta: setattr(delta, "count_rows", delta.count_rows[None]),
        lambda delta: delta.tensors.update({"counts.next_rows": np.zeros((2, 4), np.int32)}),
        lambda delta: delta.tensors.update({"counts.next_rows": np.zeros((2, 3), np.int64)}),
        lambda delta: delta.tensors.update({"ranker.weights": np.zeros(5, np.float32)}),
    ],
    ids=["beyond the table", "before it", "too few", "type", "shape", "neighbours", "type of a count", "ranker"],
)
def test_counts_that_do_not_fit_change_nothing(spoil):
    delta, follower = counted(counting_encoder(), 27, 3, item_rows=30), counting_encoder()
    spoil(delta)
    before = copied_state(follower)
    with pytest.raises(DeltaMismatch, match=r"^delta 2"):
        apply_delta(follower, delta)
    assert_same_state(before, copied_state(follower))
    assert follower.config.item_rows == 25


def test_a_model_without_counts_refuses_them():
    with pytest.raises(DeltaMismatch, match=r"^delta 2 has a tensor counts\.\w+, and the model has none of this name"):
        apply_delta(tiny_encoder(), counted(counting_encoder(), 3, 5))


def test_the_fingerprint_changes_with_any_bit_of_the_counts():
    encoder = counting_encoder()
    counted(encoder, 3, 5)
    original = fingerprint(encoder)
    for name, words in bits_of(encoder):
        if name.startswith(("counts.", "ranker.")):
            for place in (0, len(words) - 1):
                words[place] ^= np.uint32(1)
                assert fingerprint(encoder) != original, f"word {place} of {name}"
                words[place] ^= np.uint32(1)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_truncated_bytes_are_no_delta(delta):
    data = delta.to_bytes({"steps": np.array([3])})
    for length in [*range(0, 200, 7), *range(200, len(data), 97), len(data) - 1]:
        with pytest.raises(DeltaMismatch, match="not a whole delta"):
            Delta.from_bytes(data[:length])
    with pytest.raises(DeltaMismatch, match="not a whole delta"):
        Delta.from_bytes(data + b"\0")


def test_a_flipped_bit_anywhere_is_noticed(delta):
    data = delta.to_bytes({"steps": np.array([3])})
    header = 8 + int.from_bytes(data[:8], "little")
    random = np.random.default_rng(0)
    for place in [*range(header), *random.integers(header, len(data), 200).tolist()]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(random.integers(8))
        with pytest.raises(DeltaMismatch, match="not a whole delta"):
            Delta.from_bytes(bytes(damaged))


def of_format(delta: Delta, monkeypatch: pytest.MonkeyPatch, number: int | None) -> bytes:
    """Return the bytes as a release of this format writes them; None: as one did before there were numbers."""
    with monkeypatch.context() as patch:
        patch.setattr("lib.model.delta.FORMAT", number)
        if number is None:
            write = json.dumps
            patch.setattr("lib.model.delta.json.dumps", lambda said: write({n: said[n] for n in said if n != "format"}))
        return delta.to_bytes()


def test_a_delta_of_another_release_is_told_from_a_damaged_one(delta, monkeypatch):
    for number in (0, FORMAT + 1):
        refused = rf"^version: delta 2 has format {number}, .* reads 1 to {FORMAT}; install"
        with pytest.raises(OtherFormat, match=refused):
            Delta.from_bytes(of_format(delta, monkeypatch, number))
    for number in (None, *range(OLDEST_FORMAT, FORMAT + 1)):
        assert Delta.from_bytes(of_format(delta, monkeypatch, number)).new_items == delta.new_items


def test_other_safetensors_are_no_delta():
    import safetensors.numpy

    with pytest.raises(DeltaMismatch):
        Delta.from_bytes(safetensors.numpy.save({"rows": np.zeros(2)}))
    with pytest.raises(DeltaMismatch):
        Delta.from_bytes(safetensors.numpy.save({"rows": np.zeros(2)}, metadata={"delta": "{}"}))
