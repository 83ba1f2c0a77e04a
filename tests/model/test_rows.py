"""Tables that grow: in place where they have room of their own, and never over what belongs to another tensor."""

import numpy as np
import torch

from lib.model.delta import grow_items, make_room, state_of, with_new_rows
from lib.model.fingerprint import Fingerprint, fingerprint
from lib.model.rows import SPARE_SHARE, lengthened, with_room
from lib.ranking.features import FEATURES
from tests.helpers.tiny import tiny_encoder


def test_a_table_with_room_grows_in_place_until_it_is_full():
    table = with_room(torch.arange(16.0).view(8, 2))
    place = table.data_ptr()
    grown = lengthened(table, 9, fill=-1)
    assert (grown.data_ptr(), grown[8].tolist()) == (place, [-1, -1])
    grown[8] = 5
    other = lengthened(table, 9)  # behind this shorter one lies what the longer one uses
    assert (other.data_ptr() != place, other[8].tolist(), grown[8].tolist()) == (True, [0, 0], [5, 5])
    assert lengthened(grown[:4], 5)[4].tolist() == [0, 0]
    assert grown[4].tolist() == [8, 9]
    full = lengthened(grown, 11, fill=3)
    assert full.data_ptr() != place
    assert full.tolist() == [[2.0 * row, 2.0 * row + 1] for row in range(8)] + [[5, 5]] + [[3, 3]] * 2
    assert lengthened(full, 12).data_ptr() == full.data_ptr()
    assert lengthened(full, 11) is full


def test_what_lies_behind_another_tensor_is_not_room():
    both = torch.arange(20.0)
    table, other = both[:16].view(8, 2), both[16:]
    assert lengthened(table, 9).data_ptr() != table.data_ptr()
    assert other.tolist() == [16, 17, 18, 19]


def test_a_model_with_room_grows_as_one_without_does():
    models = [tiny_encoder(items=40) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for encoder in models:
        encoder.add_ranker(4, len(FEATURES))
    make_room(models[1])
    assert fingerprint(models[0]) == fingerprint(models[1])
    places = {name: tensor.data_ptr() for name, tensor in state_of(models[1]).items()}
    followed = Fingerprint(models[1])
    rows = models[0].config.item_rows + 40 // SPARE_SHARE
    for encoder in models:
        grow_items(encoder, rows)
    assert len(models[1].item_embeddings.weight) == models[1].config.item_rows == rows
    assert models[1].counts is not None
    assert models[1].counts.first_at[-5:].tolist() == [-1] * 5
    moved = {name for name, tensor in state_of(models[1]).items() if tensor.data_ptr() != places[name]}
    assert not moved
    assert followed.update(state_of(models[1]), np.array([2, 3])) == fingerprint(models[0])


def test_changed_and_new_rows():
    assert with_new_rows(np.array([1, 4, 6]), 6, 8).tolist() == [1, 4, 6, 7]
    assert with_new_rows(np.array([1, 4]), 8, 8).tolist() == [1, 4]
    assert with_new_rows(np.zeros(0, dtype=np.int64), 0, 2).tolist() == [0, 1]
