"""What a large encoder needs: presets, half precision, checkpointing, packing, compiled blocks and sharded weights."""

import functools
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter

import lib.model.trainer
from jobs.configuration import settings_from
from jobs.pretrain import pretrain
from jobs.pretrain_settings import PretrainSettings, preset_of
from jobs.run_folder import RESULT
from jobs.training_data import TrainingData
from jobs.training_loop import Metrics, TrainingRun, TrainingWorker, training_config
from lib.data.catalog import Catalog
from lib.data.histories import Histories
from lib.errors import InputError
from lib.model.batches import Batch, SequenceBatches
from lib.model.block import Block, Packing
from lib.model.buckets import Figures, figures_of, figures_of_all
from lib.model.encoder import BehaviourEncoder
from lib.model.folder import load_model
from lib.model.presets import PRESETS, preset_for
from lib.model.trainer import StepResult, Trainer, TrainingConfig
from lib.versions.folder import OPTIMIZER_FILE
from tests.benchmarks.training_step import encoder_config
from tests.helpers.logs import wait_until
from tests.helpers.tiny import (
    assert_same_state,
    copied_state,
    item_ids,
    random_histories,
    tiny_config,
    tiny_encoder,
)

CONFIG = TrainingConfig(negatives=12, learning_rate=3e-3)

BLOCKS = {"num_hidden_layers": 2, "attribute_values": ["genres=Comedy", "genres=Drama"]}


def new_trainer(config: TrainingConfig = CONFIG, seed: int = 0, **changes) -> Trainer:
    """Two blocks, and items with attributes: every kind of dense weight is trained."""
    encoder = tiny_encoder(seed=seed, **(BLOCKS | changes))
    encoder.item_attributes[1:, 0] = torch.arange(24) % 3
    return Trainer(encoder, 24, config)


def batches_of(count: int, shard: int = 0, shards: int = 1) -> list[Batch]:
    histories = random_histories(30, 24, np.random.default_rng(0), longest=9)
    batches = SequenceBatches(histories, tiny_config()).epoch(40, np.random.default_rng(0), shard, shards)
    return list(batches)[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Sharded weights

# parts, so that some of a worker's are empty; a clip that bites
SHARDED = {
    "plain": replace(CONFIG, sharded=True, clip_norm=0.5),
    "parts": replace(CONFIG, sharded=True, accumulation=4, activation_checkpointing=True),
    "half": replace(CONFIG, sharded=True, precision="bfloat16", activation_checkpointing=True),
}


def _sharded_worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    batches = batches_of(8, rank, world)
    for name, config in SHARDED.items():
        trainer = new_trainer(config)
        results = [trainer.step(batch) for batch in batches[:5]]
        # half way a new trainer takes over what the first one saved
        weights, optimizer = dict(trainer.weights()), trainer.optimizer_state()
        trainer = new_trainer(config, seed=9)
        trainer.load_weights(weights)
        trainer.load_optimizer_state(optimizer)
        results += [trainer.step(batch) for batch in batches[5:]]
        shards = {name for name, parameter in trainer.encoder.named_parameters() if isinstance(parameter, DTensor)}
        assert shards == trainer.dense.keys()
        largest = trainer.dense["blocks.0.attention.query_key_value_gate.weight"]
        assert isinstance(largest, DTensor)
        assert largest.to_local().numel() * world == largest.numel()
        if rank == 0:
            figures = {field: np.array([getattr(r, field) for r in results]) for field in ("loss", "gradient_norm")}
            safetensors.torch.save_file(trainer.unsharded_encoder().state_dict(), f"{folder}/weights {name}")
            safetensors.numpy.save_file(trainer.optimizer_state() | figures, f"{folder}/optimizer {name}")
        else:
            trainer.join_all_gathers()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two sharded workers leave after eight steps of each configuration."""
    folder = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(_sharded_worker, args=(2, str(folder)), nprocs=2)  # type: ignore[attr-defined]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "parts"])
def test_two_sharded_workers_make_what_one_makes(sharded, name):
    alone = new_trainer(replace(SHARDED[name], accumulation=1, activation_checkpointing=False))
    start = copied_state(alone.encoder)
    results = [alone.step(batch) for batch in batches_of(8)]
    found = safetensors.torch.load_file(sharded / f"weights {name}")
    assert found.keys() == start.keys()
    for tensor, expected in alone.encoder.state_dict().items():
        assert torch.allclose(found[tensor].double(), expected.double(), atol=2e-5), tensor
    for tensor in ("interest_to_item", "attribute_embeddings.weight", "blocks.1.feed_forward.down.weight"):
        assert (found[tensor] - start[tensor]).abs().max() > 1e-2  # there was much to agree on
    optimizer = safetensors.numpy.load_file(sharded / f"optimizer {name}")
    assert np.allclose(optimizer["loss"], [result.loss for result in results], rtol=1e-4)
    assert np.allclose(optimizer["gradient_norm"], [result.gradient_norm for result in results], rtol=1e-3)
    for tensor, expected in alone.optimizer_state().items():
        assert np.allclose(optimizer[tensor], expected, rtol=1e-3, atol=1e-6), tensor


@pytest.mark.slow
def test_sharded_half_precision_stays_near_full(sharded):
    alone = new_trainer()
    losses = [alone.step(batch).loss for batch in batches_of(8)]
    optimizer = safetensors.numpy.load_file(sharded / "optimizer half")
    assert np.allclose(optimizer["loss"], losses, rtol=0.05)
    assert not np.allclose(optimizer["loss"], losses, rtol=1e-5)
    assert safetensors.torch.load_file(sharded / "weights half")["final_norm.weight"].dtype == torch.float32


@dataclass(frozen=True, kw_only=True)
class CountedLast(TrainingData):
    """Data that can be read for what is popular once the other worker has finished."""

    finished: Path

    def parts(self) -> Iterator[Histories]:
        wait_until(self.finished.exists)
        yield self.histories


def _finishing_worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    settings = PretrainSettings(sharded=True)
    histories = random_histories(30, 24, np.random.default_rng(0), longest=9)
    worker = TrainingWorker.__new__(TrainingWorker)  # without the context of Ray Train
    worker.run = TrainingRun(settings, folder, folder, folder, threads=1, reports=cast("Any", None))
    worker.data = CountedLast(histories, Catalog(item_ids(24)), finished=folder / "finished")
    worker.preset, worker.origin, worker.device = preset_of(settings, worker.data.figures), None, torch.device("cpu")
    worker.rank, worker.world_size = rank, world
    worker.trainer = new_trainer(SHARDED["plain"])
    worker.trainer.step(batches_of(1, rank, world)[0])
    worker.writer = SummaryWriter(str(folder / "tensorboard")) if rank == 0 else None
    worker.finish(Metrics(epoch=1, loss=1.0))
    if rank == 1:
        (folder / "finished").touch()


@pytest.mark.slow
def test_nobody_waits_while_one_worker_counts_what_is_popular(tmp_path):
    multiprocessing.spawn(_finishing_worker, args=(2, tmp_path), nprocs=2)  # type: ignore[attr-defined]
    encoder, _, manifest = load_model(tmp_path / RESULT)
    assert manifest.training.workers == 2
    assert float(encoder.item_popularity.sum()) > 0
    assert (tmp_path / RESULT / OPTIMIZER_FILE).exists()


def test_one_worker_has_nobody_to_share_with():
    trainer, plain = new_trainer(replace(CONFIG, sharded=True)), new_trainer()
    (batch,) = batches_of(1)
    assert trainer.step(batch).loss == plain.step(batch).loss
    assert trainer.unsharded_encoder() is trainer.encoder
    assert_same_state(copied_state(trainer.encoder), copied_state(plain.encoder))


@pytest.mark.slow
def test_sharded_workers_of_ray_train_leave_a_whole_model(small_model, shop_dataset, tmp_path):
    """Its numbers are near those of one worker, and not the same: each worker's dropout is its own."""
    settings = PretrainSettings(epochs=2, max_length=20, hidden_size=32, sharded=True)
    manifest = pretrain(shop_dataset, tmp_path / "model", settings, workers=2, gpu=False)
    assert (manifest.training.model_dump()["sharded"], manifest.training.workers) == (True, 2)
    alone, _, one = load_model(small_model)
    encoder, _, _ = load_model(tmp_path / "model")
    assert manifest.training.loss == pytest.approx(one.training.loss, rel=0.02)
    learned, expected = encoder.interest_to_item.flatten(), alone.interest_to_item.flatten()
    start = torch.eye(32).flatten()
    assert F.cosine_similarity(learned, expected, dim=0) > F.cosine_similarity(start, expected, dim=0)
    files = [small_model / OPTIMIZER_FILE, tmp_path / "model" / OPTIMIZER_FILE]
    ours, theirs = ({key: value.shape for key, value in safetensors.numpy.load_file(file).items()} for file in files)
    assert ours == theirs


# ---------------------------------------------------------------------------------------------------------------------
# Less memory, less work


def first_step(config: TrainingConfig, **changes) -> tuple[StepResult, Trainer]:
    trainer = new_trainer(config, **changes)
    torch.manual_seed(5)  # dropout
    return trainer.step(batches_of(1)[0]), trainer


def test_checkpointed_blocks_give_the_gradients_of_plain_ones_under_dropout():
    changes = {"dropout": 0.5}
    one, plain = first_step(CONFIG, **changes)
    other, checkpointed = first_step(replace(CONFIG, activation_checkpointing=True), **changes)
    assert one.loss == other.loss
    for name, parameter in plain.dense.items():
        found = checkpointed.dense[name].grad
        assert parameter.grad is not None
        assert found is not None
        assert torch.equal(parameter.grad, found), name


def test_checkpointing_runs_each_block_anew(monkeypatch):
    runs = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *arguments: runs.append(1) or forward(*arguments))
    first_step(CONFIG)
    assert len(runs) == 2
    first_step(replace(CONFIG, activation_checkpointing=True))
    assert len(runs) == 2 + 4


def test_half_precision_stays_near_full():
    one, _ = first_step(CONFIG)
    other, trainer = first_step(replace(CONFIG, precision="bfloat16"))
    assert other.loss == pytest.approx(one.loss, rel=0.02)
    assert other.loss != one.loss
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=0.1)
    assert {tensor.dtype for tensor in trainer.dense.values()} == {torch.float32}


def test_all_that_the_optimisers_keep_is_where_the_weights_are():
    """The meta device stands in for a card: kernels there take no tensor that is elsewhere."""
    with torch.device("meta"):
        encoder = BehaviourEncoder(tiny_config(**BLOCKS))
    trainer = Trainer(encoder, 24, CONFIG)
    kept = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    kept += [tensor for tensor in vars(trainer.row_optimizer).values() if isinstance(tensor, Tensor)]
    assert len(kept) == 3 * len(trainer.dense) + 3
    assert {tensor.device.type for tensor in kept} == {"meta"}
    rows, gradient = torch.zeros(3, dtype=torch.long, device="meta"), torch.zeros(3, 16, device="meta")
    trainer.row_optimizer.step(encoder.item_embeddings.weight, rows, gradient, 0.1)


def test_a_batch_in_more_parts_than_histories_is_the_batch():
    one, whole = first_step(CONFIG)
    other, parts = first_step(replace(CONFIG, accumulation=50))
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert other.targets == one.targets
    for name, expected in copied_state(whole.encoder).items():
        assert torch.allclose(copied_state(parts.encoder)[name], expected, atol=1e-4), name


def test_packed_blocks_give_what_padded_ones_give():
    encoder = tiny_encoder(num_hidden_layers=2)
    lengths = torch.tensor([3, 8, 1, 5])
    x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0))
    packing = Packing.of(lengths, 8)
    assert len(packing.places) == 17
    padded, packed = x, packing.pack(x)
    with torch.no_grad():
        for block in encoder.blocks:
            padded, packed = block(padded, None), block(packed, packing)
    real = torch.arange(8) < lengths[:, None]
    unpacked = packing.unpack(packed, 4)
    assert torch.allclose(unpacked[real], padded[real], atol=1e-5)
    assert not unpacked[~real].any()


def test_compiled_blocks_are_the_blocks(monkeypatch):
    """With the backend that only captures graphs: the machine may have no compiler."""
    captured = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]):
        captured.append(graph)
        return graph.forward

    monkeypatch.setattr(lib.model.trainer.torch, "compile", functools.partial(torch.compile, backend=backend))
    one, plain = first_step(CONFIG)
    other, compiled = first_step(replace(CONFIG, compile=True))
    assert captured
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    ours, theirs = copied_state(plain.encoder), copied_state(compiled.encoder)
    assert ours.keys() == theirs.keys()
    for name, expected in ours.items():
        assert torch.allclose(theirs[name], expected, atol=1e-5), name


# ---------------------------------------------------------------------------------------------------------------------
# Presets


@functools.cache
def trunk_parameters(name: str) -> int:
    """Weights of the blocks, counted where none of them takes memory."""
    with torch.device("meta"):
        encoder = BehaviourEncoder(encoder_config(PRESETS[name], items=1))
    return sum(parameter.numel() for parameter in encoder.blocks.parameters())


def test_presets_grow_and_the_largest_has_more_than_a_hundred_million_weights_in_its_blocks():
    sizes = [trunk_parameters(name) for name in PRESETS]
    assert sizes == sorted(sizes)
    assert sizes[1] > 100 * sizes[0]
    assert sizes[2] > 100_000_000
    for name in ("base", "large"):
        preset = PRESETS[name]
        assert preset.hidden_size // preset.num_attention_heads == 64
        assert preset.gpu_precision == "bfloat16"


def small_figures() -> Figures:
    return figures_of_all([figures_of(0, random_histories(5, 24, np.random.default_rng(0)))])


def test_every_preset_is_accepted_with_its_own_values():
    figures = small_figures()
    for name, preset in PRESETS.items():
        chosen = preset_of(PretrainSettings(preset=name), figures)
        assert chosen == (preset_for(figures.users_of_length, figures.items) if name == "small" else preset)
        values = {key: value for key, value in asdict(preset).items() if key != "gpu_precision"}
        settings = settings_from(PretrainSettings, None, [f"{key}={value}" for key, value in values.items()])
        as_on_small = replace(preset, gpu_precision="float32")  # the one value that was not set
        assert preset_of(settings, figures) == as_on_small


def test_what_is_set_wins_over_the_preset():
    figures = small_figures()
    chosen = preset_of(PretrainSettings(preset="large", epochs=3, activation_checkpointing=False), figures)
    assert (chosen.epochs, chosen.activation_checkpointing, chosen.hidden_size) == (3, False, 1024)
    assert preset_of(PretrainSettings(epochs=3), figures).max_length == 50  # chosen from the data


@pytest.mark.parametrize(
    ("items", "negatives"), [(0, 512), (1_000, 512), (5_866, 1024), (12_101, 2048), (2_000_000, 2048)]
)
def test_the_small_preset_takes_more_negatives_of_more_items(items, negatives):
    assert preset_for([[3, 10]], items).negatives == negatives
    assert preset_for([[3, 10]], items, "base") == PRESETS["base"]


@pytest.mark.parametrize(
    ("users_of_length", "length"), [([], 50), ([[50, 95], [51, 5]], 50), ([[50, 94], [51, 6]], 100)]
)
def test_the_small_preset_reads_more_events_where_more_than_a_twentieth_of_the_users_have_them(users_of_length, length):
    assert preset_for(users_of_length, items=100).max_length == length


@pytest.mark.parametrize(
    ("preset", "precision", "device", "expected"),
    [
        ("small", None, "cuda", "float32"),
        ("large", None, "cuda", "bfloat16"),
        ("large", None, "cpu", "float32"),
        ("large", "float32", "cuda", "float32"),
        ("small", "bfloat16", "cpu", "bfloat16"),
    ],
)
def test_precision_follows_preset_and_device_unless_set(preset, precision, device, expected):
    settings = PretrainSettings(preset=preset, precision=precision, accumulation=3, sharded=True, compile=True)
    chosen = preset_of(settings, small_figures())
    config = training_config(settings, chosen, torch.device(device))
    assert config.precision == expected
    assert (config.accumulation, config.sharded, config.compile) == (3, True, True)
    assert config.activation_checkpointing == (preset == "large")


@pytest.mark.parametrize(
    ("assignment", "objection"),
    [
        ("preset=huge", "preset: 'huge' is not one of small, base, large"),
        ("precision=float16", "precision: input should be 'float32' or 'bfloat16', got 'float16'"),
        ("accumulation=0", "accumulation: input should be greater than 0, got 0"),
        ("sharded=perhaps", "sharded: input should be a valid boolean, unable to interpret input, got 'perhaps'"),
    ],
)
def test_settings_that_cannot_be_are_refused(assignment, objection):
    with pytest.raises(InputError) as refused:
        settings_from(PretrainSettings, None, [assignment])
    assert str(refused.value) == objection
