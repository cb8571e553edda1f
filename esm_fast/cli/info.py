"""esm-fast info: what this machine has, what runs on it and why the rest does not; what a checkpoint holds."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from .. import __version__
from .common import architecture, cores, human_bytes

NAME = "info"
ORDER = 50
HELP = "this machine, the backends and why they run or not; or a checkpoint"
DESCRIPTION = """\
Without FILE: versions, the machine, which backend runs each op here and why the others do not, and
where models are looked for. With --arch: which backends would run on a GPU that is elsewhere. With FILE:
what a checkpoint holds, and whether its checksum is right."""
EXAMPLES = """\
  esm-fast info
  esm-fast info --arch 7.0 --arch sm_90
  esm-fast info esm1b.safetensors
  esm-fast info ~/.cache/torch/hub/checkpoints/esm1b_t33_650M_UR50S.pt
"""
_PACKAGES = ("torch", "numpy", "safetensors", "h5py", "transformers", "matplotlib", "triton", "xformers")
# Those that decide which kernels can run, x86-64 and arm64.
_FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16", "i8mm"),
)
_DTYPES = ("float32", "bfloat16", "float16")
_HEAD_DIM = 64  # ESM-1b's
_NO_CHECKSUM = "sha256      none in this format; esm-fast convert writes one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("file", nargs="?", metavar="FILE", help="a checkpoint file, folder or model name")
    what.add_argument(
        "--arch",
        action="append",
        type=architecture,
        metavar="X.Y",
        help="a GPU's compute capability, such as 7.0 or sm_70: only the backends there (repeatable)",
    )


def run(args: argparse.Namespace) -> None:
    if args.file:
        _tell_checkpoint(args.summary.say, args.file)
        return
    if args.arch:
        _tell_ops(args.summary.say, [("cuda", arch) for arch in args.arch])
        return
    lines = machine_lines()
    args.summary.say(*lines, machine=lines)
    _tell_ops(args.summary.say, _here())
    _tell_caches(args.summary.say)


def machine_lines() -> list[str]:
    """What a report of a fault should begin with: versions, machine, kernels."""
    import torch

    from .. import _C
    from ..files.cpuinfo import first_processor

    cpu = first_processor()
    flags = {*cpu.get("flags", "").split(), *cpu.get("Features", "").split()}
    packages = [f"{name} {found}" for name in _PACKAGES if (found := _version(name))]
    lines = [
        f"esm_fast  {__version__}, Python {platform.python_version()}, {', '.join(packages)}",
        f"machine   {platform.system()} {platform.release()}, {platform.machine()}, {_memory()}",
        f"CPU       {cpu.get('model name', platform.processor() or 'unknown')}, {cores()} usable cores",
        f"          {' '.join(flag for flag in _FLAGS if flag in flags) or 'no known instruction-set flags'}",
        f"kernels   {_C.isa()}, of {', '.join(_C.isas())} (ESM_FAST_ISA forces one)",
    ]
    for level, lacks in list(_C.missing_isas().items())[:1]:  # the next better one; those after it lack more
        lines.append(f"          {level} needs {lacks}")
    lines.append(f"threads   {torch.get_num_threads()} for torch and our kernels, {_C.threads()} for input and packing")
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        lines.append(f"CUDA      no device; torch is {build}")
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        memory = human_bytes(gpu.total_memory)
        lines.append(f"CUDA      cuda:{number} {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}")
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        return human_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) + " memory"
    except (ValueError, OSError):
        return "memory unknown"


def _here() -> list[tuple[str, tuple[int, int] | None]]:
    """(device type, compute capability) of what this machine has."""
    import torch

    gpus = {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
    return [("cpu", None), *(("cuda", arch) for arch in sorted(gpus))]


def _tell_ops(say, places: list[tuple[str, tuple[int, int] | None]]) -> None:
    """A table a device, a line an op, a column a backend; dtypes that give the same table share it."""
    import torch

    from .. import ops
    from ..ops.registry import REFERENCE, Request, backends

    known = backends()
    columns = sorted(known, key=lambda name: (name == REFERENCE, name))
    reasons: list[str] = []
    tables: dict[str, list[str]] = {}
    facts = []
    for device, arch in places:
        place = device if arch is None else "sm_{}{}".format(*arch)
        for dtype in _DTYPES:
            request = Request(device, arch, getattr(torch, dtype), _HEAD_DIM, False)
            lines = []
            for op_name in ops.OPS:
                explained = ops.explain(op_name, request)
                cells = _cells(explained, reasons)
                facts.append({"device": place, "dtype": dtype, "op": op_name, "backends": dict(explained)})
                lines.append(f"  {op_name:20}" + "".join(f"{cells.get(name, '-'):12}" for name in columns).rstrip())
            tables.setdefault("\n".join(lines), []).append(f"{place} {dtype}")
    title = "\nBackends (head dimension 64): * runs, ok could run, [n] cannot and why, - does not have this op"
    say(title, why_not=facts, backends=known)
    for table, titles in tables.items():
        say(f"\n{', '.join(titles)}\n{'':22}" + "".join(f"{name:12}" for name in columns).rstrip(), table)
    say("")
    for number, reason in enumerate(reasons, start=1):
        say(f"[{number}] {reason}")
    for name, problem in known.items():
        if problem is not None:
            say(f"backend {name} cannot be loaded: {problem}")


def _cells(explained: list[tuple[str, list[str]]], reasons: list[str]) -> dict[str, str]:
    """backend -> what to show; new reasons are added to the list. Backends come best first."""
    cells, chosen = {}, False
    for backend, why_not in explained:
        if not why_not:
            cells[backend] = "ok" if chosen else "*"
            chosen = True
            continue
        text = "; ".join(why_not)
        if text not in reasons:
            reasons.append(text)
        cells[backend] = f"[{reasons.index(text) + 1}]"
    return cells


def _tell_caches(say) -> None:
    from .. import hub

    found = {name: hub.cached(name) for name in hub.published_names()}
    say(
        "\nModels are looked for in",
        f"  {hub.torch_hub_folder()} (fair-esm's files)",
        f"  {hub.hf_cache_folder()} (Hugging Face's)",
        *(f"  {name:24} {path or 'not there'}" for name, path in found.items()),
        models={name: str(path) if path else None for name, path in found.items()},
    )


def _tell_checkpoint(say, name: str) -> None:
    from dataclasses import asdict

    from .. import hub, weights

    checkpoint = weights.read(hub.resolve(name), verify=True)
    weights.build(checkpoint)  # every tensor checked
    parameters = sum(tensor.numel() for key, tensor in checkpoint.tensors.items() if key != "lm_head.weight")
    size = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.tensors.values())
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()}
    own = checkpoint.kind == weights.FORMAT
    packed = ", packed for the CPU kernels" if checkpoint.packed else ""
    contacts = set(checkpoint.tensors) >= weights.CONTACT_KEYS
    config, stored = asdict(checkpoint.config), ", ".join(sorted(dtypes))
    say(
        f"file        {checkpoint.source}",
        f"kind        {checkpoint.kind}",
        f"parameters  {parameters:,}, {stored}, {human_bytes(size)}{packed}",
        *(f"  {key:22} {value}" for key, value in config.items()),
        f"contacts    {'fitted' if contacts else 'no regression'}",
        f"sha256      {checkpoint.sha256} (right)" if own else _NO_CHECKSUM,
        file=str(checkpoint.source),
        kind=checkpoint.kind,
        parameters=parameters,
        dtype=stored,
        bytes=size,
        packed=bool(checkpoint.packed),
        config=config,
        contacts=contacts,
        sha256=checkpoint.sha256 if own else None,
    )
