"""The long campaigns, which `pytest -m slow` runs."""

SLOW = {
    "test_benchmarks.py::test_growth_is_measured_drawn_and_judged": 0,
    "test_benchmarks.py::test_memory_is_measured_in_every_mode_and_written_to_a_page_of_its_own": 0,
    "test_benchmarks.py::test_our_side_alone_writes_json_and_page_and_keeps_other_parts": 0,
    "test_benchmarks.py::test_smollm2s_part_measures_our_side_alone": 0,
    "test_benchmarks.py::test_the_grid_runs_through_run_sweep_in_two_processes": 0,
    "test_benchmarks.py::test_threads_profile_and_page_on_the_micro_size": 0,
    "test_benchmarks.py::test_what_start_up_compiles_is_all_that_the_default_sweep_needs": 0,
    "test_cli.py::test_ctrl_c_keeps_finished_rows_and_says_how_to_continue": 0,
    "test_cli.py::test_what_a_weight_loses_and_a_model_saved_in_each_form": 0,
    "test_compiled_math.py::test_a_processor_with_less_gives_the_same_up_to_rounding": 0,
    "test_docs.py::test_code_runs_and_prints_what_it_says[docs/sweep.md]": 0,
    "test_format_peft_fuzz.py::": 3,
    "test_kernels.py::test_avx2_does_what_avx512_does": 0,
    "test_ledger.py::test_so_many_workers_stay_below_the_bound": 10,
    "test_memory_plots.py::test_files_are_whole_and_the_same_again": 0,
    "test_merging.py::test_the_study_writes_rows_and_a_page_with_means_over_seeds": 0,
    "test_notebooks.py::test_notebook_runs_and_prints_the_same_text": 0,
    "test_own_adapters.py::test_vera_learns_the_task": 0,
    "test_plain.py::test_training_agrees_to_rounding": 3,
    "test_planner.py::test_planned_and_measured": 10,
    "test_run.py::test_a_gptq_base_is_the_same_bytes_every_time_and_never_sees_the_test_split": 0,
    "test_run.py::test_quantizers_and_variants_run_are_saved_and_load_again": 4,
    "test_run.py::test_same_configuration_same_row_whatever_the_threads": 0,
    "test_sweep.py::test_ctrl_c_from_the_terminal_ends_the_workers_too": 0,
    "test_text_tokenizer.py::test_hostile_templates_are_stopped_and_named": 4,
    "test_transformer.py::test_gradcheck_of_the_whole_model": 3,
}
"""Start of a test's id → how many of its cases stay in the quick run: every n-th of them, or none for 0. The
others get the mark `slow`."""
