"""Checkpoints whose sizes, names, tensors or bytes somebody chose to harm: one line, or a model of the right shapes."""

import json
import os
import pickle
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from fakes import fair_esm_model, save_fair_esm
from safetensors.torch import save_file

from esm_fast import weights

from .outcome import CODE, of

_VALUES = (
    *(
        0,
        1,
        -1,
        2,
        7,
        10**9,
        2**31,
        2**40,
        2**62,
        -(2**63),
        10**30,
        True,
        False,
        None,
        "2",
        "",
        "x\x1b[31m",
        [],
        [2],
        {},
    ),
    *(0.5, 1e308, float("inf"), float("nan"), "absolute", "rotary", "esm1b", "\x1b]0;x\x07"),
)
_DTYPES = (torch.float64, torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool, torch.bfloat16)
_HF = dict(
    *[dict(model_type="esm", vocab_size=33, num_hidden_layers=1, hidden_size=8, intermediate_size=16, pad_token_id=1)],
    num_attention_heads=2, max_position_embeddings=26, mask_token_id=32, token_dropout=True, layer_norm_eps=1e-5,
    position_embedding_type="absolute", emb_layer_norm_before=True, is_decoder=False,
)  # fmt: skip
_TEXTS = (
    b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"weight_map": 3}', b'{"weight_map": {"a": "../../x"}}', b"\xff\xfe{",
    b'{"weight_map": {"a": "/etc/passwd"}}', b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>",
    b"NaN", b'{"a": ' * 9999,
)  # fmt: skip


class _Evil:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _tensor(tensor: torch.Tensor, rng: Random) -> object:
    """A stand-in that is no such tensor, or hardly one."""
    shape = tuple(tensor.shape)
    makers: list[Callable[[], object]] = [
        lambda: tensor[:0], lambda: tensor.flatten(), lambda: tensor[None], lambda: torch.tensor(1.0), lambda: "text",
        lambda: [1.0], lambda: tensor.to(rng.choice(_DTYPES)), lambda: tensor.to_sparse(), lambda: tensor.to("meta"),
        lambda: torch.ones(1).expand(2**31, 2**31), lambda: torch.ones(1).expand(shape),
        lambda: torch.full_like(tensor, rng.choice((float("nan"), float("inf"), 1e38))),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), lambda: tensor.clone().requires_grad_(),
    ]  # fmt: skip
    return rng.choice(makers)()


def _fair_esm(rng: Random, folder: Path, good: dict) -> Path:
    content = {"args": Namespace(**vars(good["args"])), "model": dict(good["model"])}
    model, how = content["model"], rng.randrange(7)
    if how <= 1:
        vars(content["args"])[rng.choice([*vars(content["args"])])] = rng.choice(_VALUES)
    elif how == 2:
        key = rng.choice([*model])
        model[key] = _tensor(model[key], rng)
    elif how == 3:
        model[rng.choice(["\x1b[2J", "", "x" * 9999, 3, "layers.0.fc1.weight"])] = rng.choice(
            [torch.zeros(1), _VALUES[11]]
        )
    elif how == 4:
        del model[rng.choice([*model])]
    elif how == 5:
        content[rng.choice(["args", "model", "cfg", "x"])] = rng.choice([_Evil(folder / "ran"), *_VALUES])
    else:
        model[rng.choice([*model])] = _Evil(folder / "ran")
    path = folder / "bad.pt"
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    return path


def _own(rng: Random, folder: Path, good: dict) -> Path:
    config = dict(layers=1, embed_dim=8, ffn_embed_dim=16, attention_heads=2, max_positions=24, family="esm1")
    for _ in range(rng.randrange(1, 3)):
        config[rng.choice([*config, "layer_norm_eps", "token_dropout", "evil"])] = rng.choice(_VALUES)
    text = json.dumps(config) if rng.random() < 0.9 else rng.choice(_TEXTS).decode("latin-1")
    tensors = {"embed_tokens.weight": torch.zeros(33, 8)}
    metadata = {"format": "esm_fast", "version": "1", "config": text, "sha256": weights.checksum(tensors)}
    metadata |= rng.choice([{}, {"packed": rng.choice(["bfloat16", "x\x1b"])}, {"version": "99"}, {"layout": "-1"}])
    path = folder / "bad.safetensors"
    save_file(tensors, path, metadata)
    return path


def _hf(rng: Random, folder: Path, good: dict) -> Path:
    path = folder / "bad"
    path.mkdir(exist_ok=True)
    config = dict(_HF)
    for _ in range(rng.randrange(3)):
        config[rng.choice([*config])] = rng.choice(_VALUES)
    data = json.dumps(config).encode() if rng.random() < 0.8 else rng.choice(_TEXTS)
    (path / "config.json").write_bytes(data)
    for file in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (path / file).unlink(missing_ok=True)
    kind = rng.randrange(3)
    if kind == 0:
        save_file({"esm.embeddings.word_embeddings.weight": torch.zeros(33, 8)}, path / "model.safetensors")
    elif kind == 1:
        (path / "model.safetensors.index.json").write_bytes(rng.choice(_TEXTS))
    else:
        (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(folder / "ran")))
    return path


def _bytes(rng: Random, folder: Path, good: dict) -> Path:
    """A good file cut, overwritten in part, or another's file under its name."""
    path = folder / f"bytes{rng.choice(['.pt', '.safetensors', '.bin', ''])}"
    data = bytearray((folder / "good.pt").read_bytes())
    how = rng.randrange(4)
    if how == 0:
        data = data[: rng.randrange(len(data))]
    elif how == 1:
        at = rng.randrange(len(data))
        data[at : at + 64] = rng.randbytes(64)
    elif how == 2:
        data = bytearray(rng.choice(_TEXTS) + rng.randbytes(rng.randrange(64)))
    else:
        header = json.dumps(
            {"a": {"dtype": "F32", "shape": [rng.choice((-1, 2, 2**40))], "data_offsets": [0, 8]}}
        ).encode()
        data = bytearray(rng.choice((len(header), 8, 2**62)).to_bytes(8, "little") + header + bytes(8))
    path.write_bytes(data)
    return path


def checkpoints(count: int, rng: Random, folder: Path) -> Counter:
    save_fair_esm(fair_esm_model(0), folder / "good.pt")
    good = torch.load(folder / "good.pt", weights_only=False)
    outcomes = Counter()
    for number in range(count):
        path = (_fair_esm, _own, _hf, _bytes)[number % 4](rng, folder, good)
        outcome = of(lambda path=path: weights.build(weights.read(path)) and None)
        outcomes[CODE if (folder / "ran").exists() else outcome] += 1
        (folder / "ran").unlink(missing_ok=True)
    return outcomes


ATTACKS = {"hostile checkpoints: `.pt`, our own, Hugging Face's folders, other bytes": (800, checkpoints)}
