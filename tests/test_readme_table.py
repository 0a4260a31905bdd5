"""The README's figures are those of the results that it points to."""

from __future__ import annotations

import re
import sys

from sources import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import readme


def test_the_table_is_that_of_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    losses = re.search(r"\((bench/results/[\w-]+)-losses\.md\)", text)
    assert losses
    path = ROOT / f"{losses[1]}.json"
    assert readme.rewritten(text, path) == text
    assert readme.rewritten(text.replace(" ms |", "9 ms |"), path) == text
