"""The behaviour encoder: causal, blind to padding, sensitive to each input, and saved without loss."""

import pytest
import torch

from lib.errors import InputError
from lib.model.encoder import BehaviourEncoder
from tests.helpers.tiny import assert_same_state, copied_state, tiny_config, tiny_encoder

Inputs = dict[str, torch.Tensor]


@pytest.fixture
def encoder() -> BehaviourEncoder:
    return tiny_encoder(num_hidden_layers=2)


def random_inputs(length: int, batch: int = 3, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    highest = {"rows": 25, "kinds": 10, "gaps": 32, "values": 6}
    columns = {name: torch.randint(1, top, (batch, length), generator=generator) for name, top in highest.items()}
    return columns | {"lengths": torch.full((batch,), length)}


@torch.no_grad()
def vectors(encoder: BehaviourEncoder, inputs: Inputs) -> torch.Tensor:
    return encoder(**inputs)


@pytest.mark.parametrize("changed", range(6))
def test_a_later_event_never_changes_an_earlier_position(encoder, changed):
    inputs = random_inputs(6)
    before = vectors(encoder, inputs)
    for name in ("rows", "kinds", "gaps", "values"):
        inputs[name][:, changed] = inputs[name][:, changed] % 4 + 1
    after = vectors(encoder, inputs)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert ((before - after)[:, changed:].abs().amax(dim=-1) > 1e-4).all()


def test_right_padding_has_no_influence(encoder):
    alone = random_inputs(4, batch=1)
    padded = random_inputs(8, batch=2, seed=1)
    for name in ("rows", "kinds", "gaps", "values"):
        padded[name][0, :4] = alone[name][0]
    padded["lengths"] = torch.tensor([4, 8])
    with torch.no_grad():
        expected = encoder.interests(**alone)[0]
        found = encoder.interests(**padded)[0]
    assert torch.allclose(expected, found, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_interest_is_the_vector_at_the_newest_event(blocks):
    encoder = tiny_encoder(num_hidden_layers=blocks)
    inputs = random_inputs(7, batch=5) | {"lengths": torch.tensor([1, 7, 3, 6, 2])}
    with torch.no_grad():
        everywhere, newest = encoder(**inputs), encoder.interests(**inputs)
    assert torch.allclose(newest, everywhere[torch.arange(5), inputs["lengths"] - 1], atol=1e-5)


@pytest.mark.parametrize("name", ["rows", "kinds", "gaps", "values"])
def test_each_input_matters(encoder, name):
    inputs = random_inputs(5)
    before = encoder.interests(**inputs)
    inputs[name] = inputs[name] % 4 + 1
    assert ((encoder.interests(**inputs) - before).abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("place", range(8))
def test_positions_count_from_the_newest_event(encoder, place):
    inputs = random_inputs(5)
    before = vectors(encoder, inputs)
    with torch.no_grad():
        encoder.position_embeddings.weight[place] += torch.randn(16)
    changed = (vectors(encoder, inputs) - before).abs().amax(dim=(0, 2)) > 1e-4
    # the event that has `place` events after it, and whatever looks back at it
    assert changed.tolist() == [column >= 4 - place and place < 5 for column in range(5)]


def test_a_padded_history_counts_from_its_own_newest_event(encoder):
    inputs = random_inputs(6)
    inputs["lengths"] = torch.tensor([2, 4, 6])
    before = encoder.interests(**inputs)
    with torch.no_grad():
        encoder.position_embeddings.weight[3] += torch.randn(16)  # read where there are four events or more
    changed = (encoder.interests(**inputs) - before).abs().amax(dim=1) > 1e-4
    assert changed.tolist() == [False, True, True]


def test_vectors_are_of_unit_length_and_the_padding_item_is_zero(encoder):
    lengths = vectors(encoder, random_inputs(6)).norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)
    items = encoder.item_vectors()
    assert torch.allclose(items[1:].norm(dim=-1), torch.ones(24), atol=1e-5)
    assert torch.equal(items[0], torch.zeros(16))
    assert torch.equal(encoder.item_vectors(torch.tensor([3, 1])), items[[3, 1]])


def test_the_score_is_u_a_v(encoder):
    inputs = random_inputs(4)
    u, a, v = encoder.interests(**inputs), encoder.interest_to_item, encoder.item_vectors()
    expected = torch.einsum("bc,cd,nd->bn", u, a, v)
    assert torch.allclose(encoder.queries(u) @ v.T, expected, atol=1e-5)
    untrained = BehaviourEncoder(tiny_config())
    assert torch.equal(untrained.queries(u), u)


def test_dropout_acts_in_training_only(encoder):
    with_dropout = tiny_encoder(num_hidden_layers=2, dropout=0.5)
    inputs = random_inputs(4)
    assert torch.equal(vectors(with_dropout, inputs), vectors(with_dropout, inputs))
    with_dropout.train()
    assert not torch.equal(vectors(with_dropout, inputs), vectors(with_dropout, inputs))


def test_saved_and_loaded_to_the_bit(encoder, tmp_path):
    encoder.item_popularity[3] = 1.5
    encoder.popularity_reference.fill_(1_700_000_000_123)
    encoder.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.bin"))
    loaded = BehaviourEncoder.from_pretrained(tmp_path)
    assert_same_state(copied_state(encoder), copied_state(loaded))
    assert loaded.config.to_diff_dict() == encoder.config.to_diff_dict()
    inputs = random_inputs(6)
    assert torch.equal(vectors(encoder, inputs), vectors(loaded.eval(), inputs))


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match="hidden_size 18 is not a multiple of num_attention_heads 4"):
        tiny_config(hidden_size=18, num_attention_heads=4)


def test_configurations_do_not_share_their_lists():
    one, other = tiny_config(event_kinds=None), tiny_config(event_kinds=None)
    assert one.event_kinds is not None
    one.event_kinds.append("click")
    assert other.event_kinds == []
