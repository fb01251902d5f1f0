"""privacy.metrics=noised: losses with noise of the scale that the account has, over machines and in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.in_process_federation import World, metrics
from helpers.sample_config import mira, write_clients, write_config
from mira import Experiment
from mira.core.errors import UserError
from mira.core.example_privacy import ExamplePrivacy
from mira.core.training import Training
from mira.fleet.messages.packet import Packet, pack, unpack
from mira.setup.noised import NoisedEngine, clipped_sum
from mira.setup.privacy import Accountant

pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
PRIVATE = {"unit": "example", "clip": 0.5, "epsilon": 8.0, "metrics": "noised", "metrics_noise": 20.0}
LOSSES = torch.tensor([3.0, 9.0, 5.0, float("nan")], dtype=torch.float64)
TOKENS = torch.tensor([2, 1, 4, 1])


@dataclass
class Fixed:
    """An engine and a corpus with the same four losses for everyone."""

    def encoded(self, client: int, split: str, limit: int | None = None) -> list[str]:
        return ["a", "b", "c", "d"]

    def score(self, rows: Tensor, sequences: Any) -> tuple[Tensor, Tensor]:
        assert rows.shape == (1, 5)
        assert sequences == [self.encoded(0, "")]
        return LOSSES * TOKENS, TOKENS


def accountant(measurements: int) -> Accountant:
    privacy = ExamplePrivacy(1.0, 2, {0: 1.0})
    return Accountant(privacy, 1e-5, Training(local_steps=1), {0: "ann"}, {0: 4}, {0: 1}, measurements=measurements)


@pytest.mark.quick
def test_the_noise_has_the_scale_of_the_mechanism() -> None:
    """Range 6: (3 + 6 + 5 + 6)/4 = 5, and noise of deviation z·6/4."""
    fixed: Any = Fixed()
    engine = NoisedEngine(fixed, fixed, accountant(4000), clip=6.0, noise=0.5)
    row, alone = torch.zeros(1, 5), torch.tensor([0])
    drawn = torch.cat([engine.evaluate(row, alone, ("validation", "test")).loss for _ in range(4000)])
    deviation = 0.5 * 6 / 4
    # Five standard errors of a mean and of a deviation.
    assert float((drawn.mean(0) - 5).abs().max()) < 5 * deviation / 4000**0.5
    assert float((drawn.std(0) / deviation - 1).abs().max()) < 5 / (2 * 4000) ** 0.5
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 5 / 4000**0.5
    spent = engine.evaluate(row, alone, ("validation",))
    assert spent.tokens.tolist() == [[0]]
    assert clipped_sum(torch.tensor([float("inf"), -1.0, 2.0]), 6.0) == 8.0


def test_a_run_counts_its_measurements_before_they_leave(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "c.yaml", tiny_folder, write_clients(tmp_path / "d.jsonl"), privacy=PRIVATE)
    ended = mira("run", file, "--out", tmp_path / "run")
    assert ended.status == 0, ended.err
    records = metrics(tmp_path / "run")
    spent = [record["privacy"]["ann"] for record in records]
    assert [told["measurements"] for told in spent] == [1, 2, 3, 4]
    assert [told["epsilon"] for told in spent] == sorted(told["epsilon"] for told in spent)
    assert spent[0]["epsilon"] > 0
    assert spent[-1]["epsilon"] <= 8
    assert records[1]["train_loss"] == dict.fromkeys(records[1]["train_loss"])
    assert records[3]["clients"]["ann"]["validation_loss"] >= 0
    assert "answers" not in records[0]
    assert "losses have noise, which is counted" in ended.out


def test_a_site_tells_losses_with_noise_alone(world: World) -> None:
    plan: dict[str, Any] = {"privacy": PRIVATE}
    result, transport = world.apart(world.sites(), **plan)
    packets = [(name, unpack(data)) for name, data in transport.received]
    assert {packet.head.kind for _, packet in packets} == {"open", "train", "evaluate", "finish"}
    trained = [packet.values["jobs"] for _, packet in packets if packet.head.kind == "train"]
    assert trained == [[{"job": 0, "examples": 4, "tokens": 0, "steps": 2, "loss": 0.0}]] * 9
    measured = [packet for name, packet in packets if packet.head.kind == "evaluate" and name == "ann"]
    assert len(measured) == 4
    assert all(packet.tensors["tokens"].tolist() == [[1, 1]] for packet in measured)
    exact = world.apart(world.sites("exact"), "exact-run", privacy={"unit": "example", "clip": 0.5, "epsilon": 8.0})[0]
    before = [client["loss_start"] for client in exact["clients"]]
    assert all(abs(client["loss_start"] - b) > 1e-6 for client, b in zip(result["clients"], before, strict=True))
    # The server's record has the bound of all that is planned, the site the count of what was done.
    told = result["privacy"]["ann"]
    assert (told["at_most"], told["metrics"]) == (True, "noised")
    assert 7.9 < told["epsilon"] <= 8
    [note] = (world.folder / "sites" / "ann").rglob("measured.json")
    assert json.loads(note.read_text())["count"] == 4

    name, asked = next((name, unpack(data)) for name, data in transport.sent if unpack(data).head.kind == "evaluate")
    site = world.sites()[name]

    def said(kind: Any, **values: Any) -> Packet:
        return unpack(site.handle(pack(Packet(replace(asked.head, kind=kind), asked.values | values, asked.tensors))))

    assert "each split once" in str(said("evaluate", splits=["validation", "validation"]).values["failed"])
    assert "stay at this site" in str(said("grade").values["failed"])
    assert "stay at this site" in str(said("choose").values["failed"])
    for _ in range(3):  # what is spare
        assert bool(said("evaluate").tensors["nll"].isfinite().all())
    assert not bool(said("evaluate").tensors["nll"].isfinite().any())


@pytest.mark.quick
def test_the_noise_of_a_whole_site_has_no_measurements() -> None:
    values: dict[str, Any] = {
        "rounds": 1, "model": {"name": "m"}, "training": {"local_steps": 1}, "data": {"source": "builtin"},
        "privacy": {"clip": 1.0, "noise": 8.0, "metrics": "noised"},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"privacy\.metrics=noised: belongs to unit: example"):
        Experiment(**values)
