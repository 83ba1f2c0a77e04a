"""The behaviour encoder: a person's recent events in, an interest vector out.

Notable features:
- one table of item embeddings serves as input and as output (tied), so a click on an item moves its vector too
- four inputs per event: the item, the kind of event, the time since the event before, the value (rating, price)
- positions are counted back from the newest event, so "the last thing they did" has one place at every length
- pre-norm blocks: causal attention and SwiGLU, each residual branch behind a sigmoid gate of its input
- sequences are padded on the right: under a causal mask no real event ever looks at padding, so no mask is built
- the score is s = uT A v with u and v of unit length and A learned (it starts as the identity)

Sources: SASRec (Kang & McAuley 2018) for the causal trunk; SwiGLU (Shazeer 2020); gated branches (Qiu et al. 2025,
"Gated attention for large language models"); L2-normalised softmax with temperature (Yi et al. 2019).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lib.events import InputError

PADDING_ROW = 0  # row 0 of the item table belongs to no item


class BehaviourEncoderConfig(PreTrainedConfig):
    """What a model folder's config.json holds: the encoder's shape and how events become its inputs."""

    model_type = "afterclick_behaviour_encoder"

    item_rows: int = 1  # rows of the item table, padding row and spare rows included
    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    max_length: int = 50  # events of a history that are read
    dropout: float = 0.3
    temperature: float = 0.05
    event_kinds: list[str] | None = None  # kind code = place in this list + 1
    value_boundaries: list[float] | None = None  # value bucket = number of boundaries at or below the value, + 1
    gap_buckets: int = 32  # log2 seconds
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        """Fill in the lists, which must not be shared between configurations.

        Raises:
            InputError: a width that the heads do not divide.
        """
        self.event_kinds = list(self.event_kinds or [])
        self.value_boundaries = list(self.value_boundaries or [])
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads != 0:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


class CausalAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: BehaviourEncoderConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, length, width = x.shape
        query, key, value = (
            self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )  # each (B, H, T, C / H)
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(attended.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """Feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: BehaviourEncoderConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm transformer block whose two residual branches pass a sigmoid gate."""

    def __init__(self, config: BehaviourEncoderConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = CausalAttention(config)
        self.attention_gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = SwiGLU(config)
        self.feed_forward_gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        h = self.attention_norm(x)
        x = x + self.dropout(torch.sigmoid(self.attention_gate(h)) * self.attention(h))
        h = self.feed_forward_norm(x)
        return x + self.dropout(torch.sigmoid(self.feed_forward_gate(h)) * self.feed_forward(h))


class BehaviourEncoder(PreTrainedModel):
    """Reads histories and gives one interest vector per position; the last real position is the user's."""

    config_class = BehaviourEncoderConfig
    config: BehaviourEncoderConfig
    item_popularity: Tensor
    popularity_reference: Tensor
    base_model_prefix = "encoder"
    main_input_name = "rows"

    def __init__(self, config: BehaviourEncoderConfig):
        super().__init__(config)
        assert config.event_kinds is not None
        assert config.value_boundaries is not None
        width = config.hidden_size
        self.item_embeddings = nn.Embedding(config.item_rows, width, padding_idx=PADDING_ROW)
        self.position_embeddings = nn.Embedding(config.max_length, width)
        self.kind_embeddings = nn.Embedding(len(config.event_kinds) + 1, width)
        self.gap_embeddings = nn.Embedding(config.gap_buckets, width)
        self.value_embeddings = nn.Embedding(len(config.value_boundaries) + 2, width)  # bucket 0: no value
        self.input_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.interest_to_item = nn.Parameter(torch.eye(width))  # A in s = uT A v
        # what is popular of late, for people of whom nothing is known; no gradient, but part of every version
        self.register_buffer("item_popularity", torch.zeros(config.item_rows))
        self.register_buffer("popularity_reference", torch.zeros(1, dtype=torch.int64))  # milliseconds
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, BehaviourEncoder):
            nn.init.eye_(module.interest_to_item)

    def forward(
        self,
        kinds: Tensor,
        gaps: Tensor,
        values: Tensor,
        lengths: Tensor,
        rows: Tensor | None = None,
        item_vectors: Tensor | None = None,
    ) -> Tensor:
        """Interest vectors u of every position, of unit length.

        Args:
            kinds: (B, T) kind code of each event, oldest first, padded on the right.
            gaps: (B, T) bucket of the time since the event before.
            values: (B, T) value bucket.
            lengths: (B,) number of real events of each history, 1 or more.
            rows: (B, T) rows of the item table; or else
            item_vectors: (B, T, C) rows already gathered, so that the trainer can own their gradient.

        Returns:
            (B, T, C); what stands at padded places has no meaning.
        """
        if item_vectors is None:
            assert rows is not None
            item_vectors = self.item_embeddings(rows)
        length = kinds.shape[1]
        places = (lengths[:, None] - 1 - torch.arange(length, device=kinds.device)).clamp(min=0)  # (B, T)
        x = (
            item_vectors
            + self.position_embeddings(places)
            + self.kind_embeddings(kinds)
            + self.gap_embeddings(gaps)
            + self.value_embeddings(values)
        )
        x = self.input_dropout(x)
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.final_norm(x), dim=-1)

    def interests(self, kinds: Tensor, gaps: Tensor, values: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """(B, C): the vector u of each history's newest event."""
        u = self(kinds, gaps, values, lengths, rows=rows)
        return u[torch.arange(len(lengths), device=u.device), lengths - 1]

    def queries(self, interests: Tensor) -> Tensor:
        """(B, C) u -> (B, C) uT A, whose inner product with an item vector v is the score s = uT A v."""
        return interests @ self.interest_to_item

    def item_vectors(self, rows: Tensor | None = None) -> Tensor:
        """(N, C) item vectors v of unit length, of the given rows or of all."""
        table = self.item_embeddings.weight
        return F.normalize(table if rows is None else table[rows], dim=-1)
