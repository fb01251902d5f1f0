"""The bench's probe of disturbances."""

import pytest
import torch
from benchmarks import probe
from benchmarks.probe import Probe, sample

QUIET, BUSY = Probe(100, 200, 1.0, 0), Probe(100, 130, 0.6, 0)


@pytest.mark.parametrize(
    ("found", "said"),
    [(QUIET, ""), (BUSY, "another process runs"), (Probe(100, 105, 0.99, 0), "threads share a core")],
)
def test_disturbance(found: Probe, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert found.disturbance == said


def test_a_disturbed_sample_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = iter([QUIET, BUSY, QUIET, QUIET])
    monkeypatch.setattr(probe, "probe", lambda: next(found))
    runs: list[int] = []
    _, timed = sample(lambda: runs.append(1), torch.device("cpu"))
    assert (len(runs), timed.tries, timed.disturbance) == (2, 2, "")


def test_a_sample_that_stays_disturbed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(probe, "probe", lambda: BUSY)
    assert sample(lambda: None, torch.device("cpu"))[1].disturbance == "another process runs"
