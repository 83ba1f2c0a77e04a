"""One transformer block: causal attention and SwiGLU on pre-norm residual branches, each behind a sigmoid gate.

What a block computes is written once, in BlockWeights: for every event of a history or for its newest one alone, with
gradients or without. Without gradients it writes over its input and over what it no longer needs, because on a CPU
answers would spend a third of their time on new memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -1e30  # finite, so that a padded place, which sees nothing, is no NaN


class BlockWeights(NamedTuple):
    """A block's weights, and what is computed with them."""

    attention_norm: Tensor  # (C,)
    query_key_value_gate: Tensor  # (4C, C)
    output: Tensor  # (C, C)
    feed_forward_norm: Tensor  # (C,)
    inner_up_gate: Tensor  # (2I + C, C)
    down: Tensor  # (C, I)
    heads: int
    epsilon: float

    def forward(
        self, x: Tensor, attention: Callable[[Tensor], Tensor], dropout: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return the block's output for every event: (..., C) -> (..., C).

        Args:
            x: (B, T, C), or (N, C) where the attention is that of a Packing.
            attention: (..., 3, H, D) queries, keys and values -> (..., H, D).
            dropout: of each residual branch, in training.
        """
        width = x.shape[-1]
        normal = F.layer_norm(x, (width,), self.attention_norm, None, self.epsilon)
        query_key_value, gate = F.linear(normal, self.query_key_value_gate).split([3 * width, width], dim=-1)
        attended = attention(query_key_value.unflatten(-1, (3, self.heads, width // self.heads)))
        x = _add_gated(x, gate, F.linear(attended.flatten(-2), self.output), dropout)
        return self._feed_forward(x, dropout)

    def newest(self, x: Tensor, newest: tuple[slice | Tensor, int | Tensor], padding: Tensor | None) -> Tensor:
        """Return what `forward` gives at each history's newest event: (B, T, C) -> (B, C); no dropout.

        With one query a history, keys and values need not be computed: q (W x) = (q W) x, and the weighted mean of
        values is the projection of the weighted mean. That leaves two products of H rows with x.

        Args:
            x: (B, T, C).
            newest: the index of the newest events in x, such that x[newest] is (B, C).
            padding: (B, T) bool, the places that are no event; None for none.
        """
        batch, _, width = x.shape
        normal = F.layer_norm(x, (width,), self.attention_norm, None, self.epsilon)
        last = normal[newest]
        query_weight, key_weight, value_weight, gate_weight = self.query_key_value_gate.view(4, width, width)
        scale = (width // self.heads) ** -0.5
        query = torch.addmm(last, last, query_weight.t(), beta=0, alpha=scale)  # beta 0: the product alone, scaled
        query = query.view(batch, self.heads, -1).transpose(0, 1)  # (H, B, D)
        projected = torch.bmm(query, key_weight.view(self.heads, -1, width)).transpose(0, 1)  # (B, H, C)
        scores = torch.bmm(projected, normal.transpose(1, 2))  # (B, H, T)
        if padding is not None:
            scores.masked_fill_(padding[:, None], MASKED)
        pooled = torch.bmm(scores.softmax(dim=-1), normal).transpose(0, 1)  # (H, B, C)
        values = value_weight.view(self.heads, -1, width).transpose(1, 2)  # (H, C, D)
        attended = torch.bmm(pooled, values).transpose(0, 1).reshape(batch, width)
        return self._feed_forward(
            _add_gated(x[newest], F.linear(last, gate_weight), F.linear(attended, self.output), None), None
        )

    def _feed_forward(self, x: Tensor, dropout: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Return x + sigmoid(gate) * down(silu(inner) * up): (..., C) -> (..., C)."""
        width, inner_width = self.down.shape
        normal = F.layer_norm(x, (width,), self.feed_forward_norm, None, self.epsilon)
        inner, up, gate = F.linear(normal, self.inner_up_gate).split([inner_width, inner_width, width], dim=-1)
        inner = F.silu(inner)
        inner = inner * up if torch.is_grad_enabled() else inner.mul_(up)
        return _add_gated(x, gate, F.linear(inner, self.down), dropout)


def _add_gated(x: Tensor, gate: Tensor, branch: Tensor, dropout: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return x + sigmoid(gate) * branch; without gradients in the memory of x."""
    if torch.is_grad_enabled():
        return torch.addcmul(x, gate.sigmoid(), branch if dropout is None else dropout(branch))
    return x.addcmul_(gate.sigmoid_(), branch)


def causal_attention(heads: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend to earlier events and the event itself: (B, T, 3, H, D) queries, keys and values -> (B, T, H, D).

    Args:
        heads: the queries, keys and values of each event.
        mask: (B, 1, T, T) what is added to the scores, where causality alone does not do.
    """
    batch, length, _, count, width = heads.shape
    if heads.device.type != "cpu":
        query, key, value = heads.transpose(1, 3).unbind(2)  # each (B, H, T, D)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
    # torch's blockwise kernel takes up to twice as long on a CPU for many short sequences
    query, key, value = heads.permute(2, 0, 3, 1, 4).reshape(3, batch * count, length, width)
    if mask is None:
        mask = torch.full((length, length), MASKED, dtype=heads.dtype).triu_(1)
    else:
        mask = mask.expand(batch, count, length, length).reshape(batch * count, length, length)
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=width**-0.5)  # (B * H, T, T)
    return torch.bmm(scores.softmax(dim=-1), value).view(batch, count, length, width).transpose(1, 2)


@dataclass(frozen=True)
class Packing:
    """Where the real events of a padded batch are, so that no layer works on padding (on a GPU in half precision)."""

    places: Tensor  # (N,) of each real event in the flattened (B, T)
    offsets: Tensor  # (B + 1,) int32, where each sequence begins in N
    longest: int

    @classmethod
    def of(cls, lengths: Tensor, length: int) -> "Packing":
        """Return the packing of (B,) lengths, padded on the right to `length`."""
        real = torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, T)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(real.flatten().nonzero().flatten(), offsets, length)

    def pack(self, x: Tensor) -> Tensor:
        """Return the real events: (B, T, C) -> (N, C)."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Tensor, batch: int) -> Tensor:
        """Return the padded batch: (N, C) -> (B, T, C), zero at padded places."""
        padded = x.new_zeros(batch * self.longest, x.shape[-1]).index_copy(0, self.places, x)
        return padded.view(batch, self.longest, -1)

    def attend(self, heads: Tensor) -> Tensor:
        """Attend within each sequence, as `causal_attention` does: (N, 3, H, D) -> (N, H, D)."""
        query, key, value = heads.unbind(1)
        offsets, longest = self.offsets, self.longest
        if heads.device.type == "cpu":  # for tests: the kernel is CUDA's alone
            return torch.cat([causal_attention(part[None])[0] for part in heads.split(offsets.diff().tolist())])
        from torch.nn.attention.varlen import varlen_attn  # a second of imports that no CPU needs

        attended = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0))
        assert isinstance(attended, Tensor)
        return attended


class Dropout(nn.Module):
    """Dropout with cheap masks: torch draws them one by one on a CPU, which was a fifth of a training step."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x of any shape with some values zero; on a CPU the rate is rounded to 1/256."""
        threshold = round(self.rate * 256)
        if not self.training or threshold == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        # seeded by torch, so that torch.manual_seed and the recomputation of a checkpointed block give the same mask
        generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
        drawn = torch.from_numpy(generator.integers(0, 256, x.numel(), dtype=np.uint8))
        return x * (drawn >= threshold).view(x.shape).to(x.dtype).mul_(256 / (256 - threshold))


class Attention(nn.Module):
    """The weights of attention and its gate."""

    def __init__(self, width: int):
        super().__init__()
        self.query_key_value_gate = nn.Linear(width, 4 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)


class FeedForward(nn.Module):
    """The weights of SwiGLU and its gate."""

    def __init__(self, width: int, inner_width: int):
        super().__init__()
        self.inner_up_gate = nn.Linear(width, 2 * inner_width + width, bias=False)
        self.down = nn.Linear(inner_width, width, bias=False)


class Block(nn.Module):
    """A block as a module: its weights under their names, dropout, and what FSDP2 and torch.compile take hold of."""

    def __init__(self, width: int, inner_width: int, heads: int, epsilon: float, dropout: float):
        super().__init__()
        self.heads, self.epsilon = heads, epsilon
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width)
        self.feed_forward_norm = nn.LayerNorm(width, bias=False)
        self.feed_forward = FeedForward(width, inner_width)
        self.dropout = Dropout(dropout)

    def weights(self) -> BlockWeights:
        """Return the weights as they are now; the norms in float32, also where FSDP2 gathers them in half precision."""
        return BlockWeights(
            attention_norm=self.attention_norm.weight.float(),
            query_key_value_gate=self.attention.query_key_value_gate.weight,
            output=self.attention.output.weight,
            feed_forward_norm=self.feed_forward_norm.weight.float(),
            inner_up_gate=self.feed_forward.inner_up_gate.weight,
            down=self.feed_forward.down.weight,
            heads=self.heads,
            epsilon=self.epsilon,
        )

    def forward(self, x: Tensor, packing: Packing | None) -> Tensor:
        """Return the output for every event: (B, T, C) -> (B, T, C), or (N, C) -> (N, C) with a packing."""
        attention = causal_attention if packing is None else packing.attend
        return self.weights().forward(x, attention, self.dropout)
