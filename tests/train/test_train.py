"""The training loop: the curve of a plain loop over fair-esm's model, of several processes, and of a run cut off."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchrun import run_processes

import esm_fast
from esm_fast import weights
from esm_fast.cli import main
from esm_fast.models.esm1 import Config
from esm_fast.sequences.batching import pack_padded
from esm_fast.sequences.tokenize import Policy
from esm_fast.train import checkpoint, sources
from esm_fast.train.environment import SETTINGS
from esm_fast.train.loop import Trainer
from esm_fast.train.masking import Masking
from esm_fast.train.model import new_model
from esm_fast.train.prepare import prepare
from esm_fast.train.processes import Processes
from esm_fast.train.recipe import Recipe, RecipeError, as_dict, read_recipe, recipe_from
from esm_fast.train.report import Log, read_log
from esm_fast.train.running import BusyError, Stopped, only_run
from esm_fast.train.schedule import LossScale, cooldown_factor, learning_rate, linear_rate
from esm_fast.train.store import open_store

ALONE = Processes(0, 1, torch.device("cpu"))
MODEL = dict(layers=2, embed_dim=16, ffn_embed_dim=32, attention_heads=2, max_positions=48)
ROTARY = dict(family="esm2", layers=2, embed_dim=16, ffn_embed_dim=32, attention_heads=2)


# Models this small are slower on two, and a process that waits for a core holds the other up.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    generator = np.random.default_rng(0)
    letters = np.array(list("LAGVSERTIDPKQNFYMHWCX"))
    lengths = np.append(generator.integers(1, 90, 120), [1, 2, 46, 47, 300])
    records = (f">p{i}\n{''.join(generator.choice(letters, n))}\n" for i, n in enumerate(lengths))
    (folder / "in.fasta").write_text("".join(records))
    prepare([folder / "in.fasta"], folder / "store", policy=Policy(overlength="window"), valid_share=0.2)
    return open_store(folder / "store", verify=True)


def recipe(store, output, **changes):
    values = dict(model=MODEL, store=str(store.path), output=str(output), steps=12, step_tokens=1200, batch_tokens=500)
    values |= dict(learning_rate=3e-3, warmup=4, log_every=1, valid_every=6, save_every=4, plot=False, seed=3)
    return recipe_from(values | changes)


def curve(output, name="loss"):
    return [entry[name] for entry in read_log(output / "log.jsonl") if name in entry]


def stepped(trainer, number):
    """A step's numbers."""
    entry = trainer._told(trainer._step(trainer._work(number)))
    trainer._settled(entry, None)
    return entry


def train(store, output, **changes):
    trainer = Trainer(recipe(store, output, **changes), store, ALONE)
    trainer.train()
    return trainer


# ---- against fair-esm


def padded(masked):
    """The tokens of a packed batch, padded, and where its rows are in them."""
    pieces = masked.batch.tokens.long().split(masked.batch.lengths.tolist())
    tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=1)
    return tokens, (tokens != 1).flatten().nonzero().flatten()[masked.rows]


def fair_esm_twin(trainer):
    esm = pytest.importorskip("esm", reason="fair-esm is not installed")
    args = Namespace(arch="roberta_large", token_dropout=True, emb_layer_norm_before=True, **MODEL)
    twin = esm.ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1b"))
    twin.load_state_dict(trainer.esm.state_dict())
    twin.lm_head.weight = twin.embed_tokens.weight
    return twin


def _quiet(store, output, steps):
    return recipe(store, output, steps=steps, step_tokens=600, warmup=50, valid_every=steps, save_every=steps, clip=1.0)


def test_the_curve_and_gradients_of_a_plain_loop_over_fair_esm(store, tmp_path):
    """Same masks, 200 steps in fp32."""
    steps = 200
    trainer = Trainer(_quiet(store, tmp_path, steps), store, ALONE)
    twin = fair_esm_twin(trainer)
    parameters = {name: p for name, p in twin.named_parameters() if not name.startswith("contact_head")}
    optimizer = torch.optim.Adam(parameters.values(), lr=3e-3)
    losses = []

    def plain_step(step, entry):
        work = trainer._work(step - 1)
        optimizer.zero_grad()
        tokens, rows = zip(*(padded(masked) for masked in work.batches), strict=True)
        targets = torch.cat([masked.targets for masked in work.batches])
        logits = [twin(t)["logits"].flatten(0, 1)[r] for t, r in zip(tokens, rows, strict=True)]
        loss = F.cross_entropy(torch.cat(logits), targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        if step <= 20:
            for name, parameter in trainer.parameters.items():
                wrong = (parameter.grad - parameters[name].grad).abs().max()
                assert wrong < 1e-4, f"step {step}: {name} is {wrong} off"
            assert entry["gradient_norm"] == pytest.approx(float(norm), rel=1e-3)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step - 1) / 50, (50 / max(step - 1, 1)) ** 0.5)
        optimizer.step()
        losses.append(loss.item())

    trainer.train(plain_step)
    ours = curve(tmp_path)
    assert len(ours) == len(losses) == steps
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < 1e-3
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.1  # it learned: the curves are not flat


def test_rows_that_fill_the_selected_ones_up_count_nothing(store, tmp_path):
    trainer = Trainer(recipe(store, tmp_path), store, ALONE)
    masked, sizes = trainer.sources[0].masker.batch(trainer.sources[0].steps.records[:20], 0), []
    head = trainer.esm.logits_of
    trainer.esm.logits_of = lambda x, rows, targets: sizes.append(len(rows)) or head(x, rows, targets)
    loss = trainer.model(masked)
    x = trainer.esm.forward_packed(masked.batch, layers=(2,)).representations[2]
    _, expected = trainer.esm.logits_of(x, masked.rows, masked.targets)
    torch.testing.assert_close(loss, expected)
    assert len(masked.rows) % 128 and sizes == [-(-len(masked.rows) // 128) * 128, len(masked.rows)]


# ---- resume


@pytest.mark.parametrize("model", [MODEL, ROTARY], ids=["learned", "rotary"])
def test_a_resumed_run_is_the_uninterrupted_one(store, tmp_path, model):
    train(store, tmp_path / "whole", model=model)
    stopped = Trainer(recipe(store, tmp_path / "cut", model=model), store, ALONE)

    def stop(step, entry):
        if step == 10:  # the last checkpoint is from step 8
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.train(stop)
    train(store, tmp_path / "cut", model=model)
    for name in ("loss", "learning_rate", "gradient_norm", "valid_loss"):
        assert curve(tmp_path / "cut", name) == curve(tmp_path / "whole", name)
    whole, cut = (weights.read(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert whole.sha256 == cut.sha256
    assert len(checkpoint.paths(tmp_path / "cut" / "checkpoints")) == 2


COMMAND = (
    "import torch; torch.set_num_threads(1); from esm_fast.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
)


def test_kill_at_any_moment(store, tmp_path):
    """The curve of a run killed again and again, wherever it is, equals bit for bit that of one left in peace."""
    values = dict(model=MODEL, store=str(store.path), output="", steps=50, step_tokens=600, batch_tokens=300)
    values |= dict(learning_rate=3e-3, warmup=4, log_every=1, valid_every=20, save_every=2, plot=False)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    Trainer(recipe_from(values | dict(output=str(tmp_path / "whole"))), store, ALONE).train()

    arguments = ["pretrain", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "cut")]
    log, moments = tmp_path / "cut" / "log.jsonl", random.Random(0)
    for at in (3, 25):
        with subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and (not log.exists() or log.read_text().count('"loss"') < at):
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.05))  # within a few steps, half of which write a checkpoint
            process.kill()
        assert process.returncode == -signal.SIGKILL, "it was over before"
    assert len(curve(tmp_path / "cut")) < 50
    Trainer(recipe_from(values | dict(output=str(tmp_path / "cut"))), store, ALONE).train()
    for name in ("loss", "valid_loss"):
        assert curve(tmp_path / "cut", name) == curve(tmp_path / "whole", name)
    assert not list((tmp_path / "cut").rglob(".*")), "leftovers"


def test_a_checkpoint_that_was_cut_off_is_none(store, tmp_path, monkeypatch):
    train(store, tmp_path, steps=4)
    checkpoints = tmp_path / "checkpoints"
    partial = checkpoints / ".step_000000003.partial"
    partial.mkdir()
    (partial / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half of it")

    def full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched, pytest.raises(checkpoint.CheckpointError, match="step_000000008.*is full"):
        patched.setattr(os, "fsync", full)  # of torch's writer, when a file is nearly whole
        train(store, tmp_path, steps=8)
    assert checkpoint.newest(checkpoints, ALONE).state["step"] == 4
    train(store, tmp_path, steps=8)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000000004", "step_000000008"]


def test_a_run_keeps_the_order_it_began_with(store, tmp_path, monkeypatch):
    train(store, tmp_path / "whole")
    train(store, tmp_path / "cut", steps=6)
    monkeypatch.setattr(sources, "MANY", 10)
    train(store, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    train(store, tmp_path / "other", steps=6)
    monkeypatch.undo()
    train(store, tmp_path / "other")
    assert curve(tmp_path / "other") != curve(tmp_path / "whole")
    with pytest.raises(RecipeError, match="prepared without --clusters"):
        train(store, tmp_path / "clusters", sampling="clusters")


def test_several_stores_share_each_step(store, tmp_path):
    """By their weights; each has its own epochs, and the run resumes bit for bit, and not with other shares."""
    letters, generator = np.array(list("LAGV")), np.random.default_rng(1)
    rows = (f">q{i}\n{''.join(generator.choice(letters, 20))}\n" for i in range(30))
    (tmp_path / "in.fasta").write_text("".join(rows))
    prepare([tmp_path / "in.fasta"], tmp_path / "s", policy=Policy(overlength="window"), valid_share=0.2)
    both = [(store, 3.0), (open_store(tmp_path / "s"), 1.0)]
    weights_of = {str(one.path): weight for one, weight in both}

    def run(output, steps=12, stores=both, **changes):
        given = recipe(store, tmp_path / output, steps=steps, **changes)
        given = dataclasses.replace(given, store=weights_of)
        trainer = Trainer(given, stores, ALONE)
        trainer.train()
        return trainer

    trainer = run("whole")
    works = [trainer._work(step) for step in range(12)]
    lengths = np.concatenate([work.lengths for work in works])
    assert abs(lengths[lengths == 22].sum() / lengths.sum() - 0.25) < 0.05
    assert trainer.sources[1].steps.epoch_of(11) > trainer.sources[0].steps.epoch_of(11)
    run("cut", 6)
    run("cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    with pytest.raises(checkpoint.CheckpointError, match="other shares"):
        run("cut", 14, [(store, 1.0), both[1]])


def test_a_store_may_have_fewer_records_in_a_step_than_there_are_processes(store, tmp_path):
    """None, even; the mixture too. All are trained on once, and a process without any has a batch without a loss."""
    few = [(store, 0.004), (store, 0.004), (store, 0.004)]
    trainer = Trainer(recipe(store, tmp_path, steps=4), [(store, 1.0), *few], ALONE)
    trainer.train()
    assert 0 in {len(trainer.sources[1].steps.of(step)) for step in range(4)}
    for weights_of, step_tokens in (([(store, 1.0), *few], 1200), (few, 400)):
        whole = Trainer(recipe(store, tmp_path, step_tokens=step_tokens), weights_of, ALONE)
        covered = 0
        for step, world in [(step, world) for step in range(12) for world in (2, 3, 5)]:
            trainer, works = Trainer.__new__(Trainer), []
            trainer.__dict__.update(whole.__dict__)
            expected = sorted(n for source in whole.sources for n in source.steps.of(step).tolist())
            for rank in range(world):
                trainer.processes = Processes(rank, world, torch.device("cpu"))
                works.append(trainer._work(step))
            batches = [batch for work in works for batch in work.batches]
            idle = [batch for batch in batches if len(batch.targets) and (batch.targets < 0).all()]
            got = [batch.batch.order.tolist() for batch in batches if not any(batch is one for one in idle)]
            assert sorted(sum(got, [])) == expected
            assert len(idle) == max(0, world - len(expected)) and all(work.batches for work in works), (step, world)
            covered += not idle
        assert covered > 3


def test_a_run_whose_steps_would_be_empty_is_refused_before_it_begins(store, tmp_path, monkeypatch):
    """Whatever the store and the order: a run that begins has a record in every step of it."""
    refused = 0
    for many, step_tokens in itertools.product((4_000_000, 0), (20, 40, 48, 60)):  # sorted, computed
        monkeypatch.setattr(sources, "MANY", many)
        given, source = recipe(store, tmp_path, step_tokens=step_tokens, steps=200), None
        try:
            source = Trainer(given, store, ALONE).sources[0]
        except RecipeError as error:
            number = int(re.search(r"step (\d+) has no sequence; give a whole number from 96", str(error))[1])
            (source,) = sources.sources_of(given, store)
            assert not len(source.steps.of(number - 1)) and all(len(source.steps.of(n)) for n in range(number - 1))
            refused += 1
        else:
            assert all(len(source.steps.of(step)) for step in range(200))
    assert 0 < refused < 8
    assert sources.sources_of(recipe(store, tmp_path, step_tokens=96), store)[0].steps.least
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(as_dict(recipe(store, tmp_path / "o", step_tokens=20, steps=200))))
    assert main(["pretrain", str(path), "--fast-dev-run"]) == 1 and not (tmp_path / "o").exists()


def test_another_run_is_not_continued(store, tmp_path):
    train(store, tmp_path, steps=4)
    with pytest.raises(checkpoint.CheckpointError, match="learning_rate was 0.003, is 0.001"):
        train(store, tmp_path, learning_rate=1e-3)
    train(store, tmp_path, steps=6, batch_tokens=300)  # longer, and in smaller batches: the same run


def test_a_damaged_checkpoint_alone_is_refused_by_name(store, tmp_path):
    train(store, tmp_path, steps=4)
    path = checkpoint.paths(tmp_path / "checkpoints")[-1]
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    info = path / "checkpoint.json"
    assert '"updates": 4' in info.read_text()
    for damage, problem in (
        (
            lambda: file.write_bytes(content),
            "does not match its checksum; there is no whole one before it",
        ),
        (lambda: file.write_bytes(content[:1000]), "does not match"),
        (file.unlink, f"{file.name} is missing"),
        (lambda: info.write_text(info.read_text().replace('"updates": 4', '"updates": 5')), "its own checksum"),
        (info.unlink, "damaged.*checkpoint.json"),
    ):
        damage()
        with pytest.raises(checkpoint.CheckpointError, match=problem):
            train(store, tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(store, tmp_path):
    """Said, set aside, and made again: the curve is that of a run without damage."""
    train(store, tmp_path / "whole")
    train(store, tmp_path / "cut", steps=8)
    newest = checkpoint.paths(tmp_path / "cut" / "checkpoints")[-1]
    for damage in range(2):
        (file,) = newest.glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 64
        file.write_bytes(content)
        with pytest.warns(UserWarning, match=r"step_000000008 is damaged .*: resuming from step_000000004"):
            train(store, tmp_path / "cut", steps=8 if damage == 0 else 12)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    left = sorted(path.name for path in newest.parent.iterdir())
    assert left == ["step_000000008", "step_000000008.damaged", "step_000000008.damaged.1", "step_000000012"]


def test_only_the_runs_own_files_are_touched(store, tmp_path):
    """What others keep in these folders stays, and no run is resumed from a copy."""
    foreign = [".tmpAbC123/results.csv", ".notes.partial", "checkpoints/.tmpXyZ987", "checkpoints/step_last/notes",
               "checkpoints/step_000000001_good/x", "checkpoints/.step_000000003.partial.bak/x"]  # fmt: skip
    for name in foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("theirs")
    train(store, tmp_path, steps=8, save_every=2)
    shutil.copytree(tmp_path / "checkpoints" / "step_000000008", tmp_path / "checkpoints" / "step_000000099.bak")
    (tmp_path / "checkpoints" / "step_000000007").symlink_to("step_000000099.bak")
    trainer = train(store, tmp_path, steps=12, save_every=2)
    assert trainer.step == 12 and [entry["step"] for entry in read_log(tmp_path / "log.jsonl") if "loss" in entry] == [
        *range(1, 13)
    ]
    assert all((tmp_path / name).read_text() == "theirs" for name in foreign)
    assert (tmp_path / "checkpoints" / "step_000000099.bak").exists()
    assert (tmp_path / "checkpoints" / "step_000000007").is_symlink()


def test_two_runs_never_share_an_output(store, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with only_run(tmp_path / "run", ALONE):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    with pytest.raises(BusyError, match="another process trains into"):
        train(store, tmp_path / "run")
    leave.set()
    thread.join()
    train(store, tmp_path / "run", steps=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves(store, tmp_path, number):
    """Between two checkpoints; the same run resumes, and nothing was lost."""
    stopped = Trainer(recipe(store, tmp_path / "cut", save_every=50), store, ALONE)
    with pytest.raises(Stopped, match="stopped after step 5"):
        stopped.train(lambda step, entry: os.kill(os.getpid(), number) if step == 4 else None)
    assert [path.name for path in checkpoint.paths(tmp_path / "cut" / "checkpoints")] == ["step_000000005"]
    train(store, tmp_path / "whole", save_every=50)
    train(store, tmp_path / "cut", save_every=50)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_trial_run_removes_trial_runs_alone(store, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {json.dumps(MODEL)}\nstore: {store.path}\noutput: {tmp_path}\nsteps: 9\n"
    )
    (tmp_path / "fast_dev_run").mkdir()
    (tmp_path / "fast_dev_run" / "mine").write_text("precious")
    assert main(["pretrain", str(tmp_path / "recipe.yaml"), "--fast-dev-run"]) == 1
    assert "is in the way of the trial run" in capsys.readouterr().err
    assert (tmp_path / "fast_dev_run" / "mine").read_text() == "precious"


def test_a_large_checkpoint_is_several_files(store, tmp_path, monkeypatch):
    """So that a process that writes never has more than one of them in memory; read by one with another limit."""
    train(store, tmp_path / "whole")
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 4096)
    train(store, tmp_path / "pieces", steps=8)
    assert len(list(checkpoint.paths(tmp_path / "pieces" / "checkpoints")[-1].glob("*.safetensors"))) > 3
    monkeypatch.undo()
    train(store, tmp_path / "pieces")
    assert curve(tmp_path / "pieces") == curve(tmp_path / "whole")


# ---- several processes


def launch(count, tmp_path, recipe_path, output):
    script = tmp_path / "ranks.py"
    script.write_text(COMMAND)
    run_processes(count, script, "pretrain", recipe_path, "-o", tmp_path / output)


def test_processes_share_a_run(store, tmp_path):
    """As one process, to within the order of sums in fp32, whatever their number and the sharding along the way."""
    values = dict(model=MODEL, store=str(store.path), output="", steps=12, step_tokens=2400, batch_tokens=300)
    values |= dict(learning_rate=3e-3, warmup=4, log_every=1, valid_every=8, save_every=4, plot=False)
    path = tmp_path / "recipe.yaml"
    # At first each sequence is a batch, of which one process has one more than the other in some steps.
    # Sharded parameters of many buckets, with and without decay; none lies as it did for the other processes.
    values |= dict(weight_decay=0.1)
    for count, sharding, steps, batch in ((2, "none", 4, 2), (3, "zero1", 8, 300)):
        path.write_text(json.dumps(values | dict(sharding=sharding, steps=steps, batch_tokens=batch)))
        launch(count, tmp_path, path, "several")
        assert len(curve(tmp_path / "several")) == steps
    for output in ("alone", "several"):  # the second resumes where the processes ended
        Trainer(recipe_from(values | dict(output=str(tmp_path / output))), store, ALONE).train()
    several, alone = curve(tmp_path / "several"), curve(tmp_path / "alone")
    assert len(several) == len(alone) == 12
    np.testing.assert_allclose(several, alone, rtol=2e-5)
    valid = {name: curve(tmp_path / name, "valid_loss") for name in ("several", "alone")}
    np.testing.assert_allclose(valid["several"][-2:], valid["alone"], rtol=2e-5)


def test_processes_without_a_record_in_a_step(store, tmp_path):
    """Fewer sequences than processes in most steps: the losses of one process."""
    values = as_dict(recipe(store, "", step_tokens=70, steps=8, valid_every=8, save_every=4))
    path = tmp_path / "recipe.yaml"
    for sharding, steps in (("none", 4), ("zero1", 8)):
        path.write_text(json.dumps(values | dict(store=str(store.path), sharding=sharding, steps=steps)))
        launch(3, tmp_path, path, "three")
    alone = train(store, tmp_path / "alone", step_tokens=70, steps=8, valid_every=8, save_every=4)
    assert min(len(alone.sources[0].steps.of(step)) for step in range(8)) < 3
    for name in ("loss", "gradient_norm", "valid_loss"):
        three, one = (curve(tmp_path / output, name) for output in ("three", "alone"))
        np.testing.assert_allclose(three[-len(one) :], one, rtol=1e-4)


def test_a_signal_to_one_process_stops_and_saves_all(store, tmp_path):
    """Within a step of it, long before they log or save."""
    values = as_dict(recipe(store, tmp_path / "two", log_every=50, valid_every=50, save_every=50, steps=50))
    (tmp_path / "recipe.json").write_text(json.dumps(values | dict(store=str(store.path))))
    (tmp_path / "two.py").write_text(f"""if True:
        import json, os, signal
        from esm_fast.train.loop import Trainer
        from esm_fast.train.processes import joined
        from esm_fast.train.recipe import recipe_from
        from esm_fast.train.running import Stopped
        from esm_fast.train.store import open_store
        with joined() as processes:
            recipe = recipe_from(json.load(open("{tmp_path}/recipe.json")))
            trainer = Trainer(recipe, open_store(recipe.store), processes)
            def at(step, entry):
                if step == 3 and not processes.first:
                    os.kill(os.getpid(), signal.SIGTERM)
            try:
                trainer.train(at)
            except Stopped as stopped:
                assert "stopped after step 5" in str(stopped), stopped
            assert trainer.step == 5""")
    run_processes(2, tmp_path / "two.py")
    assert [path.name for path in checkpoint.paths(tmp_path / "two" / "checkpoints")] == ["step_000000005"]


def test_shares_of_an_update_in_half_precision(store, tmp_path):
    """What several processes hand out in bf16 is what one casts for itself; fp32 stays where it is updated."""
    values = as_dict(recipe(store, "", precision="bfloat16", sharding="zero1", steps=6, valid_every=3, save_every=3))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values | dict(store=str(store.path))))
    launch(2, tmp_path, path, "two")
    train(store, tmp_path / "one", precision="bfloat16", steps=6, valid_every=3, save_every=3)
    for name in ("loss", "gradient_norm", "valid_loss"):
        np.testing.assert_allclose(curve(tmp_path / "two", name), curve(tmp_path / "one", name), rtol=3e-3)
    one, two = (weights.read(tmp_path / name / "model.safetensors").tensors for name in ("one", "two"))
    moved = new_model(Config(**MODEL), 3, 0.02).state_dict()
    for name, tensor in one.items():
        if name.endswith("k_proj.bias"):  # changes nothing: its gradient is rounding alone
            continue
        step = (tensor - moved[name]).abs().max() + 1e-6
        assert (tensor - two[name]).abs().max() < 0.2 * step, name


def test_processes_that_are_restarted_find_each_other(tmp_path):
    """And not those before them, whose addresses a torchrun on one machine keeps."""
    (tmp_path / "part.py").write_text("""if True:
        import os
        from esm_fast.train.processes import joined
        with joined() as processes:
            assert processes.sum(1.0) == [2.0]
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os._exit(3)""")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--master-port", port]
    command = [sys.executable, *launcher, str(tmp_path / "part.py")]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0


def test_the_first_process_leaves_last(tmp_path):
    """Where no torchrun keeps the store, it is in the first process, and others may be held up before they ask it."""
    (tmp_path / "part.py").write_text("""if True:
        import os, time
        import torch.distributed as dist
        from esm_fast.train.processes import joined
        wait = dist.PrefixStore.wait
        def late(store, keys):
            time.sleep(1.0 * (os.environ["RANK"] == "1"))
            return wait(store, keys)
        with joined() as processes:
            assert processes.sum(1.0) == [3.0]
            dist.PrefixStore.wait = late
        os._exit(0)""")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    command = [sys.executable, str(tmp_path / "part.py")]
    running = [subprocess.Popen(command, env=environ | {"RANK": str(n)}, stderr=subprocess.PIPE) for n in range(3)]
    errors = [process.communicate(timeout=300)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], errors


# ---- precision, and numbers that are none


def test_fewer_held_out_proteins_than_processes(store, tmp_path):
    """Each is validated once, whoever has it."""
    whole = Trainer(recipe(store, tmp_path), store, ALONE)
    records = whole.sources[0].valid_records[:2]
    counted = []
    for rank in range(3):
        trainer = Trainer.__new__(Trainer)
        trainer.__dict__.update(whole.__dict__, processes=Processes(rank, 3, torch.device("cpu")))
        work = trainer._share(records, -1, trainer.sources[0].valid_masker)
        counted += [number for batch in work.batches for number in batch.batch.order.tolist()]
    assert sorted(counted) == sorted(records.tolist())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_as_fp32_does(store, tmp_path, precision):
    run = Trainer(recipe(store, tmp_path / "half", precision=precision, steps=30), store, ALONE)
    if run.scale:  # of a token: from 2^15, as fairseq, the first steps overflow and are skipped, and the curves part
        run.scale = LossScale(2.0**8)
    run.train()
    train(store, tmp_path / "full", steps=30)
    half, full = curve(tmp_path / "half"), curve(tmp_path / "full")
    assert full[-1] < full[0] - 0.1
    np.testing.assert_allclose(half, full, atol=0.03)
    assert half != full
    assert weights.read(tmp_path / "half" / "model.safetensors").dtype == torch.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputing_keeps_less_and_changes_no_bit(store, tmp_path, precision):
    kept = {}
    for recompute in (False, True):
        output = tmp_path / str(recompute)
        trainer = Trainer(recipe(store, output, recompute=recompute, precision=precision, steps=3), store, ALONE)
        masked, sizes = (
            trainer.sources[0].masker.batch(trainer.sources[0].steps.records[trainer.sources[0].steps[0]], 0),
            [],
        )
        rows = len(masked.batch.tokens)

        def keep(tensor, rows=rows, sizes=sizes):
            sizes.extend([tensor.nbytes] * (tensor.shape[:1] == (rows,)))  # no parameters
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.model(masked)
        kept[recompute] = sum(sizes)
        trainer.train()
    assert 0 < kept[True] < kept[False] / 3
    assert curve(tmp_path / "True") == curve(tmp_path / "False")
    assert curve(tmp_path / "True", "gradient_norm") == curve(tmp_path / "False", "gradient_norm")


def test_an_overflow_skips_a_step_and_halves_the_scale(store, tmp_path):
    trainer = Trainer(recipe(store, tmp_path, precision="float16"), store, ALONE)
    trainer.scale = LossScale(2.0**40)
    before = trainer.esm.embed_tokens.weight.clone()
    entry = stepped(trainer, 0)
    assert entry["gradient_norm"] is None and entry["skipped"] == 1 and trainer.counted.updates == 0
    assert trainer.scale.scale == 2.0**39 and trainer.esm.embed_tokens.weight.equal(before)
    while trainer.counted.updates == 0:
        stepped(trainer, 0)
    assert trainer.scale.scale < 2.0**39


def test_a_gradient_that_is_not_finite_stops_the_run(store, tmp_path):
    trainer = Trainer(recipe(store, tmp_path), store, ALONE)
    with torch.no_grad():
        trainer.esm.layers[0].fc1.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite; there is no checkpoint yet"):
        trainer.train()
    train(store, tmp_path, steps=2, save_every=2)
    trainer = Trainer(recipe(store, tmp_path, steps=4), store, ALONE)
    trainer.esm.layers[0].fc1.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="step 3: .*the newest checkpoint, from before it, is .*step_0*2\\. "):
        trainer.train()


def test_a_gradient_that_is_not_finite_can_be_skipped(store, tmp_path):
    """The step changes nothing, the next one counts; eleven in a row stop the run all the same."""
    trainer = Trainer(recipe(store, tmp_path, non_finite="skip", steps=40), store, ALONE)
    weight = trainer.esm.layers[0].fc1.weight
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    before = trainer.esm.embed_tokens.weight.clone()
    entry = stepped(trainer, 0)
    assert entry["gradient_norm"] is None and trainer.esm.embed_tokens.weight.equal(before)
    hook.remove()
    assert trainer.counted.updates == 0 and stepped(trainer, 1)["gradient_norm"] > 0 and trainer.counted.updates == 1
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="step 13: the gradient of 11 steps in a row is not finite"):
        trainer.train()


def _poisoned(trainer, *steps):
    """The gradients of these batches, counted from 1 whatever was passed over, are not finite."""
    step = trainer._step

    def poisoned(work):
        weight = trainer.esm.layers[0].fc1.weight
        bad = trainer.step + 1 + trainer.passed in steps
        hook = weight.register_hook(lambda gradient: gradient * (float("nan") if bad else 1.0))
        try:
            return step(work)
        finally:
            hook.remove()

    trainer._step = poisoned
    return trainer


def test_a_run_is_rolled_back(store, tmp_path):
    """To the last checkpoint, with the batches since then passed over; as a run that never saw them, whenever it is
    looked, and whenever it is cut off. Where it does not help, the run ends."""
    options = dict(non_finite="roll_back", steps=12)
    bad = (3, 10, 13)  # 3: back to the beginning, 10: to step 4, 13 = 4 + 3 + 3 + ...: to step 4 again

    def run(name, cut=0, **changes):
        trainer = _poisoned(Trainer(recipe(store, tmp_path / name, **options | changes), store, ALONE), *bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(lambda step, entry: 1 / 0 if step == cut and trainer.passed else None)
        return trainer

    with pytest.warns(UserWarning, match="step 3: the gradient is not finite: back to step 0, past the batches of ste"):
        _poisoned(Trainer(recipe(store, tmp_path / "told", **options | {"steps": 4}), store, ALONE), 3).train()
    whole = run("whole")
    assert whole.step == 12 and whole.passed == 3 + 3 + 3
    notes = [entry for entry in read_log(tmp_path / "whole" / "log.jsonl") if "rolled_back_from" in entry]
    assert [(note["step"], note["rolled_back_from"], note["passed"]) for note in notes] == [
        (0, 3, 3), (4, 7, 6), (4, 7, 9)]  # fmt: skip
    never = Trainer(recipe(store, tmp_path / "never", steps=12), store, ALONE)
    work, order = never._work, [*range(3, 7), *range(13, 21)]  # batches, from 0: none that led to one of `bad`
    never._work = lambda step: work(order[step])
    never.train()
    assert curve(tmp_path / "whole") == curve(tmp_path / "never")
    rare = run("rare", log_every=7)
    for cut in (2, 6, 11):
        with pytest.raises(ZeroDivisionError):
            run("cut", cut)
    cut = run("cut")
    for name, parameter in whole.parameters.items():
        assert parameter.equal(rare.parameters[name]) and parameter.equal(cut.parameters[name]), name
    times = ("tokens_per_second", "mfu", "goodput")
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    for entry in logs[0] + logs[1]:
        for name in times:
            entry.pop(name, None)
    assert logs[0] == logs[1]
    hopeless = _poisoned(Trainer(recipe(store, tmp_path / "no", **options), store, ALONE), *range(5, 99))
    with pytest.warns(UserWarning), pytest.raises(FloatingPointError, match="after each of 3 returns to .*000000004"):
        hopeless.train()


def test_nothing_waits_for_the_device_between_logs(store, tmp_path, monkeypatch):
    """No number of a tensor is asked for by the loop but where it logs, validates or saves; scales in fp16 included."""
    asked, now = [], [0]
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, original=original, name=name):
            frame = sys._getframe(1)
            while frame.f_code.co_filename.startswith(torch.__path__[0]):  # a number may be asked for by torch
                frame = frame.f_back
            if Path(frame.f_code.co_filename).parent.name == "train" and "esm_fast" in frame.f_code.co_filename:
                asked.append((now[0], f"{frame.f_code.co_qualname}: {name}"))
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    masked = ("Masker.", "pack")  # made beside the steps, in the host's memory
    for precision in ("float16", "float32"):
        options = dict(precision=precision, log_every=4, valid_every=8, save_every=12, clip=1.0, non_finite="skip")
        trainer = Trainer(recipe(store, tmp_path / precision, **options), store, ALONE)
        asked.clear()
        trainer.train(lambda step, entry: now.__setitem__(0, step))
        # What is asked for after step n was told belongs to step n + 1, or to saving and validating after n.
        between = [what for step, what in asked if step % 4 not in (0, 3) and not what.startswith(masked)]
        assert not between and any(step % 4 == 3 for step, _ in asked), between


def test_checkpoints_are_written_beside_the_steps(store, tmp_path, monkeypatch):
    """The run steps on while one is written, of the numbers as they were; the next one waits for it; its error ends the
    run, and leaves the one before. With the switch off, the steps wait, and the same is written."""
    save, events, hold = checkpoint.save, [], threading.Event()

    def slow(folder, step, *rest):
        events.append((f"begins {step}", threading.current_thread() is threading.main_thread()))
        if step == 4:
            assert hold.wait(60)
        if step == 12 and "fails" in str(folder):
            raise checkpoint.CheckpointError("the disk is full")
        path = save(folder, step, *rest)
        events.append((f"ends {step}", threading.current_thread() is threading.main_thread()))
        return path

    monkeypatch.setattr(checkpoint, "save", slow)

    def told(step, entry):
        events.append((step, True))
        if step == 7:
            hold.set()

    Trainer(recipe(store, tmp_path / "beside", keep=3), store, ALONE).train(told)
    names = [name for name, _ in events]
    assert names.index(7) < names.index("ends 4") < names.index("begins 8") and not dict(events)["begins 4"]
    waits = tmp_path / "waits"
    Trainer(recipe(store, waits, keep=3, async_checkpoints=False), store, ALONE).train()
    assert events[-1] == ("ends 12", True)
    files = [path.relative_to(waits) for path in (waits / "checkpoints").rglob("*.safetensors")]
    assert len(files) == 3
    for file in files:
        one, other = (load_file(output / file) for output in (waits, tmp_path / "beside"))
        assert one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items()), file
    with pytest.raises(checkpoint.CheckpointError, match="the disk is full"):
        Trainer(recipe(store, tmp_path / "fails", steps=14), store, ALONE).train()
    assert checkpoint.newest(tmp_path / "fails" / "checkpoints", ALONE).state["step"] == 8


def test_goodput_and_the_deterministic_switch(store, tmp_path):
    """The same bits, a share of the time, and torch is left as it was."""
    train(store, tmp_path / "a", steps=4)
    states = []
    trainer = Trainer(recipe(store, tmp_path / "b", steps=4, deterministic=True), store, ALONE)
    trainer.train(lambda step, entry: states.append(torch.are_deterministic_algorithms_enabled()))
    assert states == [True] * 4 and not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the caller's own way, which stays
    try:
        Trainer(recipe(store, tmp_path / "c", steps=1), store, ALONE).train()
        Trainer(recipe(store, tmp_path / "d", steps=1, deterministic=True), store, ALONE).train()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert all(0 < share < 1 for share in curve(tmp_path / "b", "goodput"))


def test_loss_scale():
    scale = LossScale(scale=8.0, window=3, smallest=1.0)
    for _ in range(4):
        scale.update(torch.tensor(False))
    assert scale.state() == dict(scale=16.0, good=1, window=3, smallest=1.0)
    for wanted in (8.0, 4.0, 2.0, 1.0):
        scale.update(torch.tensor(True))
        scale.check()
        assert (scale.scale, scale.good) == (wanted, 0)
    scale.update(torch.tensor(True))
    with pytest.raises(FloatingPointError, match="fell below"):
        scale.check()


def test_learning_rate():
    rates = [learning_rate(n, 1e-4, 16_000) for n in (0, 1, 8_000, 16_000, 64_000)]
    assert rates == pytest.approx([0, 1e-4 / 16_000, 5e-5, 1e-4, 5e-5])
    assert learning_rate(0, 1e-4, 0) == 1e-4
    assert [cooldown_factor(n, 10, 4) for n in (0, 6, 7, 9)] == [1, 1, 0.75, 0.25]


# ---- what a run leaves


def test_the_model_is_one_that_embed_reads(store, tmp_path):
    trainer = train(store, tmp_path)
    model, _ = esm_fast.load(tmp_path / "model.safetensors")
    (_, layers), *_ = esm_fast.embed(model, ["MKTAYIAK"])
    assert layers[-1].shape == (16,) and np.isfinite(layers[-1]).all()
    for name, parameter in trainer.parameters.items():
        assert parameter.equal(model.get_parameter(name)), name
    assert weights.read(tmp_path / "best.safetensors").config == trainer.recipe.model


def test_the_command(store, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {json.dumps(MODEL)}\nstore: {store.path}\noutput: {tmp_path / 'run'}\nsteps: 9\n")
    assert main(["pretrain", str(path), "--fast-dev-run"]) == 0
    run = tmp_path / "run" / "fast_dev_run"
    assert len(curve(run)) == 3 and len(curve(run, "valid_perplexity")) == 1
    assert (run / "curves.png").read_bytes()[1:4] == b"PNG"
    path.write_text("steps: many\n")
    assert main(["pretrain", str(path)]) == 1
    assert "lacks model, store, output" in capsys.readouterr().err


def test_a_log_continues_after_a_cut(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    log = Log(tmp_path, 1)
    log.add(step=2, loss=5.5)
    log.add(step=3, loss=float("nan"))  # of a step that overflowed
    log.close()
    assert read_log(log.path) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 5.5}, {"step": 3, "loss": None}]


def test_tensorboard_gets_what_the_log_gets(store, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    train(store, tmp_path, steps=3, valid_every=3, tensorboard=True)
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    got = {(name, e.step): e.value for name in board.Tags()["scalars"] for e in board.Scalars(name)}
    expected = {
        (name, entry["step"]): pytest.approx(value)
        for entry in read_log(tmp_path / "log.jsonl")
        for name, value in entry.items()
        if name != "step" and value is not None
    }
    assert {("loss", 1), ("valid_loss", 3)} < set(got) and got == expected


def test_recipes_that_ship():
    paths = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    recipes = {path.stem: read_recipe(path) for path in paths}
    assert list(recipes) == ["esm1b_650M_h100", "esm1b_650M_v100", "esm1b_t6_demo", "esm2_650M_h100"]
    card = recipes["esm1b_650M_v100"]
    assert (card.steps, card.step_tokens, card.learning_rate, card.warmup) == (500_000, 131_072, 1e-4, 16_000)
    assert card.masking.replacements == recipes["esm1b_650M_h100"].masking.replacements == "amino_acids"
    second = recipes["esm2_650M_h100"]
    assert (second.schedule, second.warmup, second.betas, second.weight_decay) == ("linear", 2000, (0.9, 0.98), 0.01)


def test_a_run_begins_from_given_weights(store, tmp_path):
    """Of a file, whose sizes it then has; at a rate of almost nothing they stay what they were."""
    first = train(store, tmp_path / "a")
    values = dict(model=None, init=str(tmp_path / "a" / "model.safetensors"), store=str(store.path), plot=False)
    values |= dict(output=str(tmp_path / "b"), steps=2, step_tokens=1200, batch_tokens=500, log_every=1, warmup=0)
    run = Trainer(recipe_from(values | {"learning_rate": 1e-12}), store, ALONE)
    assert run.recipe.model == first.recipe.model
    run.train()
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(parameter, first.parameters[name], atol=1e-9, rtol=0)
    with pytest.raises(RecipeError, match="other sizes"):
        Trainer(recipe_from(values | {"model": MODEL | {"layers": 1}}), store, ALONE)
    for wrong in (str(tmp_path / "none.safetensors"), str(tmp_path)):
        with pytest.raises(RecipeError, match="init is"):
            recipe_from(values | {"init": wrong})


def test_a_fork_goes_on_from_another_run_with_changes(store, tmp_path):
    """As that run would have, with another rate otherwise; resumed, as if never stopped. The other run stays."""
    whole = train(store, tmp_path / "whole")
    train(store, tmp_path / "a", steps=4)
    before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    fork = Trainer(recipe(store, tmp_path / "same"), store, ALONE, fork=tmp_path / "a")
    fork.train()
    assert curve(tmp_path / "same") == curve(tmp_path / "whole")[4:]
    assert all(torch.equal(p, whole.parameters[name]) for name, p in fork.parameters.items())
    changes = dict(learning_rate=1e-3, precision="bfloat16", weight_decay=0.1)
    Trainer(recipe(store, tmp_path / "other", **changes), store, ALONE, fork=tmp_path / "a").train()
    Trainer(recipe(store, tmp_path / "cut", steps=8, **changes), store, ALONE, fork=tmp_path / "a").train()
    Trainer(recipe(store, tmp_path / "cut", **changes), store, ALONE, fork=tmp_path / "a").train()
    assert curve(tmp_path / "cut") == curve(tmp_path / "other") != curve(tmp_path / "same")
    assert "step_000000004" in json.loads((tmp_path / "same" / "recipe.json").read_text())["forked_from"]
    assert before == {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    for where, problem, other in ((tmp_path, "no checkpoint to fork", {}), (tmp_path / "a", "raise it", {"steps": 3})):
        with pytest.raises(checkpoint.CheckpointError, match=problem):
            Trainer(recipe(store, tmp_path / "no", **other), store, ALONE, fork=where).train()


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_weight_decay_is_decoupled(store, tmp_path, decay):
    """As fairseq's Adam has it: p -= rate * decay * p beside the step; of matrices, or of everything."""
    plain, decayed = (
        Trainer(recipe(store, tmp_path / name, weight_decay=wd, decay=decay, warmup=0), store, ALONE)
        for name, wd in (("a", 0.0), ("b", 0.1))
    )
    before = {name: p.detach().clone() for name, p in plain.parameters.items()}
    for run in (plain, decayed):
        run._step(run._work(0))
    for name, parameter in decayed.parameters.items():
        share = 0.0 if decay == "matrices" and parameter.ndim < 2 else 3e-3 * 0.1
        expected = plain.parameters[name] - share * before[name]
        torch.testing.assert_close(parameter, expected, atol=1e-7, rtol=1e-5)


def test_linear_rate():
    rates = [linear_rate(n, 4e-4, 2000, 500_000) for n in (0, 1000, 2000, 226_000, 450_000, 499_999)]
    assert rates == pytest.approx([0, 2e-4, 4e-4, 2.2e-4, 4e-5, 4e-5])


@pytest.mark.parametrize(
    "text, problem",
    [
        ("model: esm1b_t7\nstore: a\noutput: b\nsteps: 1", "choose from esm1b_t33"),
        ("model: esm1b_t6_demo\nstore: a\noutput: b\nsteps: 1\nsteptokens: 3", "unknown entries: steptokens"),
        ("model: esm1b_t6_demo\nstore: a\noutput: b\nsteps: 1.5", "steps is 1.5; expected a whole number"),
        ("model: esm1b_t6_demo\nstore: a\noutput: b\nsteps: 1\nprecision: fp8", "precision is 'fp8'"),
        ("model: esm1b_t6_demo\nstore: a\noutput: b\nsteps: 1\nattention: near", "attention is 'near'"),
        ("model: esm1b_t6_demo\nstore: a\noutput: b\nsteps: 1\nmasking: {specials: all}", "specials is 'all'"),
        ("[", "is not YAML"),
        ("3", "expected names and values"),
    ],
)
def test_recipe_mistakes(tmp_path, text, problem):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=problem):
        read_recipe(tmp_path / "r.yaml")


def test_attention_begins_at_neighbours():
    """Two heads of layer l weigh the residues l before and l behind most, at any place; random ones none."""
    config, size = Config(2, 96, 64, 3), 200
    tokens = torch.cat([torch.tensor([0]), torch.randint(4, 24, (size,)), torch.tensor([2])])[None]
    batch, _ = pack_padded(tokens)
    for how in ("normal", "neighbours"):
        model = new_model(config, 0, 0.02, attention=how)
        assert not model.embed_positions.weight[1].any()  # of padding
        with torch.no_grad():
            maps = model.forward_packed(batch, attentions=True).attentions[0][:, :2, 10:-10]
        for layer, heads in enumerate(maps, start=1):
            for head, offset in zip(heads, (-layer, layer), strict=True):
                found = head.argmax(1) == torch.arange(10, 10 + len(head)) + offset
                assert (found.float().mean() > 0.9) == (how == "neighbours")


def test_recipe_numbers_without_a_dot(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: esm1b_t6_demo\nstore: a\noutput: b\nsteps: 1\nlearning_rate: 1e-4\nclip: 1"
    )
    read = read_recipe(tmp_path / "r.yaml")
    assert read.learning_rate == 1e-4 and read.clip == 1 and read.masking.share == 0.15


def test_the_environment_is_set_before_torch_reads_it():
    code = """if True:
        import os, sys
        from esm_fast.cli import main
        from esm_fast.train import environment
        prepare = environment.prepare
        environment.prepare = lambda: (print("torch" in sys.modules), prepare())
        main(["pretrain", "nowhere.yaml"])
        print(*(os.environ[name] for name in environment.SETTINGS))"""
    environ = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, "GOMP_SPINCOUNT": "7"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.split() == ["False", "7", SETTINGS["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]], done.stderr


VALUES = [
    None,
    True,
    "",
    "many",
    "1e-4",
    -1,
    0,
    1,
    3,
    -0.5,
    0.5,
    1e400,
    float("nan"),
    10**400,
    [],
    [0.9],
    [0.9, 2],
    {},
    [[]],
]


@pytest.mark.parametrize("entry", [f.name for f in dataclasses.fields(Recipe)])
def test_every_entry_of_a_recipe_is_taken_or_refused_by_name(tmp_path, entry):
    """Wrong types and ranges alike; what is taken can be written and read again."""
    plain = dict(model=MODEL, store="s", output="o", steps=5)
    taken = 0
    for value in VALUES:
        try:
            made = recipe_from(plain | {entry: value})
        except RecipeError as error:
            assert entry in str(error) or (entry == "steps" and "cooldown" in str(error)), (value, error)
        else:
            assert recipe_from(json.loads(json.dumps(as_dict(made)))) == made
            taken += 1
    assert taken < len(VALUES)


GROUPS = [("masking", f.name) for f in dataclasses.fields(Masking)] + [("model", name) for name in (*MODEL, "family")]


@pytest.mark.parametrize("group, entry", GROUPS)
def test_every_entry_of_a_group_is_taken_or_refused_by_name(group, entry):
    plain, refused = dict(model=MODEL, store="s", output="o", steps=5, masking={}), 0
    for value in VALUES:
        try:
            made = recipe_from(plain | {group: plain[group] | {entry: value}})
        except RecipeError as error:
            assert group in str(error) and any(word in str(error) for word in (entry, entry.replace("_", " "))), error
            refused += 1
        else:
            assert recipe_from(json.loads(json.dumps(as_dict(made)))) == made  # nan is not: none is taken
    assert refused >= 10


@pytest.mark.parametrize(
    "wrong",
    [dict(cooldown=-5), dict(cooldown=6), dict(learning_rate=-1e-4), dict(betas=[0.9, 1.0]), dict(weight_decay=-1)],
)
def test_a_recipe_that_would_train_uphill_or_not_at_all_is_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        recipe_from(dict(model=MODEL, store="s", output="o", steps=5) | wrong)
