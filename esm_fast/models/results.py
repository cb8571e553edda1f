"""What a forward pass of a model gives."""

from dataclasses import dataclass, field

import torch


@dataclass
class Outputs:
    """What was asked for, in packed order. T is a sequence's length in tokens, <cls> and <eos> included.

    representations: {layer: (n, embed_dim)}, layer 0 the embedding, k < layers the stream after block k, the last after
        the final layer norm; in fp32 (fp64) even for half weights.
    pooled: what `pools` made, in their order. rows: (m, embed_dim), the last representation at the rows asked for.
    logits: (n, 33). attentions: per sequence (layers, heads, T, T).
    contacts: per sequence (T, T) probabilities; rows and columns of <cls> and <eos> hold the regression's bias alone.
    """

    representations: dict[int, torch.Tensor] = field(default_factory=dict)
    pooled: list[torch.Tensor] = field(default_factory=list)
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    attentions: list[torch.Tensor] | None = None
    contacts: list[torch.Tensor] | None = None
