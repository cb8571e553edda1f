"""Everything about one GPU: is it right, how fast is each op, how fast is the model. `make gpu-report`.

    python benches/gpu_report.py                              # all parts; writes gpu-report.jsonl, .md and .json
    python benches/gpu_report.py --only smoke correct         # what to run first on a GPU that was never tried
    python benches/gpu_report.py --budget 500                 # as many parts as fit; the same command resumes
    python benches/gpu_report.py --dry-run                    # without a GPU, in Triton's interpreter: that it runs

It needs torch and esm_fast, no network, no pytest. Each part runs in a process of its own under a time limit, and each
result is a line of the .jsonl at once: what crashes or hangs costs itself alone, and what was done is not done again.
Attach the files to an issue. Every result is verified before it is timed; what cannot run says why.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GROUPS = ("facts", "smoke", "correct", "model", "ops")  # in this order: nothing is timed before it is known to be right
LEAST = 20  # seconds that must be left for another part to begin


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

    import gpu_ops
    import gpu_parts
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device here; --dry-run shows that the report can be made", file=sys.stderr)
        return 1
    place = gpu_ops.Place.dry() if args.dry_run else gpu_ops.Place.gpu()
    record = Record(Path(f"{args.out}.jsonl"))
    if args.part:
        for row in gpu_parts.rows(args.part, place):
            record.add(part=args.part, row=row)
        return 0
    record.require_same_machine(gpu_parts.identity(place))
    names = [name for name in gpu_parts.names(place) if name.split()[0] in args.only]
    run_all(names, record, args)
    write(record.found(), args.out, args.dry_run)
    print(f"wrote {args.out}.md and {args.out}.json from {record.path}")
    return int(record.anything_wrong())


def parse(argv) -> argparse.Namespace:
    summary, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes in the interpreter; no number means anything"
    )
    parser.add_argument("--out", default="gpu-report", help="files without their endings (default: gpu-report)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups of parts (default: all)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="seconds for this call")
    parser.add_argument("--limit", type=float, default=300, metavar="S", help="seconds a part (default: 300)")
    parser.add_argument("--again", action="store_true", help="also parts that crashed or hung before")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the child's
    return parser.parse_args(argv)


def run_all(names: list[str], record: "Record", args: argparse.Namespace) -> None:
    end = time.monotonic() + args.budget
    ended = record.ended()
    for number, name in enumerate(names, 1):
        if ended.get(name) == "done" or (name in ended and not args.again):
            continue
        if (left := end - time.monotonic()) < min(LEAST, args.limit):
            print(f"{len(names) - number + 1} parts are left; the same command resumes")
            return
        begin = time.monotonic()
        how, tail = run_part(name, min(args.limit, left), args)
        # A part that the budget cut short is not its own fault: it is tried again.
        if how != "hung" or left >= args.limit:
            record.add(part=name, ended=how, seconds=round(time.monotonic() - begin, 1), tail=tail)
        print(f"{number}/{len(names)} {name}: {how}, {time.monotonic() - begin:.0f} s", flush=True)


def run_part(name: str, limit: float, args: argparse.Namespace) -> tuple[str, str]:
    """("done", "crashed: ..." or "hung", the last it printed)."""
    command = [sys.executable, __file__, "--part", name, "--out", args.out, *["--dry-run"] * args.dry_run]
    try:
        done = subprocess.run(command, timeout=limit, capture_output=True, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return "hung", ""
    if done.returncode == 0:
        return "done", ""
    why = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"crashed: {why}", (done.stdout + done.stderr)[-1500:]


class Record:
    """The lines of a report, one a result; a line that a killed call left torn is ignored."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, **line) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> Iterator[dict]:
        text = self.path.read_text() if self.path.exists() else ""
        if text and not text.endswith("\n"):
            self.path.write_text(text + "\n")
        for line in text.splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def require_same_machine(self, identity: dict) -> None:
        """Exits where the lines that are there are of another machine, or of other versions."""
        before = next((line["machine"] for line in self.lines() if "machine" in line), None)
        if before is None:
            self.add(machine=identity)
        elif before != identity:
            changed = [name for name in identity if before.get(name) != identity[name]]
            other = ", ".join(f"{name} was {before.get(name)}" for name in changed)
            sys.exit(f"{self.path} was begun elsewhere ({other}); give another --out")

    def ended(self) -> dict[str, str]:
        return {line["part"]: line["ended"] for line in self.lines() if "ended" in line}

    def found(self) -> dict:
        """Group -> rows, those of each part's last run alone; and how the parts ended."""
        rows: dict[str, list[dict]] = {}
        for line in self.lines():
            if "row" in line:
                rows.setdefault(line["part"], []).append(line["row"])
        parts = [line for line in self.lines() if "ended" in line]
        last = {line["part"]: line for line in parts}
        grouped: dict[str, list] = {group: [] for group in GROUPS}
        for part, of in rows.items():
            grouped[part.split()[0]] += _last(of)
        return grouped | {"parts": list(last.values())}

    def anything_wrong(self) -> bool:
        found = self.found()
        wrong = [row for group in ("smoke", "correct") for row in found[group] if row.get("ok") is False]
        return bool(wrong) or any(part["ended"] != "done" for part in found["parts"])


def _last(rows: list[dict]) -> list[dict]:
    """Of rows about the same, from a part that ran twice, the last one."""
    return list({json.dumps([row.get(name) for name in KEYS]): row for row in rows}.values())


KEYS = ("check", "op", "case", "dtype", "backend", "direction", "model", "tokens")


def write(found: dict, out: str, dry_run: bool) -> None:
    Path(f"{out}.json").write_text(json.dumps(found | {"dry_run": dry_run}, indent=1))
    Path(f"{out}.md").write_text("\n".join(markdown(found, dry_run)) + "\n")


def markdown(found: dict, dry_run: bool) -> list[str]:
    lines = ["# GPU report", ""]
    if dry_run:
        lines += ["**Dry run in Triton's interpreter on tiny shapes: no number here is a speed.**", ""]
    for group in GROUPS:
        rows = found.get(group) or []
        if group == "facts":
            lines += table([["fact", "value"], *([n, str(v)] for row in rows for n, v in row.items())])
        elif rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            lines += [f"## {group.capitalize()}", ""]
            lines += table([columns, *([str(row.get(c, "")) for c in columns] for row in rows)])
    bad = [part for part in found.get("parts", []) if part["ended"] != "done"]
    return lines + [f"* {part['part']}: {part['ended']} {part.get('tail', '')[-300:]}" for part in bad]


def table(rows: list[list[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
