"""Everything about one GPU in one command: is it right, how fast is each op, how fast is the model. `make gpu-report`.

    python benches/gpu_report.py             # about half an hour on a GPU; writes gpu-report.md and gpu-report.json
    python benches/gpu_report.py --dry-run   # minutes without a GPU, in Triton's interpreter: only that all of it runs

Attach both files to an issue. Every result is verified before it is timed; what cannot run says why.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/ops/test_ops.py", "-k", "cuda or gpu")
DRY_TESTS = ("tests/ops/test_ops.py", "-k", "masked_softmax and triton")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

    import gpu_models
    import gpu_ops
    import torch
    from machine import machine

    if not args.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device here; --dry-run shows that the report can be made", file=sys.stderr)
        return 1
    place = gpu_ops.Place.dry() if args.dry_run else gpu_ops.Place.gpu()
    found = {"facts": machine() | place.facts, "dry_run": args.dry_run}
    for name, part in (("tests", lambda: tests(args.dry_run)), ("ops", lambda: gpu_ops.rows(place)),
                       ("models", lambda: gpu_models.rows(place))):  # fmt: skip
        print(f"{name} ...", flush=True)
        found[name] = part()
        write(found, args.out)  # what is known so far survives a crash of the next part
    print(f"wrote {args.out}.md and {args.out}.json")
    return int(found["tests"]["exit_code"] != 0)


def parse(argv) -> argparse.Namespace:
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes in the interpreter; no number means anything"
    )
    parser.add_argument("--out", default="gpu-report", help="files without their endings (default: gpu-report)")
    return parser.parse_args(argv)


def tests(dry_run: bool) -> dict:
    """Every op on every backend against fp64, on the GPU."""
    command = [sys.executable, "-m", "pytest", "-q", *(DRY_TESTS if dry_run else TESTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    return {"exit_code": done.returncode, "summary": summary, "failed": failed}


def write(found: dict, out: str) -> None:
    Path(f"{out}.json").write_text(json.dumps(found, indent=1))
    Path(f"{out}.md").write_text("\n".join(markdown(found)) + "\n")


def markdown(found: dict) -> list[str]:
    lines = ["# GPU report", ""]
    if found["dry_run"]:
        lines += ["**Dry run in Triton's interpreter on tiny shapes: no number here is a speed.**", ""]
    lines += table([["fact", "value"], *([name, str(value)] for name, value in found["facts"].items())])
    if tested := found.get("tests"):
        lines += ["## Tests", "", tested["summary"], "", *(f"* {line}" for line in tested["failed"]), ""]
    for name in ("ops", "models"):
        if found.get(name):
            columns = list(found[name][0])
            lines += [f"## {name.capitalize()}", ""]
            lines += table([columns, *([str(row[c]) for c in columns] for row in found[name])])
    return lines


def table(rows: list[list[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


if __name__ == "__main__":
    sys.exit(main())
