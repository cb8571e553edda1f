"""The CUDA kernels under sanitizers, and faults planted in them: each must be found by the build that is there for it.

Every launch of the exercises is recorded and replayed with AddressSanitizer and UndefinedBehaviorSanitizer, and with
ThreadSanitizer, for which barriers are the only order between a block's threads. In fp16: the dtype changes conversions
and widths of packs, both of which the tests of the plain build go through in every dtype.
"""

import re
from typing import NamedTuple

import pytest
import torch
from building import at_once
from cuda_emulator import emulator
from cuda_emulator.emulator import BOUNDS, QUICK, RACES, SOURCES, EmulatorError, Recorder, Unit
from cuda_emulator.exercises import exercises
from esm_fast.kernels.cuda.common import executed_by
from esm_fast.kernels.cuda.launch import SCALARS

DTYPE = torch.float16
EXERCISES = {exercise.name: exercise for exercise in exercises()}


@pytest.fixture(scope="module")
def recorded(cuda_library, tmp_path_factory):
    """Records what some exercises launch."""

    def record(names, path):
        recorder = UnitsRecorder(cuda_library, path)
        with executed_by(recorder):
            assert all(EXERCISES[name].run(DTYPE) for name in names)
        return recorder

    folder = tmp_path_factory.mktemp("recordings")
    return lambda *names: record(names, folder / "recording")


class UnitsRecorder(Recorder):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.units = set()

    def launch(self, launch):
        self.units.add(Unit(SOURCES / f"{launch.source}.cu", SCALARS[launch.dtype]))
        super().launch(launch)


def test_every_kernel_is_clean(recorded):
    """By the launches of all exercises but pre_ln_attention's, which are those of others once more."""
    recording = recorded(*(name for name in EXERCISES if not name.startswith("pre_ln_attention")))
    kernels = {unit.source.name for unit in recording.units}
    assert kernels == {source.name for source in SOURCES.glob("*.cu")}

    def replayed(flags):
        done = emulator.replay(emulator.program(sorted(recording.units), flags), recording.path, seed=2)
        assert (done.returncode, done.stdout) == (0, f"{recording.launches} launches\n"), done.stderr[-4000:]

    at_once(lambda: replayed(BOUNDS), lambda: replayed(RACES))


class Mutant(NamedTuple):
    """A fault: `right` in csrc/cuda/<source>.cu becomes `wrong`, and this exercise must show it in this build."""

    source: str
    right: str
    wrong: str
    exercise: str
    build: tuple[str, ...] = QUICK
    message: str = ""  # of the sanitizer


ATTENTION, CONTACTS = "attention_varlen-primes", "contact_map-primes"
RACE, OVERFLOW = "data race", "buffer-overflow"
BARRIER = "    __syncthreads();\n"
MUTANTS = {
    "barrier_column_sums": Mutant("column_sums", BARRIER, "", "layer_norm", RACES, RACE),
    "barrier_block_sums": Mutant("layer_norm", BARRIER, "", "layer_norm", RACES, RACE),
    "barrier_norm": Mutant("layer_norm", "        }\n        __syncthreads();", "        }", "layer_norm", RACES, RACE),
    "one_buffer_for_two_turns": Mutant("layer_norm", "turn ^= 1", "turn ^= 0", "layer_norm", RACES, RACE),
    "barrier_gather_sum": Mutant("gather_sum", BARRIER, "", "embedding-primes", RACES, RACE),
    "barrier_pool": Mutant("pool", BARRIER, "", "pool-primes", RACES, RACE),
    "barrier_loss": Mutant("cross_entropy", BARRIER, "", "masked_lm_head-masked_rows", RACES, RACE),
    "small_array": Mutant("pool", "kWarps * kWarp * V)", "kWarps * kWarp * V - 1)", "pool-primes", BOUNDS, OVERFLOW),
    "next_rows_logits": Mutant(
        "cross_entropy", "shared + r * voc", "shared + (r + 56) * voc", "masked_lm_head-masked_rows", BOUNDS, OVERFLOW
    ),
    "guard_rows": Mutant("embedding", "row < rows;", "row <= rows;", "embedding-primes"),
    "guard_columns": Mutant("gather_sum", "!inside || factor", "factor", "embedding-primes"),
    "mask_of_sum": Mutant("masked_softmax", "column < valid ? expf", "column >= 0 ? expf", "masked_softmax-ragged"),
    "mask_of_rows": Mutant("masked_softmax", "row % size < length ? length : 0", "length", "masked_softmax-ragged"),
    "stride": Mutant(
        "layer_norm", "size_t start = size_t(row) * width", "size_t start = size_t(row) * 64", "gelu_ffn-prime_rows"
    ),
    "early_return": Mutant(
        "cross_entropy",
        "    load_tile(tile, logits, shared);\n",
        "    if (int(threadIdx.x) >= tile.rows) return;\n    load_tile(tile, logits, shared);\n",
        "masked_lm_head-masked_rows",
    ),
    "next_sequence": Mutant(
        "pool", "row < cu_seqlens[blockIdx.x + 1]", "row <= cu_seqlens[blockIdx.x + 1]", "pool-tiny"
    ),
    "poison_in_padding": Mutant("pack", "store_pack(to, p, Pack<scalar, V>{})", "(void)to", "unpack_rows-ragged"),
    "rows_not_searched": Mutant("pack", "low = middle + 1;", "low = high;", "unpack_rows-ragged"),
    "lane_left_out": Mutant(
        "layer_norm", "a = warp_reduce(a);", "if (threadIdx.x % 32) a = warp_reduce(a);", "layer_norm"
    ),
    "aligned_pack": Mutant("bias_gelu", "width % 4 ? 1 : 4", "4", "gelu_ffn-odd_hidden"),
    "gradient_of_gelu": Mutant("bias_gelu", "expf(-0.5f * x * x)", "expf(-0.4f * x * x)", "gelu_ffn-rows_33"),
    "two_blocks_one_share": Mutant("bias_gelu", "shares + size_t(blockIdx.y) * width", "shares", "gelu_ffn-rows_33"),
    "no_deviation": Mutant("layer_norm", "slope) * s.at[1];", "slope);", "gelu_ffn-prime_rows"),
    "barrier_attention": Mutant(
        "attention",
        BARRIER.replace("    ", "        ") + "        load_rows<kDim>(q",
        "        load_rows<kDim>(q",
        ATTENTION,
        RACES,
        RACE,
    ),
    "warp_barrier": Mutant("attention", "    __syncwarp();\n    scalar*", "    scalar*", ATTENTION, RACES, RACE),
    "wide_stride": Mutant("attention", "kDim + kWide;", "kDim + 4 * kWide;", ATTENTION, BOUNDS, OVERFLOW),
    "rows_of_the_next": Mutant("attention", "        if (row >= part.length) continue;\n", "", ATTENTION),
    "mask_of_keys": Mutant("attention", "column_of(j) < length ?", "column_of(j) <= length ?", ATTENTION),
    "stride_of_heads": Mutant("attention", "size_t(row) * step", "size_t(row) * dim", ATTENTION),
    "last_row": Mutant(
        "attention", "cu_seqlens[sequence + 1] - start,", "cu_seqlens[sequence + 1] - start - 1,", ATTENTION
    ),
    "contacts_mirror": Mutant("contact_map", "map.put(column + c, row + r,", "map.put(row + r, column + c,", CONTACTS),
    "contacts_kept": Mutant("contact_map", "keep[row] && keep[column]", "keep[row]", CONTACTS),
    "contacts_diagonal": Mutant("contact_map", "first >= left + kOther;", "first >= left;", CONTACTS),
    "contacts_barrier": Mutant(
        "contact_map",
        "        __syncthreads();\n        load_rows<kDim>(q, part, part.first",
        "        load_rows<kDim>(q, part, part.first",
        CONTACTS,
        RACES,
        RACE,
    ),
    "contacts_gradient_kept": Mutant(
        "contact_map_backward", "shared.rows[kOther + c] != 0.0f ? gradient", "true ? gradient", CONTACTS
    ),
    "contacts_gradient_delta": Mutant("contact_map_backward", "step.dp.at[j] - own_delta", "step.dp.at[j]", CONTACTS),
    "contacts_gradient_end": Mutant("contact_map_backward", "length && column + lane < length;", "length;", CONTACTS),
    "contacts_gradient_barrier": Mutant(
        "contact_map_backward", BARRIER + "    load_rows<kDim>(k", "    load_rows<kDim>(k", CONTACTS, RACES, RACE
    ),
    "mirror_left_out": Mutant("mirror", "+ back[c * kStride + lane]", "", CONTACTS),
    "mirror_barrier": Mutant(
        "mirror",
        BARRIER.replace("    ", 8 * " ") + "        for (int r = warp; r < kWarp && head",
        "        for (int r = warp; r < kWarp && head",
        CONTACTS,
        RACES,
        RACE,
    ),
    "no_rescaling": Mutant(
        "attention", "sums[c].scale(shared.scratch + kFactors, kScratch);", "(void)sums;", ATTENTION
    ),
    "no_delta": Mutant("attention", "dp.at[j] - own_delta", "dp.at[j]", ATTENTION),
    "not_transposed": Mutant("attention", "sums.add_transposed(own", "sums.add(own", ATTENTION),
    "lanes_have_rows": Mutant(
        "attention",
        "sums_.x[e] *= by.x[e]",
        "sums_.x[e] *= factors[int(threadIdx.x) % kWarp / 2 * stride]",
        ATTENTION,
    ),
}


def with_fault(mutant: Mutant) -> str:
    """The source with the fault in it; of its headers those, too, that lead to where the fault belongs."""
    text = (SOURCES / f"{mutant.source}.cu").read_text()
    while mutant.right not in text:
        text, headers = re.subn(r'#include "(\w+\.cuh)"', lambda found: (SOURCES / found[1]).read_text(), text)
        assert headers, mutant
    return text.replace(mutant.right, mutant.wrong)


def found(mutant: Mutant, library, recording, folder) -> bool:
    (folder / f"{mutant.source}.cu").write_text(with_fault(mutant))
    units = [
        unit._replace(source=folder / unit.source.name) if unit.source.stem == mutant.source else unit
        for unit in recording.units
    ]
    if mutant.build != QUICK:
        done = emulator.replay(emulator.program(sorted(units), mutant.build), recording.path)
        return done.returncode != 0 and mutant.message in done.stderr
    try:
        with executed_by(emulator.Emulator(emulator.loadable(sorted(units)))):
            return not EXERCISES[mutant.exercise].run(DTYPE)
    except EmulatorError:
        return True


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name, cuda_library, recorded, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        assert found(MUTANTS[name], cuda_library, recorded(MUTANTS[name].exercise), tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
