"""Which test runs when. A test that no row names is fast: it belongs to `make test`.

* `fast`: `make test`, 4 minutes on two cores. No child processes, no sweeps in simulators; of every
  kernel and backend one case.
* `ci`: `.ci/run` after `make test`. Child processes, what the simulators must prove, runs that train.
* `slow`: only `make test-all`, which runs all three.
* `generated`: the generated cases of the kernels' proofs. `make test-generated`, about an hour.

A test that is named, `pytest tests/test_cli.py::test_tab_completion`, runs whatever its tier.

A row stands for every test whose id begins with it, `*` for anything; of several rows the longest counts, and a marker
beside the test itself before any row. A row that stands for no test any more fails `tests/test_tiers.py`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

MARKERS = ("ci", "slow", "generated")
UNUSED_ROWS = pytest.StashKey[list[str]]()
"""Where `tests/conftest.py` leaves the rows that stand for no test, once the whole suite is collected."""

ENGINE = "tests/engine"
CONTRACT = "tests/mixers/test_contract.py::test_memory_equals_parallel_form"
SERVED = "tests/capacity/test_simulator.py::test_everything_is_served_and_the_ledger_is_whole"
KERNELS = "tests/pallas_kernels"
DECODE = f"{KERNELS}/test_gpu_decode.py"
TILED = f"{KERNELS}/test_paged_attention_gpu.py"
ON_TPU = f"{KERNELS}/test_paged_attention_tpu.py"
ON_HOST = f"{KERNELS}/test_paged_attention.py"
PREFILL = f"{KERNELS}/test_chunks.py"
WRITE = f"{KERNELS}/test_kv_write.py"

CHILDREN = {
    "tests/test_walls.py": "ci",
    "tests/test_wheel.py": "ci",
    "tests/test_on_gpu.py::test_a_window_leaves_lines_and_goes_on_where_it_stopped": "ci",
    "tests/test_wrong_config.py::test_the_command_line_answers_in_one_line": "ci",
    "tests/ledger/test_ledger.py::test_the_ledger_imports_no_jax": "ci",
    "tests/test_cli.py::test_hydra_options_still_work": "ci",
    "tests/test_cli.py::test_tab_completion": "ci",
    "tests/test_cli.py::test_readmes_words_on_a_tiny_run_are_answered_with_what_fits": "ci",
    "tests/test_cli.py::test_help_imports_nothing_heavy": "ci",
    "tests/test_cli.py::test_sweeps_through_every_local_launcher": "ci",
    "tests/test_cli.py::test_sweeps_through_every_local_launcher[submitit": "slow",
    "tests/test_cli.py::test_a_corpus_that_is_too_short_is_answered_before_anything_is_written": "ci",
    "tests/test_cli.py::test_a_sweep_goes_on_after_a_failure_and_says_so": "ci",
    "tests/test_cli.py::test_sigterm_to_a_sweep_stops_its_workers_and_saves": "ci",
    "tests/test_cli.py::test_runs_need_none_of_what_only_pages_and_development_need": "ci",
    "tests/lab/test_execute.py::test_kill_9_and_resume_is_bit_for_bit[1]": "ci",
    "tests/lab/test_execute.py::test_kill_9_and_resume_is_bit_for_bit[5]": "slow",
    "tests/lab/test_execute.py::test_a_polite_stop_saves_and_resumes": "ci",
    "tests/lab/test_generation.py::test_the_command_works_as_installed": "ci",
    "tests/lab/test_report.py::test_the_page_in_chromium": "ci",
    "tests/weights/test_weights.py::test_loading_holds_little_more_than_the_model": "ci",
    "tests/weights/test_gguf_llama.py::test_converting_holds_a_tensor_at_a_time": "ci",
    "tests/tasks/test_library.py::test_pips_own_reason_is_told": "ci",
    f"{KERNELS}/test_alone.py": "ci",
    f"{KERNELS}/test_bench_run.py": "ci",
    f"{KERNELS}/test_bench_run.py::test_wrong_options_name_the_limit": "fast",
    f"{KERNELS}/test_bench_run.py::test_pieces_share_a_cache_and_the_device": "fast",
    f"{KERNELS}/test_runner.py": "ci",
    f"{KERNELS}/test_runner.py::test_signals_are_given_back_and_ignored_ones_stay_so": "fast",
    f"{KERNELS}/test_runner.py::test_what_knows_less_does_not_count": "fast",
    f"{KERNELS}/test_runner.py::test_a_record_has_no_nan": "fast",
    f"{KERNELS}/test_runner.py::test_the_digest_is_of_the_code": "fast",
}
"""Tests that start processes."""

SIMULATORS = {
    "tests/memory/test_attention_plan.py::test_the_gpu_kernel_answers_by_it": "ci",
    f"{DECODE}::test_equals_float64": "ci",
    f"{DECODE}::test_equals_float64_without_a_race[its": "slow",
    f"{DECODE}::test_equals_float64_without_a_race[fp8": "slow",
    f"{DECODE}::test_equals_float64_without_a_race[head dims of 96, lists of each head, valid slots": "slow",
    f"{DECODE}::test_equals_float64_without_a_race[values of 112 dims": "slow",
    f"{DECODE}::test_equals_float64_without_a_race[int4 by token, head dims of 160": "slow",
    f"{DECODE}::test_equals_float64_without_a_race[int8 by channel, values of 96 dims": "slow",
    f"{DECODE}::test_what_fits_is_what_the_scratch_takes": "ci",
    f"{DECODE}::test_equals_float64_without_a_race[int8 by token, window, soft cap]": "fast",
    f"{DECODE}::test_live_pages_are_fetched_once": "slow",
    f"{DECODE}::test_live_pages_are_fetched_once[ragged]": "ci",
    f"{DECODE}::test_live_pages_are_fetched_once[int4 by channel]": "ci",
    f"{DECODE}::test_a_wrong_page_is_caught": "ci",
    f"{DECODE}::test_a_missing_barrier_is_caught": "ci",
    f"{DECODE}::test_a_call_with_a_plan_equals_one_without": "ci",
    f"{DECODE}::test_pieces_merge_to_float64s_answer": "ci",
    f"{TILED}::": "ci",
    f"{TILED}::test_equals_float64_without_a_race[": "slow",
    f"{TILED}::test_equals_float64_without_a_race[KIVI": "ci",
    f"{TILED}::test_equals_float64_without_a_race[lengths": "ci",
    f"{TILED}::test_equals_float64_without_a_race[its": "ci",
    f"{TILED}::test_equals_float64_without_a_race[int8 by token, window, soft cap]": "fast",
    f"{TILED}::test_live_pages_are_fetched_once": "slow",
    f"{TILED}::test_live_pages_are_fetched_once[a window of 128 with sinks]": "ci",
    f"{TILED}::test_live_pages_are_fetched_once[int8]": "ci",
    f"{ON_TPU}::": "ci",
    f"{ON_TPU}::test_equals_float64_without_a_race[one head each-": "fast",
    f"{ON_TPU}::test_equals_float64_without_a_race[head dims of": "slow",
    f"{ON_TPU}::test_equals_float64_without_a_race[values of 112 dims": "slow",
    f"{ON_TPU}::test_equals_float64_without_a_race[*by token, head dims of": "slow",
    f"{ON_TPU}::test_equals_float64_without_a_race[*values of 96 dims": "slow",
    f"{PREFILL}::TestGPU": "ci",
    f"{PREFILL}::TestGPU::test_equals_float64[each": "slow",
    f"{PREFILL}::TestGPU::test_equals_float64[two": "slow",
    f"{PREFILL}::TestGPU::test_every_tile_fetches_its_live_pages_once[a": "slow",
    f"{PREFILL}::TestGPU::test_equals_float64[int8]": "fast",
    f"{PREFILL}::TestGPU::test_two_warpgroups_attend_where_rows_abound": "fast",
    f"{PREFILL}::TestTPU": "ci",
    f"{PREFILL}::TestTPU::test_equals_float64[window, sinks, soft cap]": "fast",
    f"{WRITE}::TestGPU": "ci",
    f"{WRITE}::test_tokens_are_written_in_every_scheme_by_token[int4": "ci",
    f"{WRITE}::test_tokens_are_written_in_every_scheme_by_token[int2": "ci",
    f"{WRITE}::test_tokens_are_written_in_every_scheme_by_token[int8 by token, scales of bfloat16]": "ci",
    f"{KERNELS}/test_sealed_pages.py::test_pages_are_written_where_they_belong_and_nothing_else_is": "ci",
    f"{KERNELS}/test_sealed_pages.py::test_every_page_has_ranges_of_its_own": "ci",
    f"{KERNELS}/test_sealed_pages.py::test_every_page_has_ranges_of_its_own[int4": "fast",
    f"{WRITE}::TestGPU::test_equals_numpy[int8 by token]": "fast",
    f"{WRITE}::TestTPU": "ci",
    f"{WRITE}::TestTPU::test_copies_that_arrive_at_the_wait": "slow",
    f"{WRITE}::TestTPU::test_copies_that_arrive_at_the_wait[one token each, some dropped]": "ci",
    f"{WRITE}::TestTPU::test_copies_that_arrive_at_the_wait[int4 by token]": "ci",
    f"{WRITE}::TestTPU::test_equals_numpy[int8 by token]": "fast",
    f"{WRITE}::TestTPU::test_tokens_come_once_and_of_pages_what_stays": "slow",
    f"{WRITE}::TestTPU::test_tokens_come_once_and_of_pages_what_stays[40-2-None-": "ci",
    f"{WRITE}::TestTPU::test_tokens_come_once_and_of_pages_what_stays[0-0-int4-": "ci",
}
"""Kernels in the simulators of GPUs and TPUs. In `ci` are the cases of each proof, what a missing wait or a wrong page
does, and the counts of bytes for two formats. The kernel in tiles reads formats as the decoding kernel does, whose
cases are in `ci`."""

REFERENCES = {
    f"{ON_HOST}::test_equals_float64[reference-": "ci",
    f"{ON_HOST}::test_equals_float64[reference-int8 by token, window, soft cap]": "fast",
    f"{ON_HOST}::test_equals_float64[blocked-fp8": "ci",
    f"{ON_HOST}::test_equals_float64[blocked-int4": "ci",
    f"{ON_HOST}::test_equals_float64[blocked-int8": "ci",
    f"{ON_HOST}::test_equals_float64[blocked-KIVI": "ci",
    f"{ON_HOST}::test_equals_float64[blocked-KIVI of 4 bits, valid slots, soft cap]": "fast",
    f"{KERNELS}/test_zero_points.py::test_a_value_is_off_by_half_a_scale": "ci",
    f"{KERNELS}/test_zero_points.py::test_a_value_is_off_by_half_a_scale_and_scales_are_tight[int4-channel-bf": "fast",
    f"{KERNELS}/test_zero_points.py::test_slots_that_do_not_count": "ci",
    f"{KERNELS}/test_zero_points.py::test_bytes_of_kivi": "ci",
    f"{KERNELS}/test_zero_points.py::test_outliers_of_channels_cost_nothing_by_channel[1]": "ci",
    f"{ON_HOST}::test_equals_float64[blocked-int8 by token, window, soft cap]": "fast",
    f"{ON_HOST}::test_equals_float64[blocked-int4 by token, lists of each head]": "fast",
    f"{ON_HOST}::test_equals_float64_over_the_option_space": "ci",
    f"{PREFILL}::TestReference": "ci",
    f"{KERNELS}/test_verify.py": "ci",
}
"""The oracles themselves, and the cases that chips run, on this machine."""

SWEEPS = {
    f"{CONTRACT}[": "ci",
    f"{CONTRACT}[*-paged-page8-": "slow",
    f"{CONTRACT}[*-paged-page4-chunk5]": "fast",
    f"{CONTRACT}[deltanet-": "slow",
    f"{CONTRACT}[deltanet-paged-page4-chunk5]": "ci",
    f"{CONTRACT}[kda-": "slow",
    f"{CONTRACT}[retnet-": "slow",
    f"{CONTRACT}[retnet-paged-page4-chunk5]": "ci",
    f"{CONTRACT}[output_gate-": "slow",
    f"{CONTRACT}[output_gate-paged-page4-chunk5]": "ci",
    f"{CONTRACT}[sink_logits-": "slow",
    f"{CONTRACT}[sink_logits-paged-page4-chunk5]": "fast",
    f"{CONTRACT}[sink_logits-dense-page16-chunk5]": "ci",
    f"{CONTRACT}[no_positions-": "slow",
    f"{CONTRACT}[no_positions-paged-page4-chunk5]": "ci",
    f"{CONTRACT}[window_one-": "slow",
    f"{CONTRACT}[window_one-paged-page4-chunk5]": "ci",
    f"{CONTRACT}[mamba2_groups-": "slow",
    f"{CONTRACT}[mamba2_groups-paged-page4-chunk5]": "ci",
    f"{CONTRACT}[yoco-": "slow",
    f"{CONTRACT}[yoco-paged-page4-chunk5]": "ci",
    f"{CONTRACT}[shared_windows-": "slow",
    f"{CONTRACT}[shared_windows-paged-page4-chunk5]": "ci",
    f"{CONTRACT}[gqa-*-chunk1]": "fast",
    f"{CONTRACT}[gqa-dense-": "fast",
    f"{CONTRACT}[hybrid-dense-": "fast",
    f"{ENGINE}/test_golden.py::test_every_way_gives_the_reference_tokens": "ci",
    f"{ENGINE}/test_golden.py::test_every_way_gives_the_reference_tokens[llama_gqa-4-1-": "fast",
    f"{ENGINE}/test_golden.py::test_every_way_gives_the_reference_tokens[mamba2-4-1-": "fast",
    f"{ENGINE}/test_golden.py::test_every_way_gives_the_reference_tokens[mamba2-16-32-": "fast",
    f"{ENGINE}/test_golden.py::test_every_way_gives_the_reference_tokens[mistral-1-1-": "fast",
    f"{ENGINE}/test_golden.py::test_every_way_gives_the_reference_tokens[qwen3-16-1-": "fast",
    f"{ENGINE}/test_engine.py::test_samples_of_one_prompt_are_what_separate_requests_would_say[way": "ci",
    f"{ENGINE}/test_engine.py::test_samples_of_one_prompt_are_what_separate_requests_would_say[way0-": "fast",
    f"{ENGINE}/test_engine.py::test_variants_without_a_reference_equal_their_parallel_form": "ci",
    f"{ENGINE}/test_engine.py::test_variants_without_a_reference_equal_their_parallel_form[mamba2_groups]": "fast",
    "tests/ledger/test_machine.py::TestLedgerMachine": "ci",
    f"{SERVED}[": "ci",
    f"{SERVED}[17-True-swap]": "fast",
}
"""Of what is tried in many ways, some ways are fast."""

MANY_PROGRAMS = {
    f"{ENGINE}/test_engine.py::test_the_way_it_runs_changes_no_token": "ci",
    f"{ENGINE}/test_engine.py::test_a_draft_model_changes_no_token_and_a_perfect_one_is_always_right": "ci",
    f"{ENGINE}/test_shared_kv.py": "ci",
    f"{ENGINE}/test_shared_kv.py::test_the_way_it_runs_changes_no_token[plain]": "fast",
    "tests/models/test_sharing.py::test_layer_by_layer_is_the_same": "ci",
    "tests/memory/test_bytes.py::test_layers_that_share_are_as_many_bytes_less": "ci",
    "tests/memory/test_bytes.py::test_layers_that_share_are_as_many_bytes_less[2-paged]": "fast",
    f"{ENGINE}/test_steps.py::test_steps_are_padded_to_the_sizes_that_are_named": "ci",
    f"{ENGINE}/test_steps.py::test_programs_are_few_and_bounded": "ci",
    f"{ENGINE}/test_beams.py::test_beams_that_pause_make_room_for_each_other": "ci",
    f"{ENGINE}/test_engine.py::test_a_drafted_sequence_may_miss_a_step": "ci",
    f"{ENGINE}/test_soak.py": "ci",
    f"{ENGINE}/test_tagged_memory.py::test_a_hit_and_a_fork_compute_what_the_whole_prompt_would": "ci",
    f"{ENGINE}/test_tagged_memory.py::test_a_hit_and_a_fork_compute_what_the_whole_prompt_would[gqa]": "fast",
    "tests/test_docs.py::test_the_recipe_for_a_task_meets_the_contract": "ci",
    "tests/test_docs.py::test_the_engines_page_runs": "ci",
    "tests/lab/test_execute.py::test_a_failed_run_is_a_row_with_a_reason_and_is_retried": "ci",
    "tests/lab/test_execute.py::test_disagreement_between_memory_and_parallel_form_fails_the_run": "ci",
    "tests/lab/test_execute.py::test_a_second_process_is_refused": "ci",
    "tests/training/test_step.py::test_gradients_agree_with_finite_differences": "ci",
    "tests/training/test_step.py::test_several_steps_per_call_equal_single_steps": "ci",
    f"{ENGINE}/test_engine.py::test_the_place_of_pages_changes_no_token": "ci",
    f"{KERNELS}/test_tiles.py::test_kernels_are_called_with_what_is_remembered": "ci",
    f"{WRITE}::test_whole_pages_by_channel_hold_what_quantising_them_gives": "ci",
    "tests/lab/test_execute.py::test_a_nan_is_a_failure_with_step_and_leaf": "ci",
    "tests/lab/test_execute.py::test_out_of_memory_names_the_culprit": "ci",
    "tests/lab/test_trained.py::test_a_failed_training_is_recorded": "ci",
    "tests/lab/test_trained.py::test_a_folder_moved_as_a_whole": "ci",
    "tests/lab/test_trained.py::test_damaged_parameters_are_trained_again": "ci",
    "tests/lab/test_trained.py::test_runs_that_differ_in_evaluation_only_train_once": "ci",
    "tests/lab/test_experiments.py::test_reproduce_checks_and_draws": "ci",
    "tests/lab/test_experiments.py::test_reproduce_checks_and_draws[paged_waste]": "slow",
    "tests/test_schema.py::test_every_field_refuses_wrong_types": "ci",
    "tests/tasks/test_task_contract.py::test_contract[passkey-": "ci",
    "tests/memory/test_slots.py::test_a_compacted_sequence_goes_on_behind_its_slots": "ci",
    "tests/memory/test_rotation.py::test_by_channel_the_error_does_not_depend_on_outliers": "ci",
    "tests/memory/test_budgets.py::test_a_mixers_knob_is_solved_as_brute_force_would": "ci",
    "tests/memory/test_budgets.py::test_a_mixers_knob_is_solved_as_brute_force_would[words0": "fast",
    f"{ENGINE}/test_compression.py::test_a_second_pass_reads_on_behind_each_prompt": "ci",
    f"{ENGINE}/test_compression.py::test_the_way_it_runs_changes_no_token": "ci",
    f"{ENGINE}/test_sealing.py::test_the_way_it_runs_changes_no_token": "ci",
    f"{ENGINE}/test_compression.py::test_samples_share_the_prompt_and_are_compacted_apart": "ci",
    f"{ENGINE}/test_sealing.py::test_samples_share_the_prompt_and_seal_apart": "ci",
    f"{ENGINE}/test_beams.py::test_beams_may_all_stop_at_once_and_be_cancelled": "ci",
    f"{ENGINE}/test_beams.py::test_beams_are_forked_and_nothing_of_them_is_computed_twice[way2]": "ci",
    "tests/ledger/test_machine.py::test_the_operations_reach_every_corner": "ci",
    "tests/memory/test_rotation.py::test_by_token_it_grows_with_them": "ci",
    "tests/memory/test_sealed.py::test_a_replay_needs_plans_and_seals_and_nothing_else_of_the_host": "ci",
    "tests/mixers/test_contract.py::test_quantised_memory_equals_the_parallel_form*[hybrid-": "ci",
    "tests/evaluation/test_verification.py::test_a_lossy_memory_agrees_with_the_form_rounded_to_it*[int4]": "ci",
    "tests/evaluation/test_key_lengths.py::test_every_head_of_a_model_against_float64": "ci",
    "tests/capacity/test_estimate.py::test_every_figure_of_the_byte_tables": "ci",
    "tests/capacity/test_compressed.py::test_a_selection_reads_less_and_holds_its_index_beside[int8]": "ci",
    "tests/lab/test_generation.py::test_the_last_line_counts_what_a_user_counts_and_times_no_compiling": "ci",
    "tests/lab/test_compare.py::test_every_choice_of_a_group_finds_its_runs_and_no_others[compression]": "ci",
    "tests/tasks/test_passkey.py::test_a_row_under_a_tokenizer_says_the_same": "ci",
    "tests/tasks/test_passkey.py::test_training_has_both_questions_in_a_row": "ci",
    "tests/tasks/test_mqar.py::test_a_second_turn_is_the_later_half_of_the_places[False]": "ci",
    "tests/test_compose.py::test_a_sweep_starts_distinct_trainings_first[words2": "ci",
    "tests/test_cli.py::test_plan_says_which_runs_share_a_training_and_which_repeat_another": "ci",
    "tests/test_methods.py::test_a_methods_field_beside_a_sweep*[compression=none,random,": "ci",
    f"{KERNELS}/test_linear_scan.py::test_a_strong_decay_neither_overflows_nor_spoils_gradients": "ci",
    f"{KERNELS}/test_linear_scan.py::test_gradients_are_those_of_the_steps": "ci",
    f"{KERNELS}/test_ssd.py::test_gradients_are_finite_under_strong_decay": "ci",
    f"{KERNELS}/test_sealed_pages.py::test_a_latent_pool_has_keys_alone": "ci",
    f"{KERNELS}/test_bench.py::test_what_is_known_is_told_before_every_step": "ci",
    f"{KERNELS}/test_bench.py::test_pieces_print_what_they_know": "ci",
    f"{ENGINE}/test_compression.py::test_more_sequences_fit_where_they_are_compacted": "ci",
    f"{ENGINE}/test_golden.py::test_beams_are_those_of_the_reference": "ci",
    "tests/compression/test_dealing.py::test_what_was_dealt_is_attended_to_where_it_lies": "ci",
    "tests/lab/test_experiments.py::test_notebooks_run": "ci",
    "tests/lab/test_memory_experiments.py": "ci",
    "tests/lab/test_memory_experiments.py::test_every_sweep_of_an_experiment_is_run": "fast",
    "tests/lab/test_memory_experiments.py::test_the_claims_on_axes_can_fail": "fast",
    "tests/lab/test_compare.py::test_a_resample_is_the_metric_of_the_drawn_sums": "ci",
    "tests/lab/test_compare.py::test_seeds_are_drawn_before_their_examples": "ci",
    "tests/lab/test_examples.py::test_a_run_keeps_its_examples_and_its_record_sums_them": "ci",
    "tests/weights/test_gguf_llama.py::test_a_float32_gguf_says_what_transformers_said": "ci",
    "tests/weights/test_gguf_llama.py::test_logits_are_those_of_the_dequantised_weights": "ci",
    "tests/weights/test_gguf_llama.py::test_logits_are_those_of_the_dequantised_weights[llama_gqa]": "fast",
    "tests/lab/test_generation.py::test_a_prompt_of_which_less_is_to_stay_than_is_protected_is_refused": "ci",
    "tests/lab/test_generation.py::test_a_draft_model_is_a_folder": "ci",
    "tests/lab/test_generation.py::test_a_run_answers_text": "ci",
    "tests/lab/test_generation.py::test_perplexity_of_published_weights_is_that_of_the_definition": "ci",
    "tests/lab/test_generation.py::test_the_needle_grid_becomes_a_heat_map": "ci",
    "tests/capacity/test_estimate.py::test_a_simulation_reports_waste_hits_and_typed_pools": "slow",
    "tests/training/test_step.py::test_accumulation_changes_nothing_but_memory": "ci",
    "tests/lab/test_scale.py::test_the_command_on_a_few_steps": "ci",
    "tests/lab/test_scale.py::test_pass_keys": "ci",
    "tests/lab/test_scale.py::test_the_notebook_runs": "ci",
    "tests/lab/test_smollm2.py": "ci",
    "tests/lab/test_smollm2.py::test_axes_and_sealed_pages": "slow",
    "tests/lab/test_smollm2.py::test_tokens_are_those_of_the_text_from_a_character_on": "fast",
    "tests/lab/test_smollm2.py::test_what_is_not_here_is_a_sentence_and_a_status": "fast",
    "tests/evaluation/test_layerwise.py": "ci",
    "tests/evaluation/test_layerwise.py::test_layers_apart_score_as_the_whole_program[kivi4]": "slow",
    "tests/lab/test_execute.py::test_a_run_leaves_a_complete_record": "ci",
    "tests/lab/test_execute.py::test_the_dense_baseline_and_text_run_too": "slow",
    "tests/lab/test_execute.py::test_a_tuned_run_cut_in_its_second_trial_resumes": "ci",
    "tests/lab/test_plan.py::test_a_plan_says_what_a_measurement_finds": "ci",
    "tests/lab/test_plan.py::test_a_plan_says_what_a_measurement_finds[snapkv]": "fast",
}
"""What compiles for five seconds or more, and is no family's, kernel's or run's only test."""

DOWNLOADS = {"tests/weights/test_published.py::test_the_real_": "slow"}
"""A published model of 100 MB, fetched once into the user's cache; skipped where it is not to be had."""

LOSSY = {
    "tests/compression/test_heads.py": "ci",
    "tests/compression/test_shared.py": "ci",
    "tests/compression/test_shared.py::test_attention_is_summed_over_all_layers_that_read[yoco]": "fast",
    "tests/compression/test_shared.py::test_the_last_queries_are_those_of_the_last_layer_that_reads[snapkv]": "fast",
    "tests/compression/test_shared.py::test_every_method_that_keeps_queries_says_whose": "fast",
    "tests/compression/test_heads.py::test_a_run_is_verified_and_recorded[": "slow",
    "tests/compression/test_heads.py::test_a_run_is_verified_and_recorded[overrides4]": "ci",
    "tests/compression/test_dealing.py::test_a_run_equals_the_parallel_form_under_each_heads_own_mask": "ci",
    "tests/compression/test_second_pass.py::test_kvzip_in_pieces_keeps_the_best_of_all_pieces": "ci",
    "tests/compression/test_second_pass.py::test_kvzip_keeps_what_repeating_the_prompt_attends_to": "ci",
    "tests/compression/test_second_pass.py::test_kvzip_keeps_what_repeating_the_prompt_attends_to[gqa]": "fast",
    "tests/compression/test_second_pass.py::test_the_oracle_keeps_what_really_follows_attends_to": "ci",
    "tests/compression/test_streaming.py::test_between_steps_exactly_the_budget_is_held": "ci",
    "tests/compression/test_streaming.py::test_duo_is_the_parallel_form_under_a_mask_for_each_head": "ci",
    "tests/compression/test_streaming.py::test_duo_is_the_parallel_form_under_a_mask_for_each_head[gqa": "fast",
}
"""Whole runs through compressed memories: each method has a fast one."""

METHODS = "tests/compression/test_contract.py"
BUDGET = f"{METHODS}::test_as_many_slots_stay_as_were_told_and_the_protected_ones_among_them"
PERMUTED = f"{METHODS}::test_permuting_slots_permutes_scores"
MIXERS = f"{METHODS}::test_every_mixer_gets_every_method"
WAYS = f"{METHODS}::test_every_way_of_storing_and_every_time"
CUTS = f"{METHODS}::test_the_same_tokens_stay_however_the_prompt_is_cut_and_where_pages_end"

COMPRESSIONS = {
    f"{METHODS}::test_logits_are_those_of_the_mask_while_prefilling_and_decoding": "ci",
    f"{BUDGET}[": "ci",
    f"{BUDGET}[h2o]": "fast",
    f"{BUDGET}[keydiff]": "fast",
    f"{PERMUTED}[": "ci",
    f"{PERMUTED}[h2o]": "fast",
    f"{PERMUTED}[keydiff]": "fast",
    f"{MIXERS}[": "slow",
    f"{MIXERS}[hybrid-h2o]": "ci",
    f"{MIXERS}[latent-expected]": "ci",
    f"{MIXERS}[mqa-rkv]": "ci",
    f"{METHODS}::test_every_mixer_in_every_format_under_a_compression": "slow",
    f"{METHODS}::test_every_mixer_in_every_format_under_a_compression[partial_rope-rotated4]": "ci",
    f"{METHODS}::test_every_mixer_in_every_format_under_a_compression[hybrid-kivi2]": "ci",
    f"{WAYS}[": "slow",
    f"{CUTS}[": "slow",
    "tests/compression/test_compacting.py::test_a_planted_error_is_seen[*-equivalence": "ci",
    "tests/compression/test_kvpress.py": "ci",
    "tests/compression/test_scores.py::test_a_score_is_the_papers[cap without rotary-": "ci",
    "tests/test_docs.py::test_the_recipe_for_a_compression_meets_the_contract": "ci",
}
"""Each method through a model compiles its own programs. Scores against float64, and two methods through all of it, are
fast."""

SELECTED = "tests/memory/test_selected.py"
SELECTION = {
    f"{SELECTED}::test_every_way_of_chunks_computes_what_brute_force_says": "slow",
    f"{SELECTED}::test_every_way_of_chunks_computes_what_brute_force_says[latent-": "ci",
    f"{SELECTED}::test_it_composes_with_compressions_and_formats": "ci",
    f"{SELECTED}::test_each_layer_that_reads_the_same_pages_chooses_for_itself": "ci",
    f"{SELECTED}::test_every_way_of_chunks_computes_what_brute_force_says[shared-": "ci",
    f"{SELECTED}::test_a_compaction_that_forgets_the_index_is_caught": "ci",
    f"{SELECTED}::test_a_wrong_mask_is_caught": "ci",
    f"{SELECTED}::test_the_index_travels_with_its_pages": "ci",
    f"{SELECTED}::test_bytes_held_grow": "ci",
    "tests/evaluation/test_page_recall.py::test_shares": "ci",
    f"{ENGINE}/test_selection.py": "ci",
}
"""Of a memory that selects, a chunk, a draft and the bytes are fast."""

TIER_OF: dict[str, str] = {
    **CHILDREN,
    **SIMULATORS,
    **REFERENCES,
    **SWEEPS,
    **COMPRESSIONS,
    **MANY_PROGRAMS,
    **DOWNLOADS,
    **LOSSY,
    **SELECTION,
}


def mark(items: Iterable[Any], tier_of: Mapping[str, str]) -> list[str]:
    """Marks collected tests with their tiers; returns the rows that stand for none of them."""
    unused, rows = set(tier_of), sorted(tier_of, key=len)
    patterns = {row: re.compile(".*".join(map(re.escape, row.split("*")))) for row in rows}
    for item in items:
        matching = [row for row in rows if patterns[row].match(item.nodeid)]
        unused.difference_update(matching)
        tier = tier_of[matching[-1]] if matching else "fast"
        if tier != "fast" and not any(map(item.get_closest_marker, MARKERS)):
            item.add_marker(tier)
    return sorted(unused)
