"""Damaged files of every kind are read, or refused in one line that names them: some of fuzz.py."""

import fuzz


def test_no_damaged_file_leads_to_a_traceback_or_a_line_without_its_name():
    outcomes, violations = fuzz.run(500, seed=1)
    assert violations == [] and all(counts["refused"] for counts in outcomes.values())
