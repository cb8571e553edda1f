"""Everything that a model does, once: so that its kernels are compiled and loaded before the first real batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from .. import ops
from ..models.encoder import Encoder
from ..models.family import Config, of_config
from ..sequences.batching import PackedBatch, pack

# One sequence, several, and 16: compilers treat numbers that are 1, or multiples of 16, in ways of their own.
_SEQUENCES = (1, 3, 16)
_LENGTHS = (5, 9, 13)


def steps(config: Config, *, dtype: torch.dtype, device: str, backend: str | None, train: bool) -> Iterator[tuple]:
    """(what it is, a function that does it) for every use of a model of these sizes. Its weights are random, and one
    layer stands for all: they run the same kernels."""
    with torch.device(device):
        model = of_config(config).model(replace(config, layers=1), backend=backend).to(dtype).requires_grad_(train)
    uses = _TRAINING if train else _INFERENCE
    for name, use in uses.items():
        for count in _SEQUENCES:
            batch = _batch(count).to(device)
            yield f"{name}, {count} sequence{'s' * (count > 1)}", lambda use=use, batch=batch: _run(use, model, batch)
    size = 16
    while size < 2 * (config.window_residues + 2):
        yield f"attention maps of {size} tokens", lambda size=size: _softmax(model, size)
        size *= 2


def _run(use: Callable, model: Encoder, batch: PackedBatch) -> None:
    with torch.set_grad_enabled(any(parameter.requires_grad for parameter in model.parameters())):
        use(model, batch)


def _batch(count: int) -> PackedBatch:
    lengths = np.resize(np.array(_LENGTHS), count)
    ids = np.full(lengths.sum(), 5, dtype=np.uint8)
    return pack(ids, lengths.cumsum() - lengths, lengths, np.arange(count))


def _representations(model: Encoder, batch: PackedBatch) -> torch.Tensor:
    return model.forward_packed(batch, layers=(1,)).representations[1]


def _mean(model: Encoder, batch: PackedBatch) -> torch.Tensor:
    x = _representations(model, batch)
    return ops.pool(x, batch.cu_seqlens, torch.ones_like(x[:, 0]), backend=model.backend).sum()


def _padded(model: Encoder, batch: PackedBatch) -> torch.Tensor:
    """What the padded faces return."""
    out = model.forward_packed(batch, layers=(1,), logits=True)
    rows, size = torch.arange(len(batch.tokens), device=model.device), 2 * len(batch.tokens)
    packed = out.representations[1].to(model.dtype), out.logits
    return sum(ops.unpack_rows(x, rows, size, backend=model.backend).sum() for x in packed)


def _logits(model: Encoder, batch: PackedBatch) -> torch.Tensor:
    return model.forward_packed(batch, logits=True).logits


def _loss(model: Encoder, batch: PackedBatch) -> torch.Tensor:
    rows = torch.arange(2, device=model.device)
    return model.logits_of(_representations(model, batch), rows, rows)[1]


def _contacts(model: Encoder, batch: PackedBatch) -> torch.Tensor:
    return sum(map_.sum() for map_ in model.forward_packed(batch, contacts=True).contacts)


def _maps(model: Encoder, batch: PackedBatch) -> torch.Tensor:
    return sum(maps.sum() for maps in model.forward_packed(batch, attentions=True).attentions)


def _softmax(model: Encoder, size: int) -> None:
    """Maps in sizes of powers of two: kernels are made for each."""
    train = next(model.parameters()).requires_grad
    scores = torch.zeros(1, 1, size, size, dtype=model.dtype, device=model.device, requires_grad=train)
    lengths = torch.tensor([size], device=model.device)
    maps = ops.masked_softmax(scores, lengths, backend=model.backend)
    if train:
        maps.sum().backward()


_INFERENCE = {
    "representations": _representations,
    "mean": _mean,
    "logits": _logits,
    "padded outputs": _padded,
    "contacts": _contacts,
    "attention maps": _maps,
}
_TRAINING = {
    "gradients of the mean": lambda model, batch: _mean(model, batch).backward(),
    "gradients of the loss": lambda model, batch: _loss(model, batch).backward(),
    "gradients of the logits": lambda model, batch: _logits(model, batch).sum().backward(),
    "gradients of padded outputs": lambda model, batch: _padded(model, batch).backward(),
    "gradients of contacts": lambda model, batch: _contacts(model, batch).backward(),
    "gradients of attention maps": lambda model, batch: _maps(model, batch).backward(),
}
