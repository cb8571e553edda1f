"""The engine: load a model by name or path; stream sequences through it and yield embeddings in input order."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import hub, ops, quantized, weights
from .compat.fair_esm import ProteinBertModel
from .memory import MappedFiles, without_values
from .models.esm1 import CONFIGS, ESM1
from .ops.common import spans
from .ops.registry import require_backend
from .packed import pack_model, why_not
from .packing import pack, plan
from .sequences.fasta import Records, read_fasta, records_from
from .sequences.tokenize import Policy, Report, Tokens, tokenize

POOLS = ("mean", "cls", "per_residue")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"int8": torch.int8}  # of the layers' matrices, with bfloat16 around them (see quantized.py)
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
# Batches planned together: enough to fill each one well, few enough to keep results waiting for their turn small.
_BATCHES_AHEAD = 8
_SPECIAL = 2  # <cls> and <eos>


def load(name_or_path, *, device="auto", dtype="auto", backend=None, packed=None):
    """Loads a model, as `esm.pretrained` does, and returns (model, alphabet).

    Args:
        name_or_path: a published name (esm1b_t33_650M_UR50S, facebook/esm-1b, esm1v_t33_650M_UR90S_1 ... 5), found in
            the torch-hub or Hugging Face cache or downloaded; a fair-esm .pt file; a Hugging Face folder; a file
            written by `esm-fast convert`; or random:NAME[:seed], that architecture with seeded random weights.
        device: "auto" (a GPU if there is one and the weights are not packed), or anything torch.device takes.
        dtype: "auto" (float32, the reference's numbers; that of a packed file), "float32", "bfloat16", "float16",
            "float64" or a torch.dtype. "int8": the layers' matrices in 8 bits, bfloat16 around them; for inference on
            CPUs, and less exact (docs/cpu.md says by how much).
        backend: name of a backend that must run every op it implements; None takes the best that can run.
        packed: whether the layers' matrices are held packed for the CPU kernels: half the memory, and for inference
            only. None: if the file is packed (`esm-fast convert --pack`), which is then mapped and used as it lies;
            True: yes; "auto": where the CPU kernels are going to run; False: no, all parameters are ordinary tensors.

    Raises:
        FileNotFoundError, weights.CheckpointError, ops.BackendError; ValueError, also with the reason why packed
        weights could not be used here.
    """
    require_backend(backend)
    if packed not in (None, True, False, "auto"):
        raise ValueError(f"packed is {packed!r}; choose one of None, True, False, 'auto'")
    wanted, name = _dtype(dtype), str(name_or_path)
    if wanted == torch.int8:
        quantized.require_int8(device, backend, packed)
    if name.startswith("random:"):
        model = random_model(name, backend=backend).to(_around(wanted))
    else:
        checkpoint = weights.read(hub.resolve(name_or_path))
        if packed is False:
            checkpoint = checkpoint.unpacked()
        elif checkpoint.packed:
            packed = True
            _require_own_dtype(checkpoint, wanted)
            wanted = checkpoint.dtype
        model = weights.build(checkpoint, ProteinBertModel, dtype=_around(wanted), backend=backend)
        del checkpoint  # or it would keep what packing drops
    if device == "auto":
        anywhere = packed is not True and wanted != torch.int8
        device = "cuda" if torch.cuda.is_available() and anywhere else "cpu"
    on_cpu = torch.device(device).type == "cpu"
    if packed is True and not on_cpu:
        raise ValueError(f"packed weights are for the CPU kernels, not for {device}; load with packed=False")
    if wanted == torch.int8:
        quantized.quantize_model(model, forget=MappedFiles().forget)
    elif packed is True or (packed == "auto" and on_cpu and why_not(model) is None):
        pack_model(model, forget=MappedFiles().forget)
    return model.eval().to(device), model.alphabet


def _around(wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of ordinary tensors."""
    return torch.bfloat16 if wanted == torch.int8 else wanted or torch.float32


def _require_own_dtype(checkpoint: weights.Checkpoint, wanted: torch.dtype | None) -> None:
    if wanted not in (None, checkpoint.dtype):
        own = str(checkpoint.dtype).removeprefix("torch.")
        raise ValueError(
            f"{checkpoint.source} holds {own} weights, packed; load it with dtype={own!r} or 'auto', or convert its "
            "original to the type you want"
        )


def random_model(name: str, *, backend=None) -> ProteinBertModel:
    """'random:NAME[:seed]' -> the full architecture with seeded random weights. Its numbers mean nothing."""
    _, architecture, *rest = name.split(":")
    architecture = hub.canonical_name(architecture)
    if architecture not in CONFIGS or len(rest) > 1 or not all(seed.isdecimal() for seed in rest):
        raise ValueError(f"{name!r}: expected random:NAME[:seed] with NAME one of {', '.join(CONFIGS)}")
    generator = torch.Generator().manual_seed(int(rest[0]) if rest else 0)
    with without_values():
        model = ProteinBertModel(CONFIGS[architecture], backend=backend)
    model = model.to_empty(device="cpu")
    model.lm_head.weight = model.embed_tokens.weight  # to_empty gives each its own
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if "layer_norm" in key and key.endswith("weight") else 0.0)
        for table in (model.embed_tokens, model.embed_positions):
            table.weight[table.padding_idx] = 0
    return model


def embed(
    model: ESM1,
    sequences,
    *,
    layers=(-1,),
    pool="mean",
    batch_tokens=None,
    unknown="error",
    empty="error",
    overlength="error",
    report: Report | None = None,
) -> Iterator[tuple[str, "Layers"]]:
    """Embeds proteins and yields (label, {layer: array}) in input order, as they are ready.

    Memory is bounded by the token budget, not by the input: sequences may be an endless stream.

    Args:
        model: from `load`.
        sequences: a FASTA path ("-" for standard input; plain, gz, bz2, xz or zst) or an open binary file; or an
            iterable of strings or (label, string) pairs.
        layers: 0 (the embedding) to the number of layers; negative numbers count from the last, -1.
        pool: "mean" over the residues (<cls> and <eos> never enter it), "cls", or "per_residue".
        batch_tokens: tokens in one batch, <cls> and <eos> included; default 4,096 on a CPU, 16,384 on a GPU.
        unknown: for residues ESM-1b does not know: "error", "x" (read as X) or "skip" (leave the record out).
        empty: for records without residues: "error" or "skip".
        overlength: for proteins over the model's 1,022 residues: "error", "truncate" (as fair-esm), or "window":
            windows of 1,022 overlapping by half, averaged per residue. Windows are our choice, not ESM-1b's.
        report: a `Report` to count into.

    Yields:
        (label, {layer: float32 array}): shape (embed_dim,), or (residues, embed_dim) for "per_residue".

    Raises:
        ValueError: for arguments; data.FastaError: for the input, naming file, record and column.
    """
    wanted = layer_numbers(model, layers)
    if not wanted:
        raise ValueError("layers is empty: ask for at least one, such as (-1,)")
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; choose one of {', '.join(POOLS)}")
    budget = token_budget(model, batch_tokens)
    policy = Policy(unknown=unknown, empty=empty, overlength=overlength, max_residues=model.config.max_residues)
    report = Report() if report is None else report
    tokens = (tokenize(records, policy, report) for records in _records(sequences))
    return _embed(model, tokens, wanted, pool, budget)


def _embed(model: ESM1, tokens: Iterable[Tokens], layers: list[int], pool: str, budget: int):
    for protein in run(model, tokens, [Output(pool, layer) for layer in layers], budget):
        arrays = dict(zip(layers, protein.arrays, strict=True))
        yield protein.label, Layers(arrays, model.config.layers)


def layer_numbers(model: ESM1, layers: Iterable[int]) -> list[int]:
    """The layers asked for, each once, ascending, negative ones counted from the last. Raises ValueError."""
    return sorted({_layer_number(layer, model.config.layers) for layer in layers})


def token_budget(model: ESM1, batch_tokens: int | None) -> int:
    """batch_tokens, or the default of the model's device for None. Raises ValueError for less than 1."""
    if batch_tokens is None:
        return BATCH_TOKENS.get(model.device.type, 4096)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    return batch_tokens


class Layers(dict):
    """{layer number: array}, in which negative numbers count from the last layer, as in the request."""

    def __init__(self, arrays: dict[int, np.ndarray], depth: int):
        super().__init__(arrays)
        self._depth = depth

    def __missing__(self, layer: int) -> np.ndarray:
        if isinstance(layer, int) and layer < 0 and (number := layer + self._depth + 1) in self:
            return self[number]
        raise KeyError(layer)


class Output(NamedTuple):
    """One array to make of each protein: a layer under one of POOLS, or its contact map (CONTACTS)."""

    pool: str
    layer: int = 0


CONTACTS = Output("contacts")  # (residues, residues) probabilities


class Protein(NamedTuple):
    """One protein's results: an array for each Output asked for, in that order."""

    label: str
    arrays: list[np.ndarray]


def run(
    model: ESM1, tokens: Iterable[Tokens], outputs: list[Output], budget: int, on_batch=lambda residues: None
) -> Iterator[Protein]:
    """Streams tokens through the model: the general form of `embed`, for writers that want several outputs at once.

    A protein over the model's length is cut into windows (see `embed`), which a contact map cannot be joined from:
    for CONTACTS, tokenize with overlength "error" or "truncate". After each batch, on_batch gets the residues done: a
    bar can move although the proteins, which come in input order, have to wait for each other.
    """
    joined = _Joiner(outputs)
    for group in _groups(_segments(tokens, model.config.max_residues), _BATCHES_AHEAD * budget):
        for segment, arrays in zip(group, _run(model, group, outputs, budget, on_batch), strict=True):
            if (complete := joined.add(segment, arrays)) is not None:
                yield Protein(segment.label, complete)


class _Segment(NamedTuple):
    """What the model sees at once: a whole protein, or one window of a long one."""

    label: str
    ids: np.ndarray  # the residues of the Tokens it belongs to
    start: int  # in ids
    length: int
    windows: np.ndarray  # where the protein's windows begin, relative to its first residue
    number: int  # which of these this is
    residues: int  # length of the whole protein

    @property
    def last(self) -> bool:
        return self.number == len(self.windows) - 1


def _segments(tokens: Iterable[Tokens], longest: int) -> Iterator[_Segment]:
    for chunk in tokens:
        for label, start, end in zip(chunk.headers, chunk.offsets[:-1], chunk.offsets[1:], strict=True):
            residues = int(end - start)
            windows = _windows(residues, longest)
            for number, at in enumerate(windows):
                length = min(longest, residues)
                yield _Segment(label, chunk.ids, int(start + at), length, windows, number, residues)


def _windows(residues: int, longest: int) -> np.ndarray:
    """Where windows of `longest` residues begin: every half window, and the last one flush with the end."""
    if residues <= longest:
        return np.zeros(1, dtype=np.int64)
    return np.append(np.arange(0, residues - longest, longest // 2 or 1), residues - longest)


def _groups(segments: Iterable[_Segment], limit: int) -> Iterator[list[_Segment]]:
    """Consecutive segments of at most `limit` tokens together (or a single one)."""
    group, size = [], 0
    for segment in segments:
        length = segment.length + _SPECIAL
        if group and size + length > limit:
            yield group
            group, size = [], 0
        group.append(segment)
        size += length
    if group:
        yield group


def _run(model: ESM1, group: list[_Segment], outputs: list[Output], budget: int, on_batch) -> list[list[np.ndarray]]:
    """Per segment of the group, one array an output."""
    lengths = np.array([segment.length for segment in group], dtype=np.int64)
    ids, starts = _join_ids(group)
    results: list = [None] * len(group)
    for chosen in plan(lengths + _SPECIAL, budget):
        made = _forward(model, pack(ids, starts, lengths, chosen), outputs, [group[i] for i in chosen])
        on_batch(sum(group[i].residues / len(group[i].windows) for i in chosen))
        for place, i in enumerate(chosen):
            results[i] = [of_output[place] for of_output in made]
    return results


def _join_ids(group: list[_Segment]) -> tuple[np.ndarray, np.ndarray]:
    """One array of residue ids, and where each segment starts in it. A group within one chunk needs no copy."""
    if all(segment.ids is group[0].ids for segment in group):
        return group[0].ids, np.array([segment.start for segment in group], dtype=np.int64)
    pieces = [segment.ids[segment.start : segment.start + segment.length] for segment in group]
    ends = np.cumsum([len(piece) for piece in pieces])
    return np.concatenate(pieces), np.concatenate([[0], ends[:-1]]).astype(np.int64)


@torch.inference_mode()
def _forward(model: ESM1, batch, outputs: list[Output], segments: list[_Segment]) -> list[list[np.ndarray]]:
    """Per output, one array a segment."""
    bounds = spans(batch.cu_seqlens)  # from the host's copy, so that nobody waits for a GPU's
    batch = batch.to(model.device)
    layers = {output.layer for output in outputs if output != CONTACTS}
    computed = model.forward_packed(batch, layers=layers, contacts=CONTACTS in outputs)
    made = []
    for output in outputs:
        if output == CONTACTS:
            made.append([map_[1:-1, 1:-1].float().cpu().numpy().copy() for map_ in computed.contacts])
        else:
            x = computed.representations[output.layer]
            made.append(_pooled(model, x, output.pool, batch.cu_seqlens, bounds, segments))
    return made


def _pooled(model: ESM1, x, pool: str, cu_seqlens, bounds, segments: list[_Segment]) -> list[np.ndarray]:
    """Per segment, (embed_dim,), or (residues, embed_dim) for per_residue. bounds: the rows of each."""
    if pool == "per_residue":
        rows = x.cpu().numpy()
        return [rows[start + 1 : end - 1].copy() for start, end in bounds]
    weight = np.zeros(len(x))
    for (start, end), segment in zip(bounds, segments, strict=True):
        if pool == "cls":
            weight[start] = 1
        else:  # each residue of the protein counts once, however many windows cover it
            weight[start + 1 : end - 1] = _share(segment) / segment.residues
    return list(ops.pool(x, cu_seqlens, torch.from_numpy(weight).to(x), backend=model.backend).cpu().numpy())


def _share(segment: _Segment) -> np.ndarray:
    """1 / (number of windows covering it), for every residue of the segment."""
    at = segment.windows[segment.number] + np.arange(segment.length)
    begun = np.searchsorted(segment.windows, at, side="right")
    ended = np.searchsorted(segment.windows, at - segment.length, side="right")
    return 1.0 / (begun - ended)


class _Joiner:
    """Puts the windows of a long protein together; a protein of one segment passes through."""

    def __init__(self, outputs: list[Output]):
        self.pools = [output.pool for output in outputs]
        self.sums: list[np.ndarray] = []

    def add(self, segment: _Segment, arrays: list[np.ndarray]) -> list[np.ndarray] | None:
        """One array an output once the protein is complete, else None."""
        if len(segment.windows) == 1:
            return arrays
        if CONTACTS.pool in self.pools:
            raise ValueError(f"{segment.label!r} has {segment.residues} residues: contacts cannot be made of windows")
        if segment.number == 0:
            self.sums = [
                np.zeros((segment.residues, array.shape[-1]) if pool == "per_residue" else array.shape, array.dtype)
                for pool, array in zip(self.pools, arrays, strict=True)
            ]
        for pool, total, array in zip(self.pools, self.sums, arrays, strict=True):
            if pool == "per_residue":
                at = segment.windows[segment.number]
                total[at : at + segment.length] += array * _share(segment)[:, None].astype(array.dtype)
            else:
                total += array / len(segment.windows) if pool == "cls" else array
        return self.sums if segment.last else None


def _records(sequences) -> Iterator[Records]:
    if isinstance(sequences, str) and sequences != "-" and not Path(sequences).exists():
        raise FileNotFoundError(f"no such FASTA file: {sequences!r} (to embed one protein, give a list: [sequence])")
    if isinstance(sequences, str | os.PathLike) or hasattr(sequences, "read"):
        return read_fasta(sequences)
    return records_from(sequences)


def _layer_number(layer: int, depth: int) -> int:
    if not -(depth + 1) <= layer <= depth:
        raise ValueError(
            f"layer {layer} does not exist: the model has 0 (the embedding) to {depth}, or -1 to {-depth - 1}"
        )
    return layer % (depth + 1)


def _dtype(dtype) -> torch.dtype | None:
    """The dtype to convert to; None for "auto"."""
    if isinstance(dtype, str) and dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    try:
        return DTYPES[dtype]
    except (KeyError, TypeError):
        raise ValueError(f"dtype is {dtype!r}; choose one of auto, {', '.join(DTYPES)}") from None
