"""Hugging Face's Trainer on its own model and on the same model after `esm_fast.accelerate`, in one run, taking turns.

    python benches/bench_inside_trainer.py                 # the small model's sizes, with checkpointing and with LoRA
    python benches/bench_inside_trainer.py --steps 2 --rounds 1 --tiny

The same weights, proteins, masks and order for both; their losses have to agree before a time is told. Batches are 8
proteins in random order, padded, as TrainingArguments begin with. CPU seconds stand beside seconds, for busy machines.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from bench_peers import SAMPLE
from common import parser_of
from machine import machine
from proteins import choose, read
from report import write_table
from torch_peers import hf_config, hf_tokenizer

import esm_fast
from esm_fast.models.esm1 import CONFIGS, Config

KINDS = ("plain", "checkpointing", "lora", "checkpointing, lora")
COLUMNS = {
    "training": "{}", "peer": "{}", "median s": "{:.3g}", "min s": "{:.3g}", "ratio": "{:.2f} x", "CPU s": "{:.3g}",
    "CPU ratio": "{:.2f} x",
}  # fmt: skip


def model_of(config: Config, kind: str, *, fast: bool):
    from transformers import EsmForMaskedLM

    torch.manual_seed(0)
    model = EsmForMaskedLM(hf_config(config))
    if "lora" in kind:
        import peft

        targets = r".*encoder\.layer.*\.(query|key|value|dense)"  # not of the head
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets))
    return esm_fast.accelerate(model) if fast else model


def train(config: Config, kind: str, examples: list, steps: int, *, fast: bool) -> tuple[float, float, float]:
    """(seconds, CPU seconds, mean loss)."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, seed=0,
            gradient_checkpointing="checkpointing" in kind, gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(hf_tokenizer(), mlm_probability=0.15)
        trainer = Trainer(model_of(config, kind, fast=fast), arguments, collator, examples)
        torch.manual_seed(1)
        begin, busy = time.perf_counter(), time.process_time()
        loss = trainer.train().training_loss
        return time.perf_counter() - begin, time.process_time() - busy, loss


def rows_of(config: Config, kind: str, examples: list, args: argparse.Namespace) -> list[dict]:
    taken = {False: [], True: []}
    for turn in range(args.rounds + 1):  # the first to warm up
        for fast in (False, True) if turn % 2 else (True, False):
            found = train(config, kind, examples, args.steps, fast=fast)
            if turn:
                taken[fast].append(found)
    (*_, theirs), (*_, ours) = taken[False][0], taken[True][0]
    if abs(theirs - ours) > 1e-3 * abs(theirs):
        raise AssertionError(f"{kind}: the losses differ: {theirs} of Hugging Face, {ours} accelerated")
    middle, least, cpu = ({fast: how(run[at] for run in taken[fast]) for fast in taken}
                          for how, at in ((median, 0), (min, 0), (min, 1)))  # fmt: skip
    return [
        {"training": kind, "peer": "accelerated" if fast else "Hugging Face", "median s": middle[fast],
         "min s": least[fast], "ratio": least[False] / least[fast], "CPU s": cpu[fast],
         "CPU ratio": cpu[False] / cpu[fast]}
        for fast in taken
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS[1:]), help="default: all but plain")
    parser.add_argument("--steps", type=int, default=6, help="of 8 proteins (default 6)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="a toy model: only to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("out/inside_trainer"), help="folder of the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", FutureWarning)
    config = Config(2, 32, 64, 2) if args.tiny else CONFIGS["esm1b_t6_demo"]
    tokenizer = hf_tokenizer()
    proteins = choose(read(SAMPLE), 0, 8 * args.steps, config.max_positions)
    examples = [tokenizer(residues, truncation=True, max_length=config.max_positions) for _, residues in proteins]
    header = machine() | {"model": f"{config.layers} layers x {config.embed_dim}", "steps": str(args.steps)}
    rows = [row for kind in args.kinds for row in rows_of(config, kind, examples, args)]
    write_table(rows, COLUMNS, header, args.out, "inside_trainer")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
