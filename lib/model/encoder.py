"""The behaviour encoder: a person's recent events in, an interest vector out.

Notable features:
- one table of item embeddings serves as input and as output (tied), so a click on an item moves its vector too
- inputs per event: the item (with its attributes), the kind of event, the time since the event before, the value
- positions are counted back from the newest event, so "the last thing they did" has one place at every length
- pre-norm blocks: causal attention and SwiGLU, each residual branch behind a sigmoid gate of its input; the gate and
  what it gates come of one matrix product
- dropout on the branches and not on attention weights (no loss of quality; a fifth of a step on a CPU)
- sequences are padded on the right: under a causal mask no real event ever looks at padding, so no mask is built; on a
  GPU in half precision the blocks run on the real events alone (variable-length attention)
- the score is s = uT A v with u and v of unit length and A learned (it starts as the identity)

Sources: SASRec (Kang & McAuley 2018) for the causal trunk; SwiGLU (Shazeer 2020); gated branches (Qiu et al. 2025,
"Gated attention for large language models"); L2-normalised softmax with temperature (Yi et al. 2019).
"""

from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.configuration_utils import PreTrainedConfig

from lib.data.ratings import STARS, RatingScale
from lib.errors import InputError
from lib.model.block import Block, Dropout, Packing
from lib.model.item_counts import ItemCounts
from lib.model.presets import DEFAULT_INPUTS, INPUTS
from lib.model.ranker import Ranker

WEIGHTS = "model.safetensors"
PADDING_ROW = 0  # row 0 of the item table belongs to no item


class BehaviourEncoderConfig(PreTrainedConfig):
    """What a model folder's config.json holds: the encoder's shape and how events become its inputs."""

    model_type = "afterclick_behaviour_encoder"

    item_rows: int = 1  # rows of the item table, padding row and spare rows included
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    max_length: int = 50  # events of a history that are read
    dropout: float = 0.3
    temperature: float = 0.05
    event_kinds: list[str] | None = None  # kind code = place in this list + 1
    value_boundaries: list[float] | None = None  # value bucket = number of boundaries at or below the value, + 1
    rating_scale: str = str(STARS)
    gap_buckets: int = 32  # log2 seconds
    inputs: list[str] | None = None  # of INPUTS
    attribute_values: list[str] | None = None  # "genres=Comedy": the code of an attribute is its place here + 1
    attributes_per_item: int = 1  # width of the table of codes
    neighbours: int = 0  # kept of each item and kind (lib/model/item_counts.py); 0: neither counts nor ranker
    ranker_features: int = 0
    repeats: bool = False  # people come back to items, so that what they have seen competes in their answers
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    @property
    def kind_codes(self) -> dict[str, int]:
        """The code of each kind of event; 0 is padding."""
        return {kind: place + 1 for place, kind in enumerate(self.event_kinds or [])}

    @property
    def ratings(self) -> RatingScale:
        """The scale of the ratings that are read."""
        return RatingScale.parse(self.rating_scale)

    def __post_init__(self, **kwargs):
        """Fill in the lists, which must not be shared between configurations.

        Raises:
            InputError: a width that the heads do not divide, or an unknown input.
        """
        self.event_kinds = list(self.event_kinds or [])
        self.inputs = list(DEFAULT_INPUTS if self.inputs is None else self.inputs)
        self.value_boundaries = list(self.value_boundaries or [])
        self.attribute_values = list(self.attribute_values or [])
        super().__post_init__(**kwargs)
        unknown = [name for name in self.inputs if name not in INPUTS]
        if unknown:
            raise InputError(f"inputs: {', '.join(unknown)} unknown; there are {', '.join(INPUTS)}")
        if self.hidden_size % self.num_attention_heads != 0:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


class BehaviourEncoder(nn.Module):
    """Reads histories and gives one interest vector per position; the last real position is the user's.

    A plain module that reads and writes the files of a PreTrainedModel: to import that costs a process 2.6 s of CPU,
    which every start of a replica would pay.
    """

    item_popularity: Tensor
    popularity_reference: Tensor
    item_attributes: Tensor

    def __init__(self, config: BehaviourEncoderConfig):
        super().__init__()
        self.config = config
        assert config.event_kinds is not None
        assert config.value_boundaries is not None
        assert config.attribute_values is not None
        width = config.hidden_size
        self.item_embeddings = nn.Embedding(config.item_rows, width, padding_idx=PADDING_ROW)
        self.position_embeddings = nn.Embedding(config.max_length, width)
        self.kind_embeddings = nn.Embedding(len(config.event_kinds) + 1, width)
        self.gap_embeddings = nn.Embedding(config.gap_buckets, width)
        self.value_embeddings = nn.Embedding(len(config.value_boundaries) + 2, width)  # bucket 0: no value
        self.activation_checkpointing = False  # blocks compute their activations anew in the backward pass
        self.input_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(width, config.intermediate_size, config.num_attention_heads, config.layer_norm_eps, config.dropout)
            for _ in range(config.num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(width, eps=config.layer_norm_eps, bias=False)
        self.interest_to_item = nn.Parameter(torch.eye(width))  # A in s = uT A v
        # what is popular of late, for people of whom nothing is known; no gradient, but part of every version
        self.register_buffer("item_popularity", torch.zeros(config.item_rows))
        # what each item is (lib/data/attributes.py); 0: nothing
        self.attribute_embeddings = nn.Embedding(len(config.attribute_values) + 1, width, padding_idx=PADDING_ROW)
        self.attribute_embeddings.requires_grad_(bool(config.attribute_values))
        for name in ("kind", "gap", "value"):
            self.get_submodule(f"{name}_embeddings").requires_grad_(name in (config.inputs or ()))
        self.register_buffer(
            "item_attributes", torch.zeros(config.item_rows, config.attributes_per_item, dtype=torch.int32)
        )
        self.register_buffer("popularity_reference", torch.zeros(1, dtype=torch.int64))  # the log offset of a 1
        self.counts: ItemCounts | None = None
        self.ranker: Ranker | None = None
        if config.neighbours:
            self.add_ranker(config.neighbours, config.ranker_features)
        self.apply(self._initialise)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read config.json and model.safetensors; ready to answer, not to be trained.

        Raises:
            OSError, ValueError, RuntimeError, safetensors.SafetensorError: a file is missing or damaged.
        """
        config = BehaviourEncoderConfig.from_pretrained(folder)
        with torch.device("meta"):  # no weights are drawn for those of the file to replace
            encoder = cls(config)
        encoder.load_state_dict(load_file(Path(folder) / WEIGHTS), assign=True)
        return encoder.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(state, Path(folder) / WEIGHTS, metadata={"format": "pt"})

    def _initialise(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)

    def add_ranker(self, neighbours: int, features: int) -> None:
        """Add empty counts with so many neighbours of each item, and a ranker of so many features."""
        self.config.neighbours, self.config.ranker_features = neighbours, features
        self.counts = ItemCounts(self.config.item_rows, neighbours)
        self.ranker = Ranker(features, len(self.config.event_kinds or ()))

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.interest_to_item.device

    def forward(
        self,
        kinds: Tensor,
        gaps: Tensor,
        values: Tensor,
        lengths: Tensor,
        rows: Tensor | None = None,
        item_vectors: Tensor | None = None,
    ) -> Tensor:
        """Return interest vectors u of every position, of unit length.

        Args:
            kinds: (B, T) kind code of each event, oldest first, padded on the right.
            gaps: (B, T) bucket of the time since the event before.
            values: (B, T) value bucket.
            lengths: (B,) number of real events of each history, 1 or more.
            rows: (B, T) rows of the item table; or else
            item_vectors: (B, T, C) what `described` gave for them, so that the trainer can own their gradient.

        Returns:
            (B, T, C); what stands at padded places has no meaning.
        """
        if item_vectors is None:
            assert rows is not None
            item_vectors = self.described(self.item_embeddings(rows), rows)
        x = self.embedded(kinds, gaps, values, lengths, item_vectors)
        return unit_length(self.trunk(self.input_dropout(x), lengths))

    def embedded(self, kinds: Tensor, gaps: Tensor, values: Tensor, lengths: Tensor, item_vectors: Tensor) -> Tensor:
        """Return (B, T, C) what the first block reads: each event's item, place, kind, gap and value added up."""
        length = kinds.shape[1]
        places = (lengths[:, None] - 1 - torch.arange(length, device=kinds.device)).clamp(min=0)  # (B, T)
        x = item_vectors + self.position_embeddings(places)
        for name, codes in (("kind", kinds), ("gap", gaps), ("value", values)):
            if name in (self.config.inputs or ()):
                x = x + self.get_submodule(f"{name}_embeddings")(codes)
        return x

    def trunk(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Run all blocks and the final norm, (B, T, C) -> (B, T, C); in half precision on a GPU without the padding."""
        packing = None
        if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            packing = Packing.of(lengths, x.shape[1])
        hidden = x if packing is None else packing.pack(x)
        for block in self.blocks:
            if self.training and self.activation_checkpointing:
                hidden = checkpoint(block, hidden, packing, use_reentrant=False)
            else:
                hidden = block(hidden, packing)
        hidden = self.final_norm(hidden).float()
        return hidden if packing is None else packing.unpack(hidden, len(x))

    def interests(self, kinds: Tensor, gaps: Tensor, values: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Return the vector u of each history's newest event, (B, C): the last block computes nothing of the others."""
        x = self.embedded(kinds, gaps, values, lengths, self.described(self.item_embeddings(rows), rows))
        *others, last = self.blocks
        assert isinstance(last, Block)
        for block in others:
            x = block(x, None)
        newest = torch.arange(len(x), device=x.device), lengths - 1
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]  # (B, T)
        return unit_length(self.final_norm(last.weights().newest(x, newest, padding)).float())

    def queries(self, interests: Tensor) -> Tensor:
        """Return (B, C) uT A of (B, C) u, whose inner product with an item vector v is the score s = uT A v."""
        return interests @ self.interest_to_item

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        """Return (N, C) item vectors v of unit length, of the given rows or of all."""
        rows = torch.arange(self.config.item_rows, device=self.item_embeddings.weight.device) if rows is None else rows
        return unit_length(self.described(self.item_embeddings.weight[rows], rows))

    def described(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Return (..., C) an item's embedding plus the mean of its attributes': items of a kind stand together."""
        if not self.config.attribute_values:
            return embeddings
        codes = self.item_attributes[rows]  # (..., F)
        count = (codes > 0).sum(dim=-1, keepdim=True).clamp(min=1)
        return embeddings + self.attribute_embeddings(codes).sum(dim=-2) / count


def unit_length(x: Tensor) -> Tensor:
    """Divide by the length over the last dimension; a zero vector stays zero."""
    unit = _UnitLength.apply(x)
    assert isinstance(unit, Tensor)
    return unit


class _UnitLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = 1 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        unit, inverse = ctx.saved_tensors
        gradient = gradients[0]
        along = (gradient * unit).sum(dim=-1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1).mul_(inverse)
