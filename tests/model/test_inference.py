"""What answers read a history with gives what the encoder gives."""

import numpy as np
import pytest
import torch

from lib.model.inference import InferenceEncoder
from lib.model.presets import INPUTS
from tests.helpers.tiny import tiny_encoder


def random_codes(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Rows, kinds, gaps and values of histories."""
    generator = np.random.default_rng(seed)
    tops = np.array([[25], [10], [32], [6]])
    return [generator.integers(1, tops, (4, length)) for length in lengths]


@torch.no_grad()
def expected(encoder, codes: list[np.ndarray]) -> torch.Tensor:
    """Each history on its own, by the encoder itself."""
    interests = []
    for history in codes:
        rows, kinds, gaps, values = torch.from_numpy(history)[:, None]
        interests.append(encoder.interests(kinds, gaps, values, torch.tensor([history.shape[1]]), rows))
    return encoder.queries(torch.cat(interests))


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[8], [8, 8, 8], [1, 8, 3, 5, 1]])
def test_queries_are_those_of_the_encoder(blocks, lengths):
    encoder = tiny_encoder(num_hidden_layers=blocks)
    codes = random_codes(lengths)
    assert torch.allclose(InferenceEncoder(encoder).queries(codes), expected(encoder, codes), atol=1e-5)


@pytest.mark.parametrize("inputs", [[], ["kind"], ["gap", "value"], list(INPUTS)])
def test_the_inputs_that_the_encoder_reads_are_read(inputs):
    encoder = tiny_encoder(inputs=inputs)
    codes = random_codes([8, 4])
    assert torch.allclose(InferenceEncoder(encoder).queries(codes), expected(encoder, codes), atol=1e-5)


def test_attributes_are_read():
    encoder = tiny_encoder(attribute_values=["a=1", "a=2", "b=1"], attributes_per_item=2, num_hidden_layers=2)
    encoder.attribute_embeddings.weight.detach()[0] = 0.0
    encoder.item_attributes[1:] = torch.randint(0, 4, (24, 2), generator=torch.Generator().manual_seed(1))
    codes = random_codes([8, 8, 2])
    assert torch.allclose(InferenceEncoder(encoder).queries(codes), expected(encoder, codes), atol=1e-5)


def test_the_encoder_is_left_as_it_was():
    encoder = tiny_encoder(num_hidden_layers=2)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    reader = InferenceEncoder(encoder)
    codes = random_codes([8, 5])
    assert torch.equal(reader.queries(codes), reader.queries(codes))
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
