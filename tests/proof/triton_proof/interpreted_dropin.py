"""The drop-in's own tests, with fair-esm's API, Hugging Face's and `esm_fast.embed`, on the Triton kernels."""

import dataclasses
import functools

import pytest
import test_engine
import test_fair_esm
import test_hf
import torch
from test_engine import model, short_model  # noqa: F401, fixtures of its tests
from triton_proof import sanitizer

from esm_fast.ops import OPS, registry

proteins = test_engine.proteins


@pytest.fixture
def triton_unasked(monkeypatch):
    """The models under test name no backend: here they get the Triton kernels, which must have run."""
    for name in OPS:
        kernels = [dataclasses.replace(kernel, yields=registry.Kernel.yields) if kernel.backend == "triton" else kernel
                   for kernel in registry.kernels(name)]  # fmt: skip
        monkeypatch.setitem(registry._KERNELS, name, kernels)
    monkeypatch.setattr(OPS["transformer_stack"].__class__, "kernel_call", lambda *_, **__: None)  # layer by layer
    with sanitizer.recording() as launches:
        yield
    assert {"attention_forward", "layer_norm_forward", "linear"} <= {launch.kernel for launch in launches}


@pytest.fixture
def few_and_short(monkeypatch):
    """The interpreter takes a second for what a CPU does in milliseconds."""
    monkeypatch.setattr(test_fair_esm, "SEQUENCES", [(label, all_[:27]) for label, all_ in test_fair_esm.SEQUENCES])
    monkeypatch.setattr(test_engine, "proteins", lambda count, seed=0, longest=90: proteins(
        min(count, 3), seed, min(longest, 20)))  # fmt: skip


# Of each file, the tests that run, and of their parameters those that do: (names, values); None where there are none.
RUN = {
    test_fair_esm: {
        "everything_equals_fair_esm": (
            "norm_before, token_dropout, heads, head_dim",
            [(True, True, 3, 20), (False, False, 2, 64)],
        ),
        "packed_equals_padded_equals_alone": None,
        "gradients_equal_fair_esms": None,
        "contact_gradients_equal_fair_esms": None,
        "padding_in_the_middle_and_raw_tokens": None,
        "all_padding_rows_are_zero_not_nan": None,
        "out_of_range_layers_are_ignored_as_fair_esm_does": None,
        "half_precision_stays_near": ("dtype", [torch.bfloat16, torch.float16]),
        "fair_esms_readme_example": None,
        "a_row_of_masks_alone_stays_finite": None,
    },
    test_hf: {
        "ragged_batch_equals_transformers": (
            "norm_before, token_dropout, dtype, tolerance",
            [(True, True, torch.float32, 1e-4)],
        ),
        "random_ids_under_a_random_mask": ("seed, token_dropout", [(0, False)]),
        "without_a_mask_every_token_counts": None,
        "any_type_of_mask": ("kind", [torch.float32]),
        "positions_count_what_is_not_padding": None,
        "embeddings_in_place_of_ids": None,
        "gradients_equal_transformers": ("norm_before, token_dropout", [(False, True)]),
        "gradients_reach_the_contact_regression_and_the_queries": None,
        "half_precision_is_as_near_to_fp32_as_transformers_is": ("dtype", [torch.bfloat16, torch.float16]),
        "encoder_alone_with_and_without_pooler": None,
        "outputs_asked_for_in_the_configuration": None,
        "selected_hidden_states": ("asked, present", [([-1, 0], [0, 2])]),
        "loss_ignores_minus_100": None,
        "one_kept_token_and_none": None,
        "a_changed_module_is_never_passed_over": ("change", [test_hf.add_hook]),
        "hooks_on_the_whole_encoder_run": None,
        "changed_weights_are_seen": ("change", [test_hf.new_parameter]),
    },
    test_engine: {
        "embeddings_are_the_models_in_input_order": (
            "pool, batch_tokens",
            [("mean", 64), ("cls", None), ("per_residue", 1)],
        ),
        "order_and_neighbours_do_not_matter": None,
        "a_second_run_is_bit_equal": None,
        "strings_paths_and_open_files": None,
        "grad_mode_is_the_callers_between_results": None,
        "windows_are_averaged_per_residue": ("length, batch_tokens", [(31, 1000)]),
        "too_long_is_an_error_by_default_and_truncation_is_fair_esms": None,
        "policies_count_what_they_do": None,
        "mask_tokens_are_honoured": None,
        "half_weights_give_float32_embeddings": None,
    },
}
LEFT_OUT = {
    "no kernel runs in them": {
        "the_models_under_test_do_attend", "bad_tokens_are_refused", "the_module_behaves_as_users_expect",
        "contacts_without_a_regression_say_so", "the_batched_dataset_equals_fair_esms",
        "attention_is_far_from_uniform", "wrong_inputs_are_named", "files_without_head_or_regression",
        "nothing_is_executed", "tokenizer_tables", "tokenizer_equals_transformers", "tokenizer_takes_new_tokens",
        "tokenizer_from_names_files_and_folders", "without_transformers_the_error_names_the_extra",
        "the_card_runs_from_the_root_of_the_repository", "bad_records_are_named",
        "wrong_arguments_are_refused_at_once", "a_sequence_in_place_of_a_path_is_explained",
    },
    "transformers' code runs in them": {
        "labels_under_the_mask_count_as_in_transformers", "other_masks",
        "other_positions_run_on_transformers_code", "packed_false_is_transformers",
    },
    "they are about files, fields and memory, with the kernels of the others": {
        "folders", "saved_models_are_transformers_models", "single_files", "options_reach_configuration_and_model",
        "model_card_snippets", "published_names_come_from_the_caches", "shapes_and_fields", "tuples",
        "nothing_is_added_to_the_model", "a_parametrized_matrix_runs_packed",
    },
    "proteins of 1,022 residues, or thousands of batches, take the interpreter minutes": {
        "longest_and_shortest", "the_longest_sequence", "it_streams",
        "dropout_in_training_is_applied_to_packed_rows", "gradient_checkpointing_trains_packed",
    },
    "the kernels have no fp64": {"fp64_shows_no_difference_but_rounding"},
    "it needs the published weights": {"golden_scores_of_the_model_card"},
}  # fmt: skip


def test_every_test_of_the_drop_in_runs_or_has_a_reason_not_to():
    there = {name[5:] for file in RUN for name in vars(file) if name.startswith("test_")}
    chosen = [name for tests in (*RUN.values(), *LEFT_OUT.values()) for name in tests]
    assert sorted(chosen) == sorted(there)


def borrowed(test, parameters, fixtures):
    """The same test under these parameters and with these fixtures."""

    @functools.wraps(test)
    def same(*arguments, **named):
        test(*arguments, **named)

    same.pytestmark = [pytest.mark.usefixtures(*fixtures).mark]
    return pytest.mark.parametrize(*parameters)(same) if parameters else same


for file, tests in RUN.items():
    for name, parameters in tests.items():
        fixtures = ["triton_unasked"] if name == "everything_equals_fair_esm" else ["triton_unasked", "few_and_short"]
        borrow = borrowed(getattr(file, f"test_{name}"), parameters, fixtures)
        globals()[f"{file.__name__}_{name}"] = borrow
