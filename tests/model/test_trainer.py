"""The training step: the loss it minimises, the rows it touches, and the same result from any number of workers."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import multiprocessing

from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories
from lib.model.batches import Batch, SequenceBatches
from lib.model.delta import state_of
from lib.model.encoder import BehaviourEncoder, unit_length
from lib.model.loss import next_item_losses, sampled_margins, uniform_negatives
from lib.model.trainer import RowAdam, Trainer, TrainingConfig, train_top_layers
from tests.helpers.tiny import NOW, SECOND, assert_same_state, copied_state, random_histories, tiny_config, tiny_encoder

CONFIG = TrainingConfig(negatives=12, learning_rate=3e-3)


def batches_of(count: int = 4, items: int = 24) -> list[Batch]:
    histories = random_histories(30, items, np.random.default_rng(0), longest=9)
    return list(SequenceBatches(histories, tiny_config()).epoch(40, np.random.default_rng(0)))[:count]


def new_trainer(config: TrainingConfig = CONFIG, items: int = 24, **changes) -> Trainer:
    return Trainer(tiny_encoder(items, **changes), items, config)


def assert_same_optimizer(one: Trainer, other: Trainer) -> None:
    mine, theirs = one.optimizer_state(), other.optimizer_state()
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not np.array_equal(mine[name], theirs[name])]
    assert not different, f"these tensors differ: {different}"


# ---------------------------------------------------------------------------------------------------------------------
# The objective


def test_the_loss_with_all_items_as_negatives_is_the_full_softmax():
    encoder = tiny_encoder()
    queries = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([1, 5, 5, 24, 3, 9, 2])
    vectors, everything = encoder.item_vectors(), torch.arange(1, 25)
    margins = sampled_margins(queries, vectors[targets], vectors[1:], targets, everything, temperature=0.05)
    expected = F.cross_entropy(queries @ vectors[1:].T / 0.05, targets - 1, reduction="none")
    assert torch.allclose(next_item_losses(margins, torch.ones(7)), expected, rtol=1e-5, atol=1e-5)


def test_an_accidental_hit_does_not_push_its_own_target_away():
    vectors = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    target = torch.tensor([3])
    without = sampled_margins(vectors[:1], vectors[3:4], vectors[[1, 2]], target, torch.tensor([1, 2]), 0.1)
    with_hits = sampled_margins(
        vectors[:1], vectors[3:4], vectors[[3, 1, 3, 2]], target, torch.tensor([3, 1, 3, 2]), 0.1
    )
    assert torch.allclose(without, with_hits)


def test_a_target_whose_negatives_are_all_hits_costs_nothing():
    vectors = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    query = vectors[:1].clone().requires_grad_()
    margins = sampled_margins(query, vectors[3:4], vectors[[3, 3]], torch.tensor([3]), torch.tensor([3, 3]), 0.1)
    loss = next_item_losses(margins, torch.ones(1)).sum()
    loss.backward()
    assert loss.item() == 0
    assert query.grad is not None
    assert torch.equal(query.grad, torch.zeros_like(query))


def test_the_written_gradients_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    queries, positives, negatives = (
        torch.randn(n, 8, generator=generator, dtype=torch.float64, requires_grad=True) for n in (6, 6, 5)
    )
    target_rows, negative_rows = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([7, 3, 8, 3, 9])

    def margins(q, p, n):
        return sampled_margins(q, p, n, target_rows, negative_rows, 0.5)

    assert torch.autograd.gradcheck(margins, (queries, positives, negatives))
    assert torch.autograd.gradcheck(unit_length, (queries,))


def score_after_training(weight: float, dislike_weight: float = 1.0) -> float:
    """Mean score of item 7 where it came next for some users and counted as `weight`; others liked it."""
    trainer = new_trainer(replace(CONFIG, learning_rate=1e-2, dislike_weight=dislike_weight), dropout=0.0)
    batches = batches_of()
    for batch in batches:
        batch.target_rows[::2] = torch.where(batch.target_weights[::2] > 0, 7, batch.target_rows[::2])
        batch.target_weights.abs_()[1::2][batch.target_rows[1::2] == 7] *= weight
    for _ in range(10):
        for batch in batches:
            trainer.step(batch)
    encoder, scores = trainer.encoder.eval(), []
    with torch.no_grad():
        for batch in batches:
            hidden = encoder(batch.kinds, batch.gaps, batch.values, batch.lengths, rows=batch.rows)
            queries = encoder.queries(hidden[1::2][batch.target_rows[1::2] == 7])
            scores += (queries @ encoder.item_vectors(torch.tensor([7]))[0]).tolist()
    return float(np.mean(scores))


def test_what_is_disliked_is_pushed_away_and_never_aimed_at():
    disliked, ignored, liked = (score_after_training(weight) for weight in (-1.0, 0.0, 1.0))
    assert disliked < ignored - 0.1
    assert ignored < liked


def test_no_weight_on_dislikes_leaves_them_out():
    assert score_after_training(-1.0, dislike_weight=0.0) == score_after_training(0.0)


def test_a_batch_in_parts_gives_the_step_of_the_whole():
    whole, parts = (new_trainer(replace(CONFIG, accumulation=count), dropout=0.0) for count in (1, 3))
    for batch in batches_of(3):
        one, other = whole.step(batch), parts.step(batch)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
    mine, theirs = state_of(whole.encoder), state_of(parts.encoder)
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-5), name


def test_negatives_are_uniform_over_the_items_and_never_padding():
    rows = uniform_negatives(40_000, 8, torch.Generator().manual_seed(0))
    counts = torch.bincount(rows, minlength=9)
    assert counts[0] == 0
    assert len(counts) == 9
    assert ((counts[1:] - 5000).abs() < 400).all()


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser of the item rows


def test_row_adam_is_adamw_where_every_row_has_a_gradient():
    config = TrainingConfig(learning_rate=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 4, generator=generator)
    parameter = torch.nn.Parameter(table.clone())
    adamw = torch.optim.AdamW([parameter], lr=0.01, betas=config.betas, eps=config.epsilon, weight_decay=0.1)
    rows_adam = RowAdam(table, config)
    for _ in range(5):
        gradient = torch.randn(6, 4, generator=generator)
        parameter.grad = gradient.clone()
        adamw.step()
        rows_adam.step(table, torch.arange(6), gradient, 0.01)
    assert torch.allclose(table, parameter.detach(), atol=1e-6)


def test_row_adam_counts_each_rows_own_updates():
    config = TrainingConfig()
    table = torch.ones(3, 4)
    optimizer = RowAdam(table, config)
    for _ in range(9):
        optimizer.step(table, torch.tensor([0]), torch.ones(1, 4), 0.01)
    late, fresh = table.clone(), torch.ones(3, 4)
    optimizer.step(late, torch.tensor([2]), torch.ones(1, 4), 0.01)
    RowAdam(fresh, config).step(fresh, torch.tensor([2]), torch.ones(1, 4), 0.01)
    assert torch.equal(late[2], fresh[2])  # its first step is a full one, whatever the others did
    assert optimizer.steps.tolist() == [9, 0, 1]


def test_row_adam_grows_without_touching_what_it_knows():
    table = torch.ones(3, 4)
    optimizer = RowAdam(table, TrainingConfig())
    optimizer.step(table, torch.tensor([1]), torch.ones(1, 4), 0.01)
    first, second = optimizer.first.clone(), optimizer.second.clone()
    optimizer.grow(5)
    assert torch.equal(optimizer.first[:3], first)
    assert torch.equal(optimizer.second[:3], second)
    assert not optimizer.first[3:].any()
    assert optimizer.steps.tolist() == [0, 1, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The step


def test_a_step_changes_just_the_rows_it_names():
    trainer = new_trainer(replace(CONFIG, negatives=3))
    announced: list[torch.Tensor] = []
    trainer.before_update = announced.append
    before, state = copied_state(trainer.encoder), trainer.optimizer_state()
    before_rows = {name: state[name].copy() for name in ("rows.first", "rows.second", "rows.steps")}
    (batch,) = batches_of(1)
    batch = Batch(**{name: tensor[:1] for name, tensor in vars(batch).items()})
    result = trainer.step(batch)
    assert torch.equal(announced[0], result.rows)
    untouched = torch.ones(25, dtype=torch.bool)
    untouched[result.rows] = False
    assert untouched.sum() >= 10
    after = state_of(trainer.encoder)
    assert torch.equal(after["item_embeddings.weight"][untouched], before["item_embeddings.weight"][untouched])
    assert (after["item_embeddings.weight"] != before["item_embeddings.weight"])[result.rows].any(dim=1).all()
    for name, values in before_rows.items():
        assert np.array_equal(trainer.optimizer_state()[name][untouched.numpy()], values[untouched.numpy()])


def test_the_padding_row_stays_zero_and_popularity_is_not_trained():
    trainer = new_trainer()
    trainer.encoder.item_popularity[:] = torch.arange(25.0)
    for batch in batches_of():
        assert (batch.rows == 0).any(), "without padding this test shows nothing"
        result = trainer.step(batch)
        assert result.rows.min() > 0
    assert not trainer.encoder.item_embeddings.weight[0].any()
    assert torch.equal(trainer.encoder.item_popularity, torch.arange(25.0))


def test_every_tensor_but_the_popularity_learns():
    trainer = new_trainer()
    before = copied_state(trainer.encoder)
    for batch in batches_of():
        trainer.step(batch)
    after = state_of(trainer.encoder)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {
        "item_popularity",
        "popularity_reference",
        "item_attributes",
        "attribute_embeddings.weight",  # this encoder's items have no attributes
    }


def test_frozen_blocks_and_what_only_they_read_stay():
    trainer = new_trainer(num_hidden_layers=2)
    encoder = trainer.encoder
    head = encoder.interest_to_item.nbytes + encoder.final_norm.weight.nbytes
    train_top_layers(encoder, head + sum(parameter.nbytes for parameter in encoder.blocks[1].parameters()))
    trainer = Trainer(encoder, 24, CONFIG)
    before = copied_state(encoder)
    batch = batches_of(1)[0]
    weights = trainer._weights(batch)
    result = trainer.step(batch)
    changed = {name for name, tensor in state_of(encoder).items() if not torch.equal(tensor, before[name])}
    upper = {"interest_to_item", "final_norm.weight", "item_embeddings.weight"}
    assert changed == upper | {name for name in before if name.startswith("blocks.1.")}
    negatives = uniform_negatives(12, 24, torch.Generator().manual_seed(CONFIG.seed * 1_000_003 + 1))
    assert set(result.rows.tolist()) <= {*batch.target_rows[weights != 0].tolist(), *negatives.tolist()}


def test_where_nothing_fits_the_rows_alone_are_trained():
    encoder = tiny_encoder()
    train_top_layers(encoder, 0)
    trainer = Trainer(encoder, 24, CONFIG)
    before = copied_state(encoder)
    assert len(trainer.step(batches_of(1)[0]).rows) > 0
    changed = {name for name, tensor in state_of(encoder).items() if not torch.equal(tensor, before[name])}
    assert changed == {"item_embeddings.weight"}


def test_the_loss_is_the_weighted_mean_over_targets():
    trainer = new_trainer()
    (batch,) = batches_of(1)
    batch.target_weights *= torch.rand(batch.target_weights.shape, generator=torch.Generator().manual_seed(0))
    encoder = trainer.encoder
    negatives = uniform_negatives(12, 24, torch.Generator().manual_seed(1))  # seed 0, step 1
    with torch.no_grad():
        hidden = encoder(batch.kinds, batch.gaps, batch.values, batch.lengths, rows=batch.rows)
        losses, weights = [], []
        for line, place in batch.target_weights.nonzero().tolist():
            target = int(batch.target_rows[line, place])
            others = [row for row in negatives.tolist() if row != target]
            scores = encoder.queries(hidden[line, place]) @ encoder.item_vectors(torch.tensor([target, *others])).T
            share = F.softmax(scores / 0.05, dim=0)[0]
            liked = batch.target_weights[line, place] > 0
            losses.append(-torch.log(share) if liked else -torch.log1p(-share))
            weights.append(batch.target_weights[line, place].abs() * (1.0 if liked else CONFIG.dislike_weight))
    weight = torch.stack(weights)
    result = trainer.step(batch)
    assert result.targets == pytest.approx(float(weight.sum()), rel=1e-5)
    assert result.loss == pytest.approx(float((torch.stack(losses) * weight).sum() / weight.sum()), rel=1e-4)


def test_the_loss_falls():
    trainer = new_trainer()
    batches = batches_of(8)
    first = np.mean([trainer.step(batch).loss for batch in batches])
    for _ in range(9):
        for batch in batches:
            trainer.step(batch)
    last = np.mean([trainer.step(batch).loss for batch in batches])
    assert last < 0.8 * first


def test_gradients_are_clipped():
    trainer, free = (new_trainer(replace(CONFIG, clip_norm=norm)) for norm in (1e-3, 1e9))
    (batch,) = batches_of(1)
    norm = trainer.step(batch).gradient_norm
    assert norm == free.step(batch).gradient_norm > 1e-3
    for name in ("interest_to_item:exp_avg", "rows.first"):
        clipped, whole = (t.optimizer_state()[name] for t in (trainer, free))
        assert whole.any()
        assert np.allclose(clipped, whole * 1e-3 / norm, rtol=1e-3, atol=1e-9)


def test_a_pattern_is_learned():
    # whoever had item n had item n + 1 next (the last is followed by the first)
    random = np.random.default_rng(0)
    starts = random.integers(0, 24, 200)
    rows = (starts[:, None] + np.arange(6)) % 24 + 1
    count = rows.size
    histories = Histories(
        [f"u{user}" for user in range(200)],
        np.arange(0, count + 1, 6),
        rows.reshape(-1).astype(np.int32),
        np.full(count, EVENT_KINDS.index("click") + 1, dtype=np.int8),
        np.full(count, np.nan, dtype=np.float32),
        NOW + np.tile(np.arange(6), 200) * SECOND,
    )
    torch.manual_seed(0)
    encoder = BehaviourEncoder(tiny_config())
    trainer = Trainer(encoder, 24, TrainingConfig(negatives=24, learning_rate=1e-2))
    batches = SequenceBatches(histories, encoder.config)
    for epoch in range(12):
        for batch in batches.epoch(128, np.random.default_rng(epoch)):
            trainer.step(batch)
    encoder.eval()
    hits = 0
    with torch.no_grad():
        for users, batch in SequenceBatches(histories.without_newest(), encoder.config).inference():
            u = encoder.interests(batch.kinds, batch.gaps, batch.values, batch.lengths, batch.rows)
            best = (encoder.queries(u) @ encoder.item_vectors().T)[:, 1:].argmax(dim=1) + 1
            hits += int((best == torch.from_numpy(rows[users, -1])).sum())
    assert hits / 200 > 0.97


def test_a_batch_without_targets_moves_nothing_but_decay():
    trainer = new_trainer(replace(CONFIG, weight_decay=0.0))
    before = copied_state(trainer.encoder)
    (batch,) = batches_of(1)
    batch.target_weights.zero_()
    result = trainer.step(batch)
    assert result.targets == 0
    assert result.loss == 0
    assert_same_state(before, state_of(trainer.encoder))


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser's state


def test_a_saved_and_loaded_trainer_continues_to_the_bit():
    trainer = new_trainer()
    batches = batches_of(6)
    for batch in batches[:3]:
        trainer.step(batch)
    saved = safetensors.numpy.save(trainer.optimizer_state())
    weights = safetensors.torch.save(copied_state(trainer.encoder))

    resumed = new_trainer(seed=9)
    resumed.encoder.load_state_dict(safetensors.torch.load(weights))
    resumed.load_optimizer_state(safetensors.numpy.load(saved))
    assert_same_optimizer(trainer, resumed)
    forgetful = new_trainer(seed=9)
    forgetful.encoder.load_state_dict(safetensors.torch.load(weights))
    for batch in batches[3:]:
        for one in (trainer, resumed, forgetful):
            one.step(batch)
    assert_same_state(copied_state(trainer.encoder), copied_state(resumed.encoder))
    assert_same_optimizer(trainer, resumed)
    assert not torch.equal(trainer.encoder.interest_to_item, forgetful.encoder.interest_to_item)


def test_the_state_of_the_changed_rows_is_enough():
    trainer = new_trainer(replace(CONFIG, negatives=2))
    batches = batches_of(3)
    trainer.step(batches[0])
    follower = new_trainer(replace(CONFIG, negatives=2))
    follower.load_optimizer_state({name: value.copy() for name, value in trainer.optimizer_state().items()})
    rows = trainer.step(batches[1]).rows.numpy()
    part = trainer.optimizer_state(rows)
    assert len(part["rows.first"]) == len(rows)
    follower.load_optimizer_state(part, rows)
    assert_same_optimizer(trainer, follower)


# ---------------------------------------------------------------------------------------------------------------------
# Several workers


def _train(trainer: Trainer, shard: int, shards: int) -> list[float]:
    histories = random_histories(15, 24, np.random.default_rng(3), longest=20)
    batches = SequenceBatches(histories, trainer.encoder.config)
    return [trainer.step(batch).loss for batch in batches.epoch(24, np.random.default_rng(4), shard, shards)]


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    trainer = new_trainer()
    losses = _train(trainer, rank, world)
    distributed.destroy_process_group()
    safetensors.torch.save_file(copied_state(trainer.encoder), f"{folder}/weights{rank}")
    safetensors.numpy.save_file(trainer.optimizer_state() | {"losses": np.array(losses)}, f"{folder}/optimizer{rank}")


@pytest.mark.slow
def test_two_workers_make_the_weights_that_one_makes(tmp_path: Path):
    multiprocessing.spawn(_worker, args=(2, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    alone = new_trainer()
    start = copied_state(alone.encoder)
    losses = _train(alone, 0, 1)
    first, second = (safetensors.torch.load_file(tmp_path / f"weights{rank}") for rank in range(2))
    assert_same_state(first, second)
    for name, expected in copied_state(alone.encoder).items():
        assert torch.allclose(first[name].double(), expected.double(), atol=1e-5), name
    assert (alone.encoder.interest_to_item - start["interest_to_item"]).abs().max() > 1e-2  # there was much to agree on
    optimizer = safetensors.numpy.load_file(tmp_path / "optimizer0")
    assert np.allclose(optimizer["losses"], losses, rtol=1e-4)
    assert np.array_equal(optimizer["rows.steps"], alone.optimizer_state()["rows.steps"])


def test_a_new_row_moves_faster_at_first():
    config = TrainingConfig(new_row_boost=20.0, weight_decay=0.0)
    table, plain = torch.zeros(3, 4), torch.zeros(3, 4)
    boosted, usual = RowAdam(table, config), RowAdam(plain, replace(config, new_row_boost=0.0))
    for optimizer in (boosted, usual):
        optimizer.steps[2] = 10_000  # a row of long standing
    rows, gradient = torch.tensor([1, 2]), torch.ones(2, 4)
    for optimizer, values in ((boosted, table), (usual, plain)):
        optimizer.step(values, rows, gradient, 0.1)
    ratio = table[1:, 0] / plain[1:, 0]
    assert ratio[0] == pytest.approx(1 + 20 / (1 + 1 / 20), rel=1e-4)
    assert ratio[1] == pytest.approx(1.04, rel=1e-2)
