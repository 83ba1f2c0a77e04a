"""Training steps of an encoder on synthetic histories: sequences and events a second, memory, utilisation.

Histories are as long as people's are: log-normal, most of them short, cut at the preset's length; items follow Zipf's
law. Batches are made before the clock starts, and the steps are whole ones: transfer, forward, backward, both
optimisers.

Model-flops utilisation is that of PaLM (Chowdhery et al. 2022, appendix B): the flops that the model needs, whether or
not its implementation spends more (recomputed activations do not count), over what the GPU could do in that time:

    flops per event = 6 N + 12 L C (mean attended length)
    utilisation     = flops per event x events per second / peak flops of the GPU

N are the weights of the blocks, L the blocks, C the width. PaLM's attention term, 12 L C T, is that of full attention;
under a causal mask the event at place t attends to t + 1 events, so of a history of n events (n + 1) / 2 on average,
weighted by events. Only real events count, padding does not. The item table, whose rows are looked up and not
multiplied, and the sampled softmax are left out.

Nothing here needs more than torch, transformers, pyarrow and numpy.
"""

import resource
import time
from typing import Any

import numpy as np
import torch

from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories
from lib.model.batches import Batch, SequenceBatches
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.presets import Preset
from lib.model.trainer import Trainer, TrainingConfig

# dense bfloat16 tensor-core flops a second, by a word of the GPU's name (NVIDIA's data sheets, without sparsity)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # H100: SXM
FLOPS_PER_EVENT = "6 x weights of the blocks + 12 x blocks x width x mean attended length (PaLM, appendix B; causal)"
MEDIAN_LENGTH, SPREAD = 60, 1.2  # of the log-normal lengths
NEWEST = 1_700_000_000_000  # milliseconds
DAY = 86_400_000


def encoder_config(preset: Preset, items: int) -> BehaviourEncoderConfig:
    """Return the configuration that pretraining would make of a preset for so many items."""
    return BehaviourEncoderConfig(
        item_rows=items + 1,
        **preset.shape(),
        event_kinds=list(EVENT_KINDS),
        value_boundaries=[2.0, 3.0, 4.0, 5.0],
    )


def synthetic_histories(events: int, items: int, generator: np.random.Generator) -> Histories:
    """Draw users with about so many events together: log-normal lengths of 2 or more, items by Zipf's law."""
    mean = MEDIAN_LENGTH * np.exp(SPREAD**2 / 2)
    users = max(int(events / mean), 1)
    lengths = np.maximum(generator.lognormal(np.log(MEDIAN_LENGTH), SPREAD, users).astype(np.int64), 2)
    count = int(lengths.sum())
    # the inverse of the distribution function of density 1 / rank
    rows = np.exp(generator.random(count) * np.log(items)).astype(np.int32)
    return Histories(
        [f"u{user}" for user in range(users)],
        np.concatenate([[0], np.cumsum(lengths)]),
        rows,
        generator.integers(1, len(EVENT_KINDS) + 1, count).astype(np.int8),
        np.full(count, np.nan, dtype=np.float32),
        NEWEST + np.cumsum(generator.integers(1, DAY, count)),
    )


def synthetic_batches(
    config: BehaviourEncoderConfig, items: int, events_per_batch: int, count: int, seed: int
) -> list[Batch]:
    """Make so many training batches."""
    generator = np.random.default_rng(seed)
    batches: list[Batch] = []
    while len(batches) < count:
        histories = synthetic_histories(2 * count * events_per_batch, items, generator)
        for batch in SequenceBatches(histories, config).epoch(events_per_batch, generator):
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def flops_per_event(trunk_parameters: int, layers: int, width: int, attended_length: float) -> float:
    """Count the flops of forward and backward, as the module's docstring says."""
    return 6 * trunk_parameters + 12 * layers * width * attended_length


def attended_length(lengths: np.ndarray) -> float:
    """Return how many events an event attends to, itself included, on average over all events."""
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def peak_flops(gpu: str) -> float | None:
    """Return the peak of the GPU with this name, or None where it is not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    preset: Preset, config: TrainingConfig, device: torch.device, items: int, warm_up: int, steps: int
) -> dict[str, Any]:
    """Train for some steps and return one flat document of figures."""
    torch.manual_seed(config.seed)
    with device:
        encoder = BehaviourEncoder(encoder_config(preset, items))
    batches = synthetic_batches(encoder.config, items, preset.events_per_batch, warm_up + steps, config.seed)
    trainer = Trainer(encoder, items, config)
    for batch in batches[:warm_up]:
        trainer.step(batch.to(device))
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, losses, times = time.perf_counter(), [], []
    for batch in batches[warm_up:]:
        begin = time.perf_counter()
        losses.append(trainer.step(batch.to(device)).loss)  # it reads the loss back, and so waits for the GPU
        times.append((time.perf_counter() - begin) * 1e3)
    synchronize(device)
    seconds = time.perf_counter() - start
    lengths = np.concatenate([batch.lengths.numpy() for batch in batches[warm_up:]])
    padded = sum(batch.rows.numel() for batch in batches[warm_up:])
    trunk = sum(parameter.numel() for parameter in encoder.blocks.parameters())
    attended = attended_length(lengths)
    flops = flops_per_event(trunk, preset.num_hidden_layers, preset.hidden_size, attended)
    flops *= float(lengths.sum()) / seconds
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "trunk_parameters": trunk,
        "item_parameters": encoder.item_embeddings.weight.numel(),
        "sequences_per_second": len(lengths) / seconds,
        "events_per_second": float(lengths.sum()) / seconds,
        "step_p50_ms": float(np.median(times)),
        "step_max_ms": max(times),
        "peak_memory_bytes": peak_memory(device),
        "padding_share": 1 - float(lengths.sum()) / padded,
        "mean_length": float(lengths.mean()),
        "mean_attended_length": attended,
        "model_flops_per_second": flops,
        "model_flops_utilisation": None if peak is None else flops / peak,
        "last_loss": losses[-1],
    }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that torch has had allocated on the GPU in the timed steps, or the process resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
