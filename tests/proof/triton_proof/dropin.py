"""A pytest plugin: the drop-in's own tests, of fair-esm's API, Hugging Face's and `embed`, on the Triton kernels.

It is given their files, takes the tests below with fewer parameters and shorter proteins, and leaves out the others.
"""

import dataclasses
import functools

import pytest
import torch


@pytest.fixture
def triton_unasked(monkeypatch):
    """The models under test name no backend: here they get the Triton kernels, which must have run."""
    from triton_proof import sanitizer

    from esm_fast.ops import OPS, registry

    for name in OPS:
        kernels = [dataclasses.replace(kernel, yields=registry.Kernel.yields) if kernel.backend == "triton" else kernel
                   for kernel in registry.kernels(name)]  # fmt: skip
        monkeypatch.setitem(registry._KERNELS, name, kernels)
    monkeypatch.setattr("esm_fast.ops.stack_call", lambda *_, **__: None)  # layer by layer
    with sanitizer.recording() as launches:
        yield
    assert {"attention_forward", "layer_norm_forward", "linear"} <= {launch.kernel for launch in launches}


@pytest.fixture
def few_and_short(request, monkeypatch):
    """The interpreter takes a second for what a CPU does in milliseconds."""
    file, name = request.module, request.module.__name__.rpartition(".")[2]
    if name == "test_fair_esm":
        monkeypatch.setattr(file, "SEQUENCES", [(label, all_[:27]) for label, all_ in file.SEQUENCES])
    if name == "test_engine":
        monkeypatch.setattr(file, "proteins", functools.partial(_few, file.proteins))


def _few(proteins, count, seed=0, longest=90):
    return proteins(min(count, 3), seed, min(longest, 20))


@pytest.fixture(autouse=True)
def on_triton(request):
    if _of(request.module):
        request.getfixturevalue("triton_unasked")
        if request.function.__name__ != "test_everything_equals_fair_esm":
            request.getfixturevalue("few_and_short")


# Of each file, the tests that run, and of their parameters those that do: (names, values); None where there are none.
# A value in quotes that is the name of a function of the file stands for it.
RUN = {
    "test_fair_esm": {
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
    "test_hf": {
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
        "a_changed_module_is_never_passed_over": ("change", ["add_hook"]),
        "hooks_on_the_whole_encoder_run": None,
        "changed_weights_are_seen": ("change", ["new_parameter"]),
    },
    "test_engine": {
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


def _of(module) -> dict:
    """What of a module runs."""
    return RUN.get(module.__name__.rpartition(".")[2], {})


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """In the place of the test's own parameters, those above."""
    name = metafunc.function.__name__.removeprefix("test_")
    if parameters := _of(metafunc.module).get(name):
        names, values = parameters
        values = [getattr(metafunc.module, value) if isinstance(value, str) else value for value in values]
        marks = metafunc.definition.own_markers
        marks[:] = [mark for mark in marks if mark.name != "parametrize"]
        metafunc.parametrize(names, values)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Only what is to run stays; a test that nobody decided about, or that is gone, is an error."""
    borrowed = [item for item in items if _of(item.module)]
    there = {item.originalname.removeprefix("test_") for item in borrowed}
    chosen = [name for tests in (*RUN.values(), *LEFT_OUT.values()) for name in tests]
    if borrowed and sorted(chosen) != sorted(there):
        raise pytest.UsageError(f"run or leave out these tests of the drop-in: {sorted(there ^ set(chosen))}")
    left_out = [item for item in borrowed if item.originalname.removeprefix("test_") not in _of(item.module)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in borrowed:
        item.extra_keyword_matches.add("dropin")
