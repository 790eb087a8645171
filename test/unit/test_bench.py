"""The programs in bench/ run as their READMEs say."""

import re
import sys

from conftest import ROOT, shell


def test_the_evaluation_is_measured_and_told_in_a_table():
    finished = shell(sys.executable, ROOT / "bench" / "evaluation.py", "--rows", "20000")
    assert finished.returncode == 0, finished.stderr
    found = dict(re.split(r"  +", line, maxsplit=1) for line in finished.stdout.splitlines())
    assert found["rows"] == "20,000"
    assert 0.6 < float(found["AUC"]) < 0.95
    assert found["peak memory"].endswith(" GB") and found["metric work"].endswith(" s")
