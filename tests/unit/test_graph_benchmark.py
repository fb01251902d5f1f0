"""What ``python -m benchmarks.graphs`` says of a graph: against pairs counted one by one, and on run folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import graphs
from hypothesis import given
from hypothesis import strategies as st

from helpers.generated_runs import write_run


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2).filter(lambda x: len({b for _, b in x}) == 2))
def test_the_area_counts_pairs(pairs: list[tuple[int, bool]]) -> None:
    won = [(a > b) + 0.5 * (a == b) for a, yes in pairs if yes for b, no in pairs if not no]
    weight, related = torch.tensor([w for w, _ in pairs]), torch.tensor([r for _, r in pairs])
    assert graphs.auc(weight, related) == pytest.approx(sum(won) / len(won))


def test_clients_of_one_family_have_no_area() -> None:
    with pytest.raises(ValueError, match="more than one family"):
        graphs.auc(torch.ones(3), torch.ones(3, dtype=torch.bool))


def test_a_run_is_told_and_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Groups are the families here, so the area is 1, and of shuffled families a half."""
    names = [f"client-{n}" for n in range(8)]
    run = write_run(tmp_path / "run", names, [f"family {n // 2}" for n in range(8)], method={"name": "mira"})
    monkeypatch.setattr(graphs, "OUT", tmp_path / "graphs.json")
    monkeypatch.setattr(sys, "argv", ["graphs", str(run)])
    for _ in range(2):
        graphs.main()
    [kept] = json.loads((tmp_path / "graphs.json").read_text())
    assert (kept["auc"], kept["family_edges"], kept["family_pairs"], kept["other_edges"]) == (1.0, 4, 4, 0)
    assert kept["shuffled"] == pytest.approx(0.5, abs=0.06)
    assert "AUC 1.000" in capsys.readouterr().out
