"""The parts of the GPU report that say whether it is right: facts, the riskiest calls first, then every op.

A part is a name, such as "correct gelu_ffn triton", and gives rows; `gpu_report` runs each in a process of its own.
"""

import subprocess
import threading
from collections.abc import Iterator

import gpu_models
import gpu_ops
import torch
from gpu_ops import DTYPES, Place
from machine import machine

import esm_fast
from esm_fast.ops import OPS, registry, verify

BACKENDS = ("reference", "cutlass", "flash", "triton", "cuda")
_SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
_SEQUENCES = ("MKTVRQERLKSIVRILERSKEPVSGAQLAEELSVSRQVIVQDIAYLRSLGYNIVATPRGYVLAGG", "MALWMRLLPLLALLALWGPDPAAA", "MK")
LEAST_COSINE = {"fp32": 0.9999999, "fp16": 0.9999, "bf16": 0.999}  # of a protein's embedding with the CPU's in fp32


def names(place: Place) -> list[str]:
    """Every part, what costs least and says most first."""
    there = registry.backends()
    known = [name for name in BACKENDS if name in there]
    smoke = ["cubins", "thread", "graph", *(f"model {name}" for name in known)]
    correct = [f"{op} {kernel.backend}" for op in OPS for kernel in registry.kernels(op)
               if kernel.backend not in ("reference", "cpu")]  # fmt: skip
    model = [f"{dtype} {peer}" for dtype in place.dtypes for peer in gpu_models.peers(place)]
    if place.tiny:  # one of a kind
        correct = [name for name in correct if name.split()[0] in ("masked_softmax", "attention_varlen")]
    groups = {"smoke": smoke, "correct": correct, "model": model, "ops": list(OPS)}
    return ["facts", *(f"{group} {name}" for group, parts in groups.items() for name in parts)]


def rows(part: str, place: Place) -> Iterator[dict]:
    group, *about = part.split(" ", 1)
    if group == "facts":
        yield facts(place)
    elif group == "smoke":
        check, *backend = about[0].split()
        yield from _SMOKE[check](place, *backend)
    elif group == "correct":
        yield from correct(*about[0].split(), place)
    elif group == "model":
        yield from gpu_models.rows(*about[0].split(" ", 1), place)
    else:
        yield from gpu_ops.rows(about[0], place)


def identity(place: Place) -> dict:
    """What all lines of one report are of."""
    name = torch.cuda.get_device_name() if place.device == "cuda" else "none"
    return {"GPU": name, "torch": torch.__version__, "esm_fast": esm_fast.__version__, "tiny": place.tiny}


def facts(place: Place) -> dict:
    found = machine() | place.facts
    if place.device == "cuda":
        command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0]
        except (OSError, subprocess.SubprocessError) as error:
            said = str(error)
        found |= dict(zip(_SMI.split(","), said.split(", "), strict=False))
    backends = [f"{name}{'' if why is None else f' ({why})'}" for name, why in registry.backends().items()]
    return found | {"backends": ", ".join(backends)}


# ---- smoke


def _cubins(place: Place) -> Iterator[dict]:
    """Every cubin for this GPU is loaded."""
    from esm_fast.kernels.cuda import driver

    built = sorted(driver.built())
    if place.device != "cuda" or not built:
        yield {"check": "cubins", "note": f"{len(built)} are built; none is loaded without a GPU"}
        return
    major, minor = torch.cuda.get_device_capability()
    mine = [name for name in built if f"sm_{major}{minor}." in name]
    for name in mine:
        driver._image(name)
    yield {"check": "cubins", "ok": bool(mine), "note": f"{len(mine)} of {len(built)} loaded"}


def _attention(place: Place, backend: str) -> torch.Tensor:
    q = torch.ones(64, 2, 64, device=place.device, dtype=torch.float32 if place.tiny else torch.float16)
    cu_seqlens = torch.tensor([0, 40, 64], dtype=torch.int32, device=place.device)
    return OPS["attention_varlen"](q, q, q, cu_seqlens, 40, 0.125, backend=backend)


def _of_backends(place: Place, check: str, run) -> Iterator[dict]:
    """A row a backend: ok, or what it raised; what a backend declines is no fault."""
    for backend in BACKENDS:
        about = {"check": check, "backend": backend}
        try:
            yield about | {"ok": bool(run(backend))}
        except (registry.BackendError, ValueError) as error:
            yield about | {"note": str(error)[:300]}
        except Exception as error:
            yield about | {"ok": False, "note": f"{type(error).__name__}: {str(error)[:300]}"}


def _thread(place: Place) -> Iterator[dict]:
    """A kernel as the first call of a fresh thread, which has no context of the GPU."""

    def run(backend: str) -> bool:
        found: list = []

        def work() -> None:
            try:
                found.append(_attention(place, backend))
            except BaseException as error:
                found.append(error)

        wanted = _attention(place, backend)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(found[0], BaseException):
            raise found[0]
        return torch.equal(found[0], wanted)

    yield from _of_backends(place, "thread", run)


def _graph(place: Place) -> Iterator[dict]:
    """Captured in a CUDA graph and replayed, it has the bits it had."""
    if place.device != "cuda":
        yield {"check": "graph", "note": "needs a GPU"}
        return

    def run(backend: str) -> bool:
        with torch.inference_mode():
            wanted = _attention(place, backend).clone()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            q = torch.ones(64, 2, 64, device="cuda", dtype=torch.float16)
            cu_seqlens = torch.tensor([0, 40, 64], dtype=torch.int32, device="cuda")
            with torch.cuda.graph(graph):
                got = OPS["attention_varlen"](q, q, q, cu_seqlens, 40, 0.125, backend=backend)
            graph.replay()
            torch.cuda.synchronize()
        return torch.equal(wanted, got)

    yield from _of_backends(place, "graph", run)


def _model(place: Place, backend: str) -> Iterator[dict]:
    """The shipped model: embeddings beside the CPU's in fp32, finite logits and gradients, and the same bits alone."""
    truth = _embedded("cpu", "float32", "reference", _SEQUENCES)
    for dtype in place.dtypes:
        about = {"check": "model", "backend": backend, "dtype": dtype}
        name = str(DTYPES[dtype]).removeprefix("torch.")
        try:
            got = _embedded(place.device, name, backend, _SEQUENCES)
            alone = _embedded(place.device, name, backend, _SEQUENCES[:1])
            cosine = float(torch.nn.functional.cosine_similarity(got.double(), truth.double(), dim=1).min())
            ok = cosine >= LEAST_COSINE[dtype] and torch.equal(got[:1], alone) and _trains(place, name, backend)
            yield about | {"ok": ok, "least cosine": round(cosine, 8)}
        except registry.BackendError as error:
            yield about | {"note": str(error)[:300]}
        except Exception as error:
            yield about | {"ok": False, "note": f"{type(error).__name__}: {str(error)[:300]}"}


def _loaded(device: str, dtype: str, backend: str):
    return esm_fast.load("esm1b_t6_demo", device=device, dtype=dtype, backend=backend)[0]


def _embedded(device: str, dtype: str, backend: str, sequences) -> torch.Tensor:
    model = _loaded(device, dtype, backend)
    found = esm_fast.embed(model, list(sequences), layers=(-1,))
    return torch.stack([torch.as_tensor(next(iter(arrays.values()))) for _, arrays in found])


def _trains(place: Place, dtype: str, backend: str) -> bool:
    model = _loaded(place.device, dtype, backend).train()
    tokens = torch.tensor([[0, 20, 15, 32, 11, 7, 2], [0, 5, 5, 5, 2, 1, 1]], device=place.device)
    model(tokens)["logits"][tokens != 1].float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(grads) and all(bool(torch.isfinite(grad).all()) for grad in grads)


_SMOKE = {"cubins": _cubins, "thread": _thread, "graph": _graph, "model": _model}


# ---- correct


def correct(op_name: str, backend: str, place: Place) -> Iterator[dict]:
    """One kernel on every case of its op and one real one, each dtype, forward and backward, by the rule of
    `ops.verify`: a row for what is wrong, and one for the sum."""
    op = OPS[op_name]
    kernel = next(kernel for kernel in registry.kernels(op_name) if kernel.backend == backend)
    ran, right, worst, why = 0, 0, 0.0, ""
    for case in op.cases()[:3] if place.tiny else [*op.cases(), *op.bench_cases()[:1]]:
        for dtype in place.dtypes:
            arguments = verify.bound(op, case.build(DTYPES[dtype], place.device, 0))
            if reasons := kernel.why_not(op.request(arguments)):
                why = "; ".join(reasons)
                continue
            for direction, rule in (("fwd", verify.forward), ("bwd", verify.gradients)):
                checks = rule(op, kernel, case, DTYPES[dtype], place.device)
                bad = [check for check in checks if not check.ok]
                ran, right = ran + 1, right + (not bad)
                worst = max([worst, *(max(check.largest, check.rms) for check in checks)])
                if bad:
                    about = dict(op=op_name, backend=backend, case=case.name, dtype=dtype, direction=direction)
                    yield about | {"ok": False, "note": "; ".join(map(str, bad[:3]))}
    about = dict(op=op_name, backend=backend, case="all", dtype="", direction="")
    said = f"{right} of {ran}, worst {worst:.2f} of what is allowed"
    yield about | ({"ok": right == ran, "note": said} if ran else {"note": why})
