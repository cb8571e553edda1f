"""The C++ extension: the data path, the CPU kernels and their weights.

Tensors are checked here: one of another dtype, shape, layout or device than a kernel reads is a ValueError that names
it, so no call reads or writes outside them. Kernels write into the tensors called `result`, `out`, `logits`, `loss`,
and `d` and a name (gradients). See csrc/cpu/ops for shapes, docs/cpu.md for what is computed how.
"""

from collections.abc import Buffer, Callable, Sequence

import numpy as np
import torch

# --- threads, and bytes to batches (csrc/bindings.cpp)

def threads() -> int: ...
def set_threads(n: int) -> None: ...

class FastaParser:
    def __init__(self, limit: int) -> None: ...
    def feed(self, data: Buffer) -> None: ...
    def finish(self) -> None: ...
    def take(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]: ...
    @property
    def ready(self) -> int: ...
    @property
    def stray(self) -> tuple[int, bytes] | None: ...
    @property
    def large(self) -> tuple[int, bytes] | None: ...

def encode_texts(
    strings: tuple[str, ...], limit: int
) -> tuple[np.ndarray, None] | tuple[None, tuple[int, int, int]]: ...
def encode_records(
    residues: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
def plan(lengths: np.ndarray, budget: int) -> list[np.ndarray]: ...
def pack(
    ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]: ...
def piece_checksums(data: Buffer, bounds: np.ndarray) -> np.ndarray: ...

# --- prepacked weights (csrc/cpu/bindings/weights.cpp)

LAYOUT: int  # of prepacked bytes in files
GROUP: int  # inputs that share a scale in int8 weights

class Weights:
    """A matrix prepacked for the kernels; a buffer of its bytes."""

    @property
    def out(self) -> int: ...
    @property
    def in_(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def unpack(self, parts: Sequence[torch.Tensor]) -> None: ...

def prepack(parts: Sequence[torch.Tensor], dtype: str) -> Weights: ...
def prepack_rows(rows: Callable[[int, int], Sequence[torch.Tensor]], dtype: str, out: int, in_: int) -> Weights: ...
def view_weights(prepacked: Buffer, dtype: str, out: int, in_: int) -> Weights: ...
def prepacked_size(dtype: str, out: int, in_: int) -> int: ...
def checksums(tensors: Sequence[torch.Tensor]) -> list[int]: ...

# --- instruction-set levels, worst first (csrc/cpu/bindings/levels.cpp)

def isas() -> list[str]: ...
def missing_isas() -> dict[str, str]: ...
def isa() -> str: ...
def at_least(level: str) -> bool: ...  # whether the one in use is this one or a better one
def set_isa(name: str) -> None: ...
def peak(dtype: str) -> float: ...
def set_clocks(on: bool) -> None: ...
def phases() -> dict[str, float]: ...

# --- kernels, one file an op (csrc/cpu/bindings)

def attention_varlen(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    log_sums: torch.Tensor | None,
    out: torch.Tensor,
) -> None: ...
def attention_varlen_backward(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    log_sums: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None: ...
def contact_map(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor,
    keep: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    result: torch.Tensor,
) -> None: ...
def embedding(
    *,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    token_dropout: bool,
    mask: int,
    kept: float,
    scale: torch.Tensor | None,
    eps: float,
    result: torch.Tensor,
) -> None: ...
def gelu_ffn(
    *,
    x: torch.Tensor,
    eps: float,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    fc1: Weights,
    fc1_bias: torch.Tensor,
    fc2: Weights,
    fc2_bias: torch.Tensor,
    result: torch.Tensor,
) -> None: ...
def gelu_ffn_train(
    *,
    x: torch.Tensor,
    eps: float,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    middle: torch.Tensor,
    result: torch.Tensor,
) -> None: ...
def gelu_ffn_backward(
    *,
    x: torch.Tensor,
    eps: float,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    middle: torch.Tensor,
    dout: torch.Tensor,
    dx: torch.Tensor,
    dvectors: torch.Tensor,
    normed: torch.Tensor,
    dmiddle: torch.Tensor,
    activated: torch.Tensor,
    dresult: torch.Tensor | None,
) -> None: ...
def int8_linear(*, x: torch.Tensor, weights: Weights, result: torch.Tensor) -> None: ...
def masked_lm_head(
    *,
    x: torch.Tensor,
    rows: torch.Tensor | None,
    targets: torch.Tensor | None,
    eps: float,
    dense: Weights,
    dense_bias: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    table: Weights,
    bias: torch.Tensor,
    logits: torch.Tensor,
    loss: torch.Tensor | None,
) -> None: ...
def masked_lm_head_train(
    *,
    x: torch.Tensor,
    targets: torch.Tensor | None,
    eps: float,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    token_table: torch.Tensor,
    bias: torch.Tensor,
    middle: torch.Tensor,
    softmax_minus_onehot: torch.Tensor | None,
    logits: torch.Tensor,
    loss: torch.Tensor | None,
) -> None: ...
def masked_lm_head_backward(
    *,
    eps: float,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    token_table: torch.Tensor,
    bias: torch.Tensor,
    middle: torch.Tensor,
    softmax_minus_onehot: torch.Tensor | None,
    dloss: float,
    dlogits: torch.Tensor,
    dx: torch.Tensor,
    dvectors: torch.Tensor,
    normed: torch.Tensor,
    dmiddle: torch.Tensor,
    dscores: torch.Tensor,
) -> None: ...
def masked_softmax(*, scores: torch.Tensor, lengths: torch.Tensor, result: torch.Tensor) -> None: ...
def pool(*, x: torch.Tensor, cu_seqlens: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> None: ...
def pool_max(*, x: torch.Tensor, cu_seqlens: torch.Tensor, counted: torch.Tensor, result: torch.Tensor) -> None: ...
def pool_moments(*, x: torch.Tensor, cu_seqlens: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> None: ...
def pre_ln_attention(
    *,
    x: torch.Tensor,
    cu_seqlens: torch.Tensor,
    heads: int,
    eps: float,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    q: Weights,
    q_bias: torch.Tensor,
    k: Weights,
    k_bias: torch.Tensor,
    v: Weights,
    v_bias: torch.Tensor,
    out: Weights,
    out_bias: torch.Tensor,
    rotary: torch.Tensor | None,
    result: torch.Tensor,
    q_result: torch.Tensor | None,
    k_result: torch.Tensor | None,
) -> None: ...
def pre_ln_attention_inputs(
    *,
    x: torch.Tensor,
    eps: float,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
) -> None: ...
def pre_ln_attention_inputs_backward(
    *,
    x: torch.Tensor,
    eps: float,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    beside: torch.Tensor,
    dx: torch.Tensor,
    dvectors: torch.Tensor,
    normed: torch.Tensor,
) -> None: ...
def pre_ln_attention_output(
    *, x: torch.Tensor, mixed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, result: torch.Tensor
) -> None: ...
def pre_ln_attention_output_backward(
    *,
    dout: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dbias: torch.Tensor,
    dmixed: torch.Tensor,
    dresult: torch.Tensor | None,
) -> None: ...

# An op that pools, what it takes for each row, and its result.
_Pool = tuple[str, torch.Tensor, torch.Tensor]
# A layer's ten vectors and six matrices in the order of `ops.LayerWeights`, the eps of its norms, where its stream is
# wanted too, and what is pooled of it.
_Layer = tuple[Sequence[torch.Tensor], Sequence[Weights], tuple[float, float], torch.Tensor | None, Sequence[_Pool]]

def transformer_stack(
    *,
    x: torch.Tensor,
    cu_seqlens: torch.Tensor,
    heads: int,
    rotary: torch.Tensor | None,
    layers: Sequence[_Layer],
    result: torch.Tensor,
) -> None: ...
