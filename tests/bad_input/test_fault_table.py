"""The table of faults: for every row that this version reaches, the tests that hold it.

Each line names a file below `tests/` and what its tests are called by (as `pytest -k` would).

untraceable models: line, expression, remedies
    bad_input/test_tracing.py: branch_on_data, forward_that_raises, loop_over, remedies
train mode, branches on self.training
    bad_input/test_tracing.py: in_training, differs_between_modes, different_structure, auxiliary, dropout
    test_roundtrips.py: modes_are_followed
hooks: of modules, layers, tensors, state_dict
    bad_input/test_hooks.py: would_lose, lost_too, on_a_layer, of_tensors, of_state_dict
NaN and infinities in weights, statistics, scores
    bad_input/test_weights.py: not_finite, infinities_that_cancel, statistics_that
    bad_input/test_options.py: scores_that_are_not_finite
ratio, budget, align, scope, seed: out of range, NaN, wrong type, both at once
    bad_input/test_options.py: out_of_range, wrong_type, budget_and_ratio, checked_before_the_model
all channels of a layer gone, unbalanced groups
    bad_input/test_limits.py: stay_balanced, at_least_one, align, impossible
    bad_input/test_options.py: cannot_be_reached
nothing prunable
    bad_input/test_limits.py: lists_the_reasons, without_channels, constant
    bad_input/test_options.py: ignoring_everything, free_scope_that_leaves_nothing
frozen and shared parameters
    bad_input/test_kept.py: stay_frozen, shared_weights, shared_vectors, tied_embedding, part_of_their_memory
non-contiguous, channels_last, half, bf16, complex, quantized, sparse, meta, DTensor
    bad_input/test_kept.py: dtypes_are_kept, half_weights, memory_formats, other_strides
    bad_input/test_weights.py: complex, quantized, sparse, meta_weights, meta_model, meta_networks
    bad_input/test_wrapped.py: sharded_tensors
weight_norm, spectral_norm, parametrizations, masks, lazy modules
    bad_input/test_weights.py: old_weight_norm, old_spectral_norm, parametrized_layers, pruning_masks, lazy
buffers: per channel, unreached, counters, non-persistent
    bad_input/test_buffers.py: of_channels, no_rule_reaches, counters, not_persistent
pruned twice, compiled, wrapped, sharded, scripted, exported models
    bad_input/test_wrapped.py: pruned_network, torch_compile, in_place, parallel, fsdp, scripted, exported
    test_inputs.py: wrappers_come_off, every_verb
    test_roundtrips.py: two_cuts, cuts_in_a_row
killed while saving
    test_checkpoint.py: killed_at_any_moment, stale_files, synced_before
    bad_input/test_files.py: killed_save
a full disk, a limit on file sizes
    test_checkpoint.py: full_disk_for_real, full_disk_simulated, full_disk_inside
    bad_input/test_files.py: failed_save, larger_than_the_process
truncated and flipped files
    test_checkpoint.py: changed_byte, every_bit, every_truncation, two_files_spliced
    bad_input/test_files.py: truncated, flipped
    test_fuzz.py: files_with_other_bytes, files_that_end
malicious plans and files: depth, size, duplicates, NaN, surrogates, sizes that lie, code, paths
    test_plan.py: text_that_is_refused, absurd_size, depth, wrong_values, appear_twice
    test_checkpoint.py: malformed_first_part, no_memory_holds, pickles, headers_that_are_refused
    bad_input/test_files.py: petabyte, take_no_memory, nothing_that_a_file_names_is_opened, no_save_writes
    test_fuzz.py: plans_with, plans_of_anything, plans_applied, first_part, right_checksum
reports and scans read from files
    test_fuzz.py: reports_with, scans_with, reports_and_scans
a plan or file for something else
    bad_input/test_plans.py: another_architecture, own_result, incomplete, half_of_a_pair, wrong_roles
    bad_input/test_files.py: another_architecture, do_not_fit, another_kind_of_number, foreign
names with markup, control characters, unicode, `..`, of any length
    bad_input/test_names.py: markup, move_the_cursor, of_a_plan, dots, long_paths
    bad_input/test_errors.py: terminal_would_obey, endless
    bad_input/test_odd_models.py: no_identifiers, cannot_hold, uses_itself
    views/test_page.py: escape
the same call twice, in other processes, with other hash seeds
    test_roundtrips.py: same_call, fresh_process, equal_bytes
    bad_input/test_interrupts.py: another_process
no triton, no GPU
    bad_input/test_interrupts.py: without_triton
    test_layout.py: import_is_lean
Ctrl-C in a compilation, in a save, in training
    bad_input/test_interrupts.py: traced, own_function, any_moment, during_a_save
    training/test_state.py: sigterm
loaders: empty, dying, raising, of dicts, of one sample
    bad_input/test_loaders.py: without_a_batch, another_kind, raises, worker_that_dies, one_sample
    test_recalibrate.py: empty_loader, rest_of_one_sample, failing_loader
errors leave the model, the plan and the files as they were
    bad_input/test_tracing.py: leaves_nothing_behind, changes_a_buffer
    bad_input/test_verify.py: wrong_cut, crash_of_the_result

Rows of what does not exist yet (optimizers that follow a cut, ranks that disagree, out of memory
while clustering) get their line with it.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def rows() -> list[tuple[str, str, str]]:
    """(row, file, word) of every word in the table."""
    found, row = [], ""
    for line in __doc__.split("\n\n")[2].splitlines():
        if not line.startswith(" "):
            row = line
            continue
        file, words = line.strip().split(": ")
        found += [(row, file, word.strip()) for word in words.split(",")]
    return found


@pytest.mark.parametrize("file", sorted({file for _, file, _ in rows()}))
def test_every_row_has_its_tests(file):
    tree = ast.parse((TESTS / file).read_text())
    names = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    tests = [name for name in names if name.startswith("test_")]
    missing = [(row, word) for row, f, word in rows() if f == file and not any(word in t for t in tests)]  # fmt: skip
    assert not missing


def test_every_file_of_this_folder_stands_in_the_table():
    here = {f"bad_input/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert here - {file for _, file, _ in rows()} == {f"bad_input/{Path(__file__).name}"}
