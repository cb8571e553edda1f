"""How far each way of computing ESM-1b is from exact arithmetic, on random weights that round like trained ones, or on
trained ones.

    python benches/accuracy.py             # full size; about 20 minutes on two cores, 7 GB
    python benches/accuracy.py --tiny      # seconds: shows that all of it runs, its numbers mean nothing
    python benches/accuracy.py --model esm1b_t6_demo

Per residue and protein: a few proteins against fp64, bf16 also against fp64 on the same rounded weights. Nearest
neighbours, against our own fp32: proteins of the file, cut short, which is a hard sample, because most have no relative
in it and a random model puts them all close together; with --families FASTA also as many proteins of that file that
have relatives there, at their natural lengths (families.py), which is what a search for neighbours is used for. A file
with families is DB.fasta.gz of Debian's package mmseqs2-examples. docs/benchmarks.md says how to read the result.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import TINY, Proteins, Size, parser_of
from families import with_relatives
from machine import machine
from peers import int8_missing, our_model
from proteins import choose, read
from random_weights import trained_like_state
from report import facts
from rounds import cosines
from tables import markdown
from torch_peers import hf_parts

import esm_fast
from esm_fast.inference.embed import embed

SAMPLE = Path(__file__).parents[1] / "examples" / "uniprot_sample.fasta.gz"
ERRORS = {
    "arithmetic": "{}", "relative error": "{:.1e}", "largest error": "{:.1e}", "cosine, residues": "{:.6f}",
    "cosine, proteins": "{:.6f}", "relative error, bf16 weights": "{:.1e}", "cosine, residues, bf16 weights": "{:.6f}",
}  # fmt: skip
NEIGHBOURS = {"sample": "{}", "arithmetic": "{}", "recall@1": "{:.1%}", "cosine, proteins": "{:.7f}"}
OURS = "esm_fast fp32"  # the truth of the neighbours

State = dict[str, torch.Tensor]
PerResidue = Callable[[Proteins], list[np.ndarray]]  # proteins -> (residues, embed_dim) each


def ours(dtype: str, backend: str | None = None) -> Callable[[Size, State], PerResidue]:
    def build(size, state):
        model = our_model(size, state, dtype, backend)
        return lambda proteins: [arrays[-1] for _, arrays in embed(model, proteins, pool="per_residue")]

    return build


def hugging_face(size: Size, state: State) -> PerResidue:
    model, tokenizer = hf_parts(size, state, torch.bfloat16)

    @torch.inference_mode()
    def run(proteins):
        tokens = (tokenizer([residues], return_tensors="pt") for _, residues in proteins)
        return [model(**inputs).last_hidden_state[0, 1:-1].float().numpy() for inputs in tokens]

    return run


ARITHMETICS = {
    OURS: ours("float32"),
    "torch bf16, fp32 residual": ours("bfloat16", "reference"),
    "Hugging Face bf16": hugging_face,
    "esm_fast bf16": ours("bfloat16"),
    "esm_fast int8": ours("int8"),
}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    size, state, called = trained(args.model) if args.model else trained_like(args)
    whole = read(args.fasta)
    few = choose(whole, 0, args.proteins, 4096)
    samples = {"cut": [(label, residues[: args.cut]) for label, residues in choose(whole, 0, args.neighbours, 4096)]}
    if args.families:
        samples["families"] = with_relatives(read(args.families), args.neighbours)
    header = machine() | {
        "model": f"{size.layers} layers x {size.embed_dim}, {called}",
        "against fp64": described(few),
    }
    header |= {f"neighbours, {sample}": described(chosen) for sample, chosen in samples.items()}
    print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
    truth, rounded = exact(size, state, few), exact(size, {k: v.bfloat16().float() for k, v in state.items()}, few)
    errors, means = [{"arithmetic": "exact, on bf16 weights"} | compare(rounded, truth)], {}
    for name, build in ARITHMETICS.items():
        if name not in (OURS, *args.arithmetics):
            continue
        if name == "esm_fast int8" and (missing := int8_missing()):
            print(f"{name} is missing: {missing}")
            continue
        run = build(size, state)
        got = run(few)
        errors.append({"arithmetic": name} | compare(got, truth))
        if "bf16" in name:
            errors[-1] |= {f"{column}, bf16 weights": value for column, value in compare(got, rounded).items()}
        print(json.dumps(errors[-1]), flush=True)
        for sample, chosen in samples.items():
            means[sample, name] = np.stack([rows.mean(0) for rows in run(chosen)])
        del run
        gc.collect()
    neighbours = [
        {"sample": sample, "arithmetic": name, "recall@1": recall(got, means[sample, OURS])}
        | {"cosine, proteins": float(cosines(got, means[sample, OURS]).min())}
        for (sample, name), got in sorted(means.items(), key=lambda item: item[0][0])
    ]
    write(errors, neighbours, header, args.out)
    return 0


def parse(argv) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--fasta", type=Path, default=SAMPLE, help="proteins (default: the sample in examples/)")
    add("--proteins", type=int, default=4, help="so many against fp64, of mixed lengths (default 4)")
    add("--neighbours", type=int, default=200, help="so many for the nearest neighbours (default 200)")
    add("--families", type=Path, metavar="FASTA", help="as many more with relatives in this file, uncut")
    add("--arithmetics", nargs="+", choices=ARITHMETICS, default=list(ARITHMETICS), help="only these, and our fp32")
    add("--cut", type=int, default=100, help="their first residues only (default 100)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="a trained model of this architecture, by name or path; not random weights")
    which.add_argument("--layers", type=int, help="fewer layers than ESM-1b's 33, for a quicker look")
    which.add_argument("--tiny", action="store_true", help="a toy model: only to see that everything runs")
    add("--seed", type=int, default=0, help="of the random weights")
    add("--out", type=Path, default=Path("out/accuracy"), help="folder of the results (default out/accuracy)")
    return parser.parse_args(argv)


def trained_like(args: argparse.Namespace) -> tuple[Size, State, str]:
    size = TINY if args.tiny else Size()
    size = replace(size, layers=args.layers or size.layers)
    return size, trained_like_state(size, args.seed), f"trained-like random weights (seed {args.seed})"


def trained(name: str) -> tuple[Size, State, str]:
    model, _ = esm_fast.load(name, packed=False)
    return Size.of(model.config), model.state_dict(), f"trained weights ({name})"


def exact(size: Size, state: State, proteins: Proteins) -> list[np.ndarray]:
    """The reference in fp64. A layer is in fp64 while it runs and gone afterwards: all of them would take 5 GB."""
    model = our_model(size, state, "float32", "reference")
    for name in ("embed_tokens", "embed_positions", "emb_layer_norm_before", "emb_layer_norm_after"):
        if (part := getattr(model, name, None)) is not None:
            part.double()
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: layer.double() and None)
        layer.register_forward_hook(lambda layer, inputs, output: layer.to("meta") and None)
    together = sum(len(residues) + 2 for _, residues in proteins)
    return [arrays[-1] for _, arrays in embed(model, proteins, pool="per_residue", batch_tokens=together)]


def compare(got: list[np.ndarray], truth: list[np.ndarray]) -> dict[str, float]:
    """Errors of the rows of all proteins; relative: Euclidean, largest: of an element, in units of the truth's RMS."""
    means = [np.stack([rows.mean(0, dtype=np.float64) for rows in proteins]) for proteins in (got, truth)]
    rows, exact_rows = np.concatenate(got).astype(np.float64), np.concatenate(truth)
    return {
        "relative error": float(np.linalg.norm(rows - exact_rows) / np.linalg.norm(exact_rows)),
        "largest error": float(np.abs(rows - exact_rows).max() / np.sqrt(np.mean(exact_rows**2))),
        "cosine, residues": float(cosines(rows, exact_rows).min()),
        "cosine, proteins": float(cosines(*means).min()),
    }


def described(proteins: Proteins) -> str:
    return f"{len(proteins)} proteins, {sum(len(residues) for _, residues in proteins)} residues"


def recall(got: np.ndarray, truth: np.ndarray) -> float:
    """Share of the proteins whose nearest neighbour, by cosine, is the one the truth finds."""
    return float(np.mean(nearest(got) == nearest(truth)))


def given_up(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of each protein, by how much the truth finds its own nearest neighbour more similar (cosine) than the one that
    `got` finds: 0 where they are the same one."""
    similarity, rows = similarities(truth), np.arange(len(truth))
    return similarity.max(1) - similarity[rows, nearest(got)]


def nearest(means: np.ndarray) -> np.ndarray:
    return similarities(means).argmax(1)


def similarities(means: np.ndarray) -> np.ndarray:
    """The cosines of all pairs; nobody is their own neighbour."""
    unit = means.astype(np.float64) / np.linalg.norm(means, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity


def write(errors: list[dict], neighbours: list[dict], header: dict[str, str], out: Path) -> None:
    text = f"{markdown(errors, ERRORS)}\n\n{markdown(neighbours, NEIGHBOURS)}"
    print(f"\n{text}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "accuracy.md").write_text(f"{text}\n\n{facts(header)}\n")
    numbers = {"header": header, "errors": errors, "neighbours": neighbours}
    (out / "accuracy.json").write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    sys.exit(main())
