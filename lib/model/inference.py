"""The encoder's forward pass for answers: what `BehaviourEncoder.interests` gives, sooner.

The blocks are the encoder's own (lib/model/block.py). What is faster stands around them:

- Histories are aligned at their newest event, so that positions and the newest event are slices and not gathers.
- The inputs beside the item are one table, which is read once an event.
- No module is called, and tensors are looked up once a version.

On a GPU histories are encoded, searched for and ranked without leaving it.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.model.block import MASKED, Block, causal_attention
from lib.model.encoder import BehaviourEncoder

NEWEST = (slice(None), -1)


class InferenceEncoder:
    """One version of an encoder, ready to read histories; made anew when its weights change."""

    def __init__(self, encoder: BehaviourEncoder):
        config, state = encoder.config, encoder.state_dict()
        self.device, self.epsilon = encoder.device, config.layer_norm_eps
        self.items = state["item_embeddings.weight"]
        self.attributes = state["attribute_embeddings.weight"] if config.attribute_values else None
        self.item_attributes = state["item_attributes"]
        self.final_norm, self.interest_to_item = state["final_norm.weight"], state["interest_to_item"]
        self.inputs = [name for name in ("kind", "gap", "value") if name in (config.inputs or ())]
        tables = [state[f"{name}_embeddings.weight"] for name in self.inputs]
        self.sizes = [len(table) for table in tables]
        with torch.inference_mode():
            self.blocks = [block.weights() for block in encoder.blocks if isinstance(block, Block)]
            self.positions = state["position_embeddings.weight"].flip(0)  # (max_length, C), the newest event's last
            # (product of sizes, C) every combination of the inputs
            self.events = torch.zeros(1, config.hidden_size, device=self.device)
            for table in tables:
                self.events = (self.events[:, None] + table).flatten(0, 1)

    def queries(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Return (B, C) uT A of histories, each (4, T) int64 rows, kinds, gaps and values, the newest event last."""
        lengths = [history.shape[1] for history in histories]
        length = max(lengths)
        codes = np.zeros((4, len(histories), length), dtype=np.int64)
        for line, history in enumerate(histories):
            codes[:, line, length - lengths[line] :] = history
        with torch.inference_mode():
            padding = None
            if min(lengths) < length:
                padding = (torch.arange(length) < length - torch.tensor(lengths)[:, None]).to(self.device)  # (B, T)
            u = self._interests(torch.from_numpy(codes).to(self.device), padding)
            return u @ self.interest_to_item

    def _interests(self, codes: Tensor, padding: Tensor | None) -> Tensor:
        """Return (B, C) unit vectors u of (4, B, T) codes."""
        x = self._embedded(codes)
        *others, last = self.blocks
        if others:
            attention = causal_attention if padding is None else partial(causal_attention, mask=_mask(padding))
            for block in others:
                x = block.forward(x, attention)
        x = last.newest(x, NEWEST, padding)
        u = F.layer_norm(x, x.shape[-1:], self.final_norm, None, self.epsilon)
        return u.div_(u.norm(dim=-1, keepdim=True).clamp_(min=1e-12))

    def _embedded(self, codes: Tensor) -> Tensor:
        """Return what the first block reads: (4, B, T) -> (B, T, C)."""
        rows = codes[0]
        x = F.embedding(rows, self.items)
        if self.attributes is not None:
            attributes = F.embedding(rows.flatten(), self.item_attributes)  # (B * T, F)
            x += F.embedding_bag(attributes, self.attributes, mode="mean", padding_idx=0).view_as(x)
        if self.inputs:
            chosen = {"kind": codes[1], "gap": codes[2], "value": codes[3]}
            combined = chosen[self.inputs[0]]
            for name, size in zip(self.inputs[1:], self.sizes[1:], strict=True):
                combined = combined * size + chosen[name]
            x += F.embedding(combined, self.events)
        x += self.positions[-rows.shape[1] :]
        return x


def _mask(padding: Tensor) -> Tensor:
    """Return (B, 1, T, T) what keeps an event from later ones and from padding (B, T)."""
    length = padding.shape[1]
    future = torch.full((1, 1, length, length), MASKED, device=padding.device).triu_(1)
    return future.masked_fill(padding[:, None, None], MASKED)
