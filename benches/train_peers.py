"""Training's peers, each in a process of its own: one step verified, an epoch to warm up, an epoch timed."""

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from common import padded_batches
from torch_peers import hf_config, hf_name, hf_tokenizer

from esm_fast.alphabet import PAD, TOKENS
from esm_fast.train.loop import Trainer
from esm_fast.train.masking import MaskedBatch
from esm_fast.train.processes import Processes
from esm_fast.train.recipe import Recipe
from esm_fast.train.store import open_store

IGNORED = -100  # of labels, for every cross-entropy of torch
HF_BATCH = 8  # sequences: what Hugging Face's TrainingArguments begin with


class Task(NamedTuple):
    """What a process is given. tokens: in a batch, and in a step; for the Trainer, HF_BATCH sequences are one."""

    peer: str
    recipe: Recipe
    threads: int


@dataclass
class Outcome:
    """loss, norm: mean loss and norm of the gradient of the first batch, before any step; tokens: of the timed epoch,
    without padding; peak: the process's largest resident size in bytes."""

    loss: float
    norm: float
    tokens: int
    seconds: float
    peak: int


def run(task: Task) -> Outcome:
    """One peer in this process, which has to be fresh: its peak of memory is the process's."""
    torch.set_num_threads(task.threads)
    output = tempfile.mkdtemp(dir=Path(task.recipe.store).parent)  # a new one: a run resumes where it finds another
    trainer = Trainer(
        replace(task.recipe, output=output), open_store(task.recipe.store), Processes(0, 1, torch.device("cpu"))
    )
    # Everyone's first batch: the records, the masks and the weights are ours.
    first = trainer.sources[0].masker.batch(trainer.sources[0].steps.records[trainer.sources[0].steps[0]], 0)
    loss, norm, epoch = PEERS[task.peer](trainer, first)
    lengths = trainer.sources[0].masker.lengths(trainer.sources[0].steps.records)
    return Outcome(loss, norm, int(lengths.sum()), epoch(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


Built = tuple[float, float, Callable[[], float]]  # loss, norm, and what warms up and returns an epoch's seconds


def ours(trainer: Trainer, first: MaskedBatch) -> Built:
    loss = trainer.model(first) / len(first.rows)
    loss.backward()
    norm = _norm(trainer.model)

    def epoch() -> float:
        times = {}
        trainer.train(lambda step, entry: times.setdefault(step, time.perf_counter()))
        return times[trainer.recipe.steps] - times[trainer.sources[0].steps.per_epoch]

    return float(loss.detach()), norm, epoch


def sorted_loop(trainer: Trainer, first: MaskedBatch) -> Built:
    """Batches of nearly equal length, padded to their longest, in a plain loop over Hugging Face's model."""
    model, recipe = hugging_face(trainer), trainer.recipe
    loss, norm = _first(model, first, recipe)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    records = trainer.sources[0].steps.records
    batches = list(padded_batches(trainer.sources[0].masker.lengths(records).tolist(), recipe.batch_tokens))

    def epoch() -> float:
        for number in range(2):
            masked = [
                _padded(trainer.sources[0].masker.batch(records[batch], number)) for batch in batches
            ]  # not timed
            begin = time.perf_counter()
            for inputs in masked:
                optimizer.zero_grad(set_to_none=True)
                with _autocast(recipe):
                    loss = model(**inputs).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
        return time.perf_counter() - begin

    return loss, norm, epoch


def hf_trainer(trainer: Trainer, first: MaskedBatch) -> Built:
    """Hugging Face's Trainer with its collator for masked language modelling, as they come."""
    from transformers import DataCollatorForLanguageModeling, TrainerCallback, TrainingArguments
    from transformers import Trainer as HFTrainer

    model, recipe, store = hugging_face(trainer), trainer.recipe, trainer.sources[0].store
    loss, norm = _first(model, first, recipe)
    tokenizer = hf_tokenizer()
    letters = ("".join(TOKENS[token] for token in store.tokens[slice(*ends)]) for ends in _spans(trainer))
    examples = [tokenizer(text, truncation=True, max_length=recipe.model.max_positions) for text in letters]
    times = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(Path(recipe.output, "hf")),
        num_train_epochs=2,
        per_device_train_batch_size=HF_BATCH,
        learning_rate=recipe.learning_rate,
        bf16=recipe.precision == "bfloat16",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=recipe.masking.share)

    def epoch() -> float:
        HFTrainer(model, arguments, collator, examples, callbacks=[Clock()]).train()
        return times[2] - times[1]

    return loss, norm, epoch


PEERS = {"hf-trainer": hf_trainer, "sorted-loop": sorted_loop, "esm_fast": ours}


def hugging_face(trainer: Trainer) -> torch.nn.Module:
    """EsmForMaskedLM with SDPA attention on the trainer's own weights."""
    from transformers import EsmForMaskedLM

    config = hf_config(trainer.recipe.model)
    model = EsmForMaskedLM(config)
    state = {}
    for name, tensor in trainer.esm.state_dict().items():
        if name.startswith("lm_head."):
            state[name.replace("lm_head.weight", "lm_head.decoder.weight")] = tensor
        else:
            state["esm." + (name if name.startswith("contact_head.") else hf_name(name))] = tensor
    problems = model.load_state_dict(state, strict=False)
    if problems.unexpected_keys or any("position_ids" not in key for key in problems.missing_keys):
        raise AssertionError(f"the weights do not fit Hugging Face's model: {problems}")
    return model.train()


def _padded(masked: MaskedBatch) -> dict[str, torch.Tensor]:
    """A packed batch as EsmForMaskedLM takes it."""
    lengths = masked.batch.lengths.tolist()
    labels = torch.full_like(masked.batch.tokens, IGNORED, dtype=torch.int64)
    labels[masked.rows] = masked.targets
    tokens = masked.batch.tokens.long().split(lengths)
    inputs = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)
    labels = torch.nn.utils.rnn.pad_sequence(labels.split(lengths), batch_first=True, padding_value=IGNORED)
    return {"input_ids": inputs, "attention_mask": (inputs != PAD).long(), "labels": labels}


def _first(model: torch.nn.Module, masked: MaskedBatch, recipe: Recipe) -> tuple[float, float]:
    with _autocast(recipe):
        loss = model(**_padded(masked)).loss
    loss.backward()
    return float(loss.detach()), _norm(model)


def _autocast(recipe: Recipe):
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16")


def _norm(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def _spans(trainer: Trainer):
    offsets = trainer.sources[0].store.offsets
    return ((offsets[record], offsets[record + 1]) for record in trainer.sources[0].steps.records)
