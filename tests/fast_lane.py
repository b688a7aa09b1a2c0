"""The fast lane: the tests that `scripts/test.sh --fast` runs, at least one for each room.

`python tests/fast_lane.py` prints pytest's arguments, one a line. `test_fast_lane.py` checks that
each room of src/mquant has a test here, and that the tests of a room import the room.
"""

ROOMS = {
    "checkpoint": [
        "checkpoint/test_headers.py",
        "checkpoint/test_checkpoint.py",
        "checkpoint/test_checkpoint_faults.py",
    ],
    "cli": ["cli/test_text.py", "cli/test_output.py", "cli/test_inspect.py"],
    "engines": ["engines/test_stream_search.py::test_the_number_of_workers_changes_no_byte"],
    "family_draft": ["families/test_draft.py"],
    "forward": ["forward/test_shape.py", "measure/test_eval.py::test_a_model_agrees_with_itself"],
    "loader_model": ["verify/test_layouts.py"],
    "measure": ["measure/test_compare.py::test_every_layout_is_decoded_as_the_judge_decodes_it"],
    "numerics": ["numerics/test_formats.py", "numerics/test_thresholds.py"],
    "output": ["output/test_shards.py", "output/test_ledger.py"],
    "plan": ["plan/test_refusals.py", "plan/test_refusals_of_sources.py", "plan/test_share.py"],
    "publish": ["cli/test_report.py"],
    "repair": ["repair/test_repair.py::test_a_changed_norm_is_taken_from_the_parent"],
    "runs": ["runs/test_quantize.py"],
    "smoke": ["cli/test_smoke.py"],
    "tokens": ["tokens/test_overlap.py", "tokens/test_samples.py"],
    "verify": ["verify/test_ignore.py"],
    "weights": ["weights/test_decode.py"],
}
ELSEWHERE = [
    "cli/test_recipes_families.py",
    "test_family.py",
    "test_fast_lane.py",
    "test_layers.py",
    "test_name_patterns.py",
    "test_recipe.py",
    "test_recipe_llmcompressor.py",
    "test_recipe_names.py",
]

if __name__ == "__main__":
    for test in [test for tests in ROOMS.values() for test in tests] + ELSEWHERE:
        print(f"tests/{test}")  # noqa: T201 -- a shell reads the output
