"""esm-fast convert: any checkpoint we read, as safetensors with a checksum."""

import argparse
import warnings

from ..formats import formats, quantised
from .common import InputError, Stages, is_random, output_path

NAME = "convert"
ORDER = 30
HELP = "a checkpoint as safetensors with a checksum"
DESCRIPTION = """\
Reads a fair-esm .pt file (with its contact regression beside it), a Hugging Face folder or a
converted file, checks every tensor, and writes one safetensors file that holds no code, loads
memory-mapped, and carries its configuration and a checksum. The file is read back and compared
before it gets its name.

With --pack the layers' matrices are stored as the CPU kernels read them. Loading such a file reads
next to nothing, and processes on one machine share its memory. It is for inference on CPUs; its
matrices are compared with the checksum by esm-fast info OUT, not each time it is loaded."""
EXAMPLES = """\
  esm-fast convert esm1b_t33_650M_UR50S.pt esm1b.safetensors
  esm-fast convert facebook/esm-1b esm1b.bf16.safetensors --dtype bfloat16
  esm-fast convert facebook/esm-1b esm1b.packed.safetensors --dtype bfloat16 --pack
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a model's name, file or folder, see esm-fast embed --help")
    parser.add_argument("output", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", *quantised()), help="default: as in SOURCE"
    )
    parser.add_argument("--pack", action="store_true", help="pack the matrices for the CPU kernels")


def run(args: argparse.Namespace) -> None:
    if is_random(args.source):
        raise InputError(f"{args.source} is not converted: the file would not tell that its numbers mean nothing")
    out = output_path(args.output, args.force)

    import torch

    from .. import hub, weights
    from ..files.atomic import atomic
    from ..formats.model import Prepacking
    from ..formats.weight import NAMES
    from ..memory import MappedFiles

    checkpoint = weights.read(hub.resolve(args.source)).unpacked()
    kind, source = checkpoint.kind, checkpoint.source
    form = formats()[args.dtype] if args.dtype in quantised() else None
    dtype = form.around if form else getattr(torch, args.dtype) if args.dtype else checkpoint.dtype
    if form and not args.pack:
        raise InputError(f"{form.name} weights are always stored prepacked; give --pack too")
    if args.pack and dtype not in NAMES:
        raise InputError("--pack stores float32 or bfloat16; give --dtype bfloat16")
    with warnings.catch_warnings(record=True) as caught, Stages() as bar:
        warnings.simplefilter("always")
        prepack = Prepacking(form, forget=MappedFiles().forget) if args.pack else None
        bar.begin("reading", checkpoint.config.layers, "layers")
        backend = "cpu" if args.pack else None
        model = weights.build(checkpoint, dtype=dtype, backend=backend, prepack=prepack, after=bar.update)
    del checkpoint
    with atomic(out) as temporary, bar:
        bar.begin("writing", 2 * _size(model), "B")
        digest = weights.save(model, temporary, bar.update)
        _compare(weights.read(temporary, verify=True), model, bar.update)
    notes = [str(warning.message) for warning in caught]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stored = form.name if form else str(dtype).removeprefix("torch.")
    args.summary.say(
        *(f"note      {note}" for note in notes),
        f"source    {source} ({kind})",
        f"model     {parameters:,} parameters, {stored}{', packed' if args.pack else ''}",
        f"sha256    {digest}  (of the tensors; read back and equal)",
        notes=notes,
        source=str(source),
        kind=kind,
        parameters=parameters,
        dtype=stored,
        packed=args.pack,
        sha256=digest,
    )
    args.summary.output(out)


def _size(model) -> int:
    """Bytes of what is stored."""
    from ..formats.file import content

    tied = model.tied()
    return sum(content(tensor.detach()).nbytes for key, tensor in model.state_dict().items() if key not in tied)


def _compare(copy, model, on_bytes) -> None:
    """Byte by byte, each tensor's pages of the copy let go."""
    from ..formats.file import address, content
    from ..memory import MappedFiles

    state, mapped = model.state_dict(), MappedFiles()
    for key, tensor in copy.tensors.items():
        ours, theirs = content(state[key].detach()), content(tensor)
        if tensor.dtype != state[key].dtype or ours != theirs:
            raise InputError(f"{key} changed on its way to the disk; nothing was written")
        mapped.forget_bytes(address(theirs), theirs.nbytes)
        on_bytes(theirs.nbytes)
