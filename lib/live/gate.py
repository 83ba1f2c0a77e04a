"""The gate: what an update must pass before any replica sees it.

Five questions, each of which has its own blind spot, so that all are asked:

- Are all weights and losses finite?
- Is the loss as it has been, that of the training batch and that on held-out events? Judged by the median of the latest
  updates and their median absolute deviation, which a few outliers cannot move (Hampel 1974).
- Have the weights moved as far as they usually do? A learning rate that is wrong shows here first.
- Does the update rank the held-out window no worse than the live version? The window (lib/data/user_histories.py) holds
  the newest event of many users who act now, none of them in the update, few for any one item. What is judged is the
  answer: of a model with a ranker its order of what the ranking stage finds, so that an update that spoils ranker or
  counts is held back as one is that spoils the encoder.
- Have the updates of late, taken together, done harm? Each may stay within its tolerance while their sum does not. So
  new events are ranked before they are learned, by the live version and by a reference: the live version of some
  updates ago. Neither has seen them, so that the newer ought to be the better one. Where it is significantly worse, the
  learner goes back to the reference; and only a version that is no worse than the reference takes its place. Losses
  say sooner than ranks whether a difference is more than chance, so both must be worse.

What the gate remembers is of this process: after a restart the live version is the reference. The reference is asked
with the counts as they are now: new counts serve its encoder and its ranker as well, and would hide what these lost.
"""

import copy
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lib.data.catalog import Catalog
from lib.data.histories import Histories
from lib.data.history import History, to_histories
from lib.evaluation.metrics import ndcg_at
from lib.live.micro_batch import MicroBatch
from lib.model.batches import SequenceBatches, target_weights
from lib.model.delta import NO_ROWS, ROW_TENSORS, dense_state, state_of
from lib.model.dislikes import without_dislikes
from lib.model.encoder import BehaviourEncoder
from lib.model.item_counts import COUNT_TENSORS, people_of
from lib.model.ranker import RANKER_PREFIX
from lib.ranking.features import padded
from lib.ranking.stage import RankingStage, queries_of
from lib.retrieval.index import SomeRows
from lib.settings import Settings

TABLE = ROW_TENSORS[0]
COUNTS_PREFIX = "counts."
TO_SIGMA = 1.4826  # of a median absolute deviation, where what deviates is normal
FEWEST_LOSSES = 16  # that a baseline is made of
FEWEST_MOVEMENTS = 8  # that say what is usual
FEWEST_PAIRS = 64  # new events that the reference is judged by
FIRST_REST, LONGEST_REST = 8, 512  # updates
MOST_OF_AN_ITEM = 2  # of the new events of an update
ANSWER = 10  # items of the answer that is judged


class GateConfig(Settings):
    """What is held out, and how much worse an update may be."""

    held_out_users: int = Field(
        default=64, ge=0, description="users in the held-out window; 0 leaves only the checks that need no window"
    )
    held_out_length: int = Field(default=20, ge=1, description="events read before the one that is to be ranked")
    held_out_candidates: int = Field(
        default=1000, ge=1, description="random items among which it is ranked, beside all items of the update"
    )
    loss_tolerance: float = Field(
        default=0.25, ge=-1, description="share by which a loss may be above the live version's, or the usual one"
    )
    loss_deviations: float = Field(
        default=6.0, ge=0, description="standard deviations above the usual loss; the wider of the two bounds counts"
    )
    movement_tolerance: float = Field(
        default=4.0, ge=0, description="how many times as far as usual the weights may move"
    )
    usual_updates: int = Field(default=64, ge=1, description="latest updates that say what is usual")
    quality_tolerance: float = Field(
        default=0.05, ge=0, description="share by which NDCG@10 of the held-out window may fall"
    )
    deviations: float = Field(
        default=3.0, ge=0, description="standard errors from which on a difference is taken to be more than chance"
    )
    reference_updates: int = Field(
        default=32, ge=1, description="updates after which a version that is no worse becomes the reference"
    )
    reference_tolerance: float = Field(
        default=0.02, ge=0, description="share by which NDCG@10 of later versions may be below the reference's"
    )
    reference_users: int = Field(
        default=24, ge=0, description="users of an update whose new event the reference ranks, too; 0: no reference"
    )
    reference_events: int = Field(
        default=512, ge=1, description="latest of these events, by which versions since the reference are judged"
    )


@dataclass(frozen=True)
class Standing:
    """How a version ranks events, one line an event."""

    losses: np.ndarray  # (U,)
    ndcg: np.ndarray  # (U,) NDCG@10

    @property
    def loss(self) -> float:
        """Mean loss; NaN of no event."""
        return float(self.losses.mean()) if len(self.losses) else float("nan")

    @property
    def quality(self) -> float:
        """Mean NDCG@10; NaN of no event."""
        return float(self.ndcg.mean()) if len(self.ndcg) else float("nan")


NOTHING = Standing(np.zeros(0), np.zeros(0))


class Reference:
    """What the weights were at an earlier version, of just what has changed since; counts are always those of now."""

    def __init__(self, encoder: BehaviourEncoder, version: int, log_offset: int):
        self.version = version
        self.log_offset = log_offset
        self.updates = 0
        self.events = 0  # learned since
        dense = dense_state(encoder).items()
        self.dense = {name: tensor.clone() for name, tensor in dense if not name.startswith(COUNTS_PREFIX)}
        self.places = torch.full((encoder.config.item_rows,), -1)  # of a row in `values`, -1 where it has not changed
        self.values = encoder.item_embeddings.weight.new_zeros(0, encoder.config.hidden_size)
        self.count = 0

    def follow(self, rows: Tensor, values: Tensor) -> None:
        """Keep what rows (R,) held before an update changed them, values (R, C), where it is the first that did."""
        known = rows < len(self.places)  # later ones are of items that the reference does not have
        first = known.clone()
        first[known] = self.places[rows[known]] < 0
        fresh = rows[first]
        if self.count + len(fresh) > len(self.values):
            room = self.values.new_zeros(self.count + len(fresh), self.values.shape[1])
            self.values = torch.cat([self.values, room])
        self.values[self.count : self.count + len(fresh)] = values[first]
        self.places[fresh] = torch.arange(self.count, self.count + len(fresh))
        self.count += len(fresh)

    @contextmanager
    def in_place(self, encoder: BehaviourEncoder, rows: Tensor) -> Iterator[None]:
        """Within the block the encoder is the reference as far as `rows` (R,) go; after it it is itself, to the bit."""
        rows = rows[rows < len(self.places)]
        rows = rows[self.places[rows] >= 0]
        state = state_of(encoder)
        own_rows = state[TABLE][rows].clone()
        own_dense = {name: state[name].clone() for name in self.dense}
        try:
            state[TABLE][rows] = self.values[self.places[rows]]
            for name, values in self.dense.items():
                state[name].copy_(values)
            yield
        finally:
            state[TABLE][rows] = own_rows
            for name, values in own_dense.items():
                state[name].copy_(values)


class Gate:
    """Judges the updates of one encoder: `before` each, then `objection`, then `passed` for one that was published."""

    def __init__(
        self,
        config: GateConfig,
        encoder: BehaviourEncoder,
        catalog: Catalog,
        kind_codes: dict[str, int],
        seed: int = 0,
        stage: RankingStage | None = None,
    ):
        """Judge an encoder.

        Args:
            config: how strictly.
            encoder: whose updates are judged, in place.
            catalog: its items.
            kind_codes: its kinds of events.
            seed: draws the candidates.
            stage: that ranks by the encoder, and follows its counts; None where the encoder's order is the answer.
        """
        self.config = config
        self.encoder = encoder
        self.catalog = catalog
        self.kind_codes = kind_codes
        self.stage = stage
        self.spread = np.random.default_rng(seed).random(config.held_out_candidates)
        self.losses = {name: deque(maxlen=config.usual_updates) for name in ("training", "held-out")}
        self.movements: deque[float] = deque(maxlen=config.usual_updates)
        self.reference: Reference | None = None
        # of new events that neither had learned, the losses and the NDCG@10 of the live version and of the reference
        self.pairs: deque[tuple[float, ...]] = deque(maxlen=config.reference_events)
        self.rest = 0  # updates that are not learned, since those before did harm
        self.next_rest = FIRST_REST
        self.candidates = torch.zeros(0, dtype=torch.long)
        self.window = to_histories([], catalog, kind_codes)
        self.live = NOTHING

    def before(self, batch: MicroBatch, version: int, log_offset: int) -> None:
        """Look at the live version before it learns the batch, whose items the catalog has already."""
        self.candidates = self._candidates(batch)
        self.window = self._readable(batch.held_out)
        self.live = self._standing(self.window)
        if self.reference is None:
            self.reference = Reference(self.encoder, version, log_offset)
        elif self.reference.updates:
            fresh = self._readable(first_new_events(batch, self.config.reference_users))
            live = self._standing(fresh)
            needed = torch.unique(torch.cat([self.candidates, torch.from_numpy(fresh.rows.astype(np.int64))]))
            with self.reference.in_place(self.encoder, needed):
                earlier = self._standing(fresh)
            columns = (live.losses, earlier.losses, live.ndcg, earlier.ndcg)
            self.pairs.extend(zip(*(column.tolist() for column in columns), strict=True))

    @property
    def live_quality(self) -> float | None:
        """NDCG@10 of the live version on the held-out window; None without one."""
        return self.live.quality if len(self.live.ndcg) else None

    def resting(self) -> str | None:
        """Why nothing is learned for now, if so. What did harm a moment ago would do it again."""
        if self.rest == 0:
            return None
        self.rest -= 1
        return f"learning rests for {self.rest} more updates: what was learned before it had to be taken back"

    def went_back(self) -> None:
        """Rest, as the learner went back to the reference; twice as long each time until a version proves itself."""
        self.rest, self.next_rest = self.next_rest, min(2 * self.next_rest, LONGEST_REST)

    def since_reference(self) -> tuple[int, int, int]:
        """Return the reference's version and log offset, and the number of events that were learned since."""
        assert self.reference is not None
        return self.reference.version, self.reference.log_offset, self.reference.events

    def harm(self) -> str | None:
        """Return what the updates since the reference did together if it is harm: the learner then goes back to it."""
        if len(self.pairs) < FEWEST_PAIRS:
            return None
        loss, earlier_loss, quality, earlier_quality = np.array(self.pairs).T
        rise = loss - earlier_loss
        worse = rise.mean() > self.config.deviations * standard_error(rise)
        lost = earlier_quality.mean() - quality.mean()
        if not worse or lost <= self.config.reference_tolerance * earlier_quality.mean():
            return None
        assert self.reference is not None
        return (
            f"of new events the NDCG@10 is {quality.mean():.3f}, and that of version {self.reference.version}, "
            f"{self.reference.updates} updates ago, {earlier_quality.mean():.3f}"
        )

    def objection(
        self,
        loss: float | None,
        rows: Tensor,
        dense: Mapping[str, Tensor],
        counted: float = 1.0,
        count_rows: np.ndarray = NO_ROWS,
    ) -> str | None:
        """Return why an update must not go live, or None.

        Args:
            loss: of its training batch, None where there was nothing to train.
            rows: (R,) rows of the item table that it has changed.
            dense: the other tensors before it.
            counted: the share of its learning rate that it was made with.
            count_rows: (S,) rows of the counts that it has changed.
        """
        if not self._finite(rows, count_rows) or (loss is not None and not np.isfinite(loss)):
            return "a loss or a weight is not finite"
        after = self._standing(self.window)
        return (
            self._too_far(dense, counted)
            or self._worse(after)
            or self._spike("training", float("nan") if loss is None else loss)
            or self._spike("held-out", after.loss)
        )

    def passed(self, events: int, version: int, log_offset: int, changed: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Follow an update that was published as a version: `changed` are its rows and their embeddings before it."""
        reference = self.reference
        assert reference is not None
        for rows, values in changed:
            reference.follow(rows, values)
        reference.updates += 1
        reference.events += events
        if reference.updates % self.config.reference_updates == 0 and self._no_worse():
            self.forget()
            self.reference = Reference(self.encoder, version, log_offset)
            self.next_rest = FIRST_REST

    def forget(self) -> None:
        """Forget the reference, as the weights are others now: the next live version is the reference."""
        self.reference = None
        self.pairs.clear()

    def _no_worse(self) -> bool:
        if not self.pairs:
            return True
        _, _, quality, earlier_quality = np.array(self.pairs).T
        return bool(quality.mean() >= earlier_quality.mean())

    def _finite(self, rows: Tensor, count_rows: np.ndarray) -> bool:
        state = state_of(self.encoder)
        changed = [*dense_state(self.encoder).values(), *(state[name][rows] for name in ROW_TENSORS)]
        if len(count_rows):
            changed += [state[name][torch.from_numpy(count_rows)] for name in COUNT_TENSORS]
        return all(bool(torch.isfinite(tensor).all()) for tensor in changed)

    def _too_far(self, dense: Mapping[str, Tensor], counted: float) -> str | None:
        """Return how much farther than usual the weights have moved, if that is too far; remembered in either case.

        So a change that lasts, as of the scale of what people do, is usual in the end.
        """
        state = state_of(self.encoder)
        floating = [
            name for name, tensor in dense.items() if tensor.is_floating_point() and not name.startswith(RANKER_PREFIX)
        ]
        moved = float(sum(((state[name] - dense[name]) ** 2).sum() for name in floating)) ** 0.5 / max(counted, 1e-3)
        if moved == 0.0:
            return None
        usual = float(np.median(self.movements)) if len(self.movements) >= FEWEST_MOVEMENTS else float("inf")
        self.movements.append(moved)
        if moved <= self.config.movement_tolerance * usual:
            return None
        return f"the weights moved {moved / usual:.1f} times as far as they usually do"

    def _worse(self, after: Standing) -> str | None:
        """Return how the update ranks the window, if that is worse than the live version does."""
        live = self.live
        rise = after.losses - live.losses
        beyond = rise.mean() - self.config.loss_tolerance * live.loss if len(rise) > 1 else 0.0  # one user says nothing
        if beyond > self.config.deviations * standard_error(rise):
            return f"the held-out loss rose from {live.loss:.3f} to {after.loss:.3f}"
        lost = live.ndcg - after.ndcg
        tolerance, chance = self.config.quality_tolerance * live.quality, self.config.deviations * standard_error(lost)
        if len(lost) and lost.mean() > max(tolerance, chance):
            return f"the held-out NDCG@10 fell from {live.quality:.3f} to {after.quality:.3f}"
        return None

    def _spike(self, name: str, loss: float) -> str | None:
        """Whether a loss stands out from the latest ones. It is remembered also where it does: what lasts is usual."""
        if np.isnan(loss):
            return None
        known = np.array(self.losses[name])
        self.losses[name].append(loss)
        if len(known) < FEWEST_LOSSES:
            return None
        usual = float(np.median(known))
        deviation = TO_SIGMA * float(np.median(np.abs(known - usual)))
        bound = usual + max(self.config.loss_deviations * deviation, self.config.loss_tolerance * usual)
        return f"the {name} loss of {loss:.3f} is a spike: of late it was {usual:.3f}" if loss > bound else None

    def _candidates(self, batch: MicroBatch) -> Tensor:
        """(K,) rows that events are ranked among; those of the batch are what an update moves most."""
        spread = 1 + (self.spread * len(self.catalog)).astype(np.int64)
        own = self.catalog.rows(batch.new_item_ids())
        return torch.unique(torch.from_numpy(np.concatenate([spread, np.asarray(own, dtype=np.int64)])))

    def _readable(self, histories: Sequence[History]) -> Histories:
        """Those whose newest event was liked, and has one before it, as the encoder reads them."""
        newest = [history.newest(self.config.held_out_length + 1) for history in histories]
        flat = to_histories(newest, self.catalog, self.kind_codes)
        last = flat.offsets[1:][flat.lengths >= 2] - 1
        liked = (
            target_weights(flat.kinds[last], flat.values[last], list(self.kind_codes), self.encoder.config.ratings) > 0
        )
        return flat.take(np.flatnonzero(flat.lengths >= 2)[liked])

    @torch.no_grad()
    def _standing(self, flat: Histories) -> Standing:
        """How the model as it is ranks the newest event of each history among the candidates."""
        if len(flat) == 0:
            return NOTHING
        self.encoder.eval()
        targets = flat.rows[flat.offsets[1:] - 1].astype(np.int64)
        if self.stage is None:
            return self._of_the_encoder(flat.without_newest(), torch.from_numpy(targets))
        return self._of_the_answer(self.stage, flat.without_newest(), targets)

    def _of_the_encoder(self, flat: Histories, targets: Tensor) -> Standing:
        losses, ndcg = np.zeros(len(flat)), np.zeros(len(flat))
        vectors = self.encoder.item_vectors(self.candidates)
        for places, part in SequenceBatches(flat, self.encoder.config).inference():
            u = self.encoder.interests(part.kinds, part.gaps, part.values, part.lengths, part.rows)
            queries = self.encoder.queries(u)
            wanted = targets[torch.from_numpy(places)]
            own = (queries * self.encoder.item_vectors(wanted)).sum(-1)
            rest = queries @ vectors.T
            rest = rest.masked_fill(wanted[:, None] == self.candidates[None, :], float("-inf"))
            temperature = self.encoder.config.temperature
            losses[places], ndcg[places] = _losses_and_ndcg(own / temperature, rest / temperature)
        return Standing(losses, ndcg)

    def _of_the_answer(self, stage: RankingStage, flat: Histories, targets: np.ndarray) -> Standing:
        """How the stage ranks targets (U,) among what it finds of the candidates; one that it misses is its last."""
        known = len(stage.popularity.shares)  # rows: of items that are new with this update it knows nothing at first
        flat = flat.select(flat.rows < known)
        among = np.union1d(self.candidates.numpy(), targets)
        among = among[among < known]
        stage = copy.copy(stage)
        stage.index = SomeRows(among, self.encoder.item_vectors(torch.from_numpy(among)).numpy())
        mask = np.zeros(known, dtype=bool)
        mask[among] = True
        liked, _ = without_dislikes(flat, self.encoder.config)
        people = people_of(flat, liked)
        features, rows = padded(stage.candidates(people, queries_of(self.encoder, liked), ANSWER, mask), len(people))
        kinds = torch.tensor([person.kind for person in people], dtype=torch.int64)
        absent = torch.isneginf(features[..., 0])
        logits = stage.ranker.logits(features.masked_fill(absent[..., None], 0.0), kinds[:, None].expand(absent.shape))
        hits = torch.from_numpy(rows == targets[:, None]) & ~absent
        last = logits.masked_fill(absent, float("inf")).amin(dim=1)
        last = last.where(torch.isfinite(last), 0.0)  # nothing is found for who has seen all of them
        own = torch.where(hits.any(dim=1), logits.masked_fill(~hits, float("-inf")).amax(dim=1), last)
        return Standing(*_losses_and_ndcg(own, logits.masked_fill(absent | hits, float("-inf"))))


def _losses_and_ndcg(own: Tensor, rest: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the cross-entropy and the NDCG@10 of logits (U,) beside those of other candidates (U, K)."""
    ranks = (rest >= own[:, None]).sum(dim=1).numpy()  # ties count against it: where all are alike, nothing is found
    losses = torch.logsumexp(torch.cat([own[:, None], rest], dim=1), dim=1) - own
    return losses.numpy(), ndcg_at(ranks, ANSWER)


def first_new_events(batch: MicroBatch, count: int) -> list[History]:
    """Histories that end at their user's first new event, those first that say most of their user.

    So a user counts once, an item no more than twice, and a crowd that came for this one event comes last.
    """
    found: list[History] = []
    items: Counter[str] = Counter()
    new = zip(batch.histories, batch.new, strict=True)
    for history, places in sorted(new, key=lambda each: -each[1][0]):
        history = history.slice(0, places[0] + 1)
        if len(found) == count or len(history) < 2:
            break
        items[history.item_ids[-1]] += 1
        if items[history.item_ids[-1]] <= MOST_OF_AN_ITEM:
            found.append(history)
    return found


def standard_error(values: np.ndarray) -> float:
    """Of the mean; 0 where there are too few values to tell."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
