"""A family, an output, a command and a strategy are a file each: made-up ones are found where nothing names them."""

import subprocess
import sys

FILES = {
    "models/toy.py": """
        from dataclasses import dataclass
        from . import esm2
        @dataclass(frozen=True)
        class Config(esm2.Config):
            family: str = "toy"
        class ToyFamily(esm2._ESM2Family):
            title, config = "Toy", Config
            published = {"toy_t1": Config(1, 16, 32, 2)}
            def reads_hf(self, hf):
                return False
            def from_fair_esm(self, content):
                return None
        FAMILY = ToyFamily()
    """,
    "inference/outputs/toy.py": """
        from .pooled import Cls
        class First(Cls):
            name = "first"
        OUTPUTS = {"first": First}
    """,
    "cli/toy.py": """
        NAME = "toy"
        ORDER = 98
        HELP = "nothing"
        DESCRIPTION = EXAMPLES = ""
        def add_arguments(parser):
            parser.add_argument("text")
        def run(args):
            print(args.text)
    """,
    "variants/strategies/toy.py": """
        from .wt import *
        NAME, ALIASES = "toy", ()
    """,
}
PROGRAM = """
import importlib, sys
for name in ("models", "inference.outputs", "cli", "variants.strategies"):
    importlib.import_module(f"esm_fast.{name}").__path__.append(f"{sys.argv[1]}/{name.replace('.', '/')}")
import esm_fast
from esm_fast import cli, hub, weights
from esm_fast.variants.strategies import strategy
model, _ = esm_fast.load("random:toy_t1:3")
assert "toy_t1" in hub.published_names()
file = sys.argv[1] + "/toy.safetensors"
weights.save(model, file)
again, _ = esm_fast.load(file)
assert type(again.config).__module__ == "esm_fast.models.toy"
proteins = ["MKV", "LLAGH"]
first, cls = (list(esm_fast.embed(again, proteins, pool=pool)) for pool in ("first", "cls"))
assert all((a[1][1] == b[1][1]).all() for a, b in zip(first, cls))
with open(sys.argv[1] + "/in.fa", "w") as fasta:
    fasta.write(">p\\nMKV\\n")
out = sys.argv[1] + "/out.h5"
assert cli.main(["embed", fasta.name, "-o", out, "--model", "random:toy_t1:3", "--pool", "first"]) == 0
assert strategy("toy").NAME == "toy"
assert cli.main(["toy", "found"]) == 0
"""


def test_what_is_added_is_a_file_that_is_found(tmp_path):
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        file.write_text("\n".join(line[8:] for line in lines) + "\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("found\n")
