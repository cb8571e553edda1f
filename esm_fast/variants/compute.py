"""The model's part of variant effects: log-probabilities at the rows that are wanted, and nothing else."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..alphabet import PAD
from ..inference.outputs.logits import of_rows
from ..models.encoder import Encoder
from ..sequences.batching import PackedBatch, plan


def log_probs_of(
    model: Encoder,
    contexts: Sequence[bytes],
    rows: Sequence[np.ndarray],
    batch_tokens: int,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Log-softmax over all 33 tokens, in float64.

    Each context is computed once, packed with others under the token budget, which does not show in the numbers.

    Args:
        contexts: token ids, a byte each, as the model gets them: with <cls> and <eos> where there are any.
        rows: per context the indices, ascending, of the tokens whose predictions are wanted: the last layer's
            feed-forward block and the head run on these alone.
        on_batch: is given the tokens done after each batch.

    Yields:
        (number of the context, (rows, 33)), in an order of its own.
    """
    if model.lm_head is None:
        raise ValueError("the model has no language-model head, so it gives no probabilities to compare variants by")
    lengths = np.array([len(context) for context in contexts], dtype=np.int64)
    for chosen in plan(lengths, batch_tokens):
        parts = [np.frombuffer(contexts[i], np.uint8) for i in chosen]
        wanted = [rows[i] for i in chosen]
        found = _forward(model, parts, wanted)
        ends = np.cumsum([len(part) for part in wanted])[:-1]
        yield from zip(chosen.tolist(), np.split(found, ends), strict=True)
        on_batch(int(lengths[chosen].sum()))


@torch.inference_mode()
def _forward(model: Encoder, parts: list[np.ndarray], wanted: list[np.ndarray]) -> np.ndarray:
    """(all rows wanted, 33), the sequences' one after the other."""
    lengths = np.array([len(part) for part in parts])
    starts = np.cumsum(lengths) - lengths
    batch = _packed(parts, lengths).to(model.device)
    rows = np.concatenate([start + rows for start, rows in zip(starts, wanted, strict=True)])
    logits = of_rows(model, model.forward_packed(batch, rows=torch.from_numpy(rows).to(model.device)).rows)
    return torch.log_softmax(logits.double(), dim=-1).cpu().numpy()


def _packed(parts: list[np.ndarray], lengths: np.ndarray) -> PackedBatch:
    """Token ids end to end, as they are: `batching.pack` would put <cls> and <eos> around each."""
    positions = np.concatenate([np.arange(PAD + 1, PAD + 1 + length, dtype=np.int32) for length in lengths])
    tokens = torch.from_numpy(np.concatenate(parts).astype(np.int32))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return PackedBatch(tokens, torch.from_numpy(positions), offsets, int(lengths.max()), torch.arange(len(parts)))
