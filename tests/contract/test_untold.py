"""privacy.metrics=none: nothing but adapters depends on a client's data, over machines and in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.in_process_federation import NAMES, Troubled, World, metrics
from helpers.sample_config import mira, write_clients, write_config
from mira import Experiment
from mira.comparison import plan
from mira.core.errors import UserError
from mira.fleet.messages.packet import Packet, pack, unpack
from mira.runner import run as experiment
from mira.setup.accounting import epsilon

pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")
PRIVATE = {"unit": "example", "clip": 0.5, "noise": 1.5, "metrics": "none"}


def other_data(folder: Path) -> Path:
    """Longer texts than those of ``World``, and more of them."""
    folder.mkdir()
    for name in NAMES:
        lines = [
            {"instruction": "Say it again and again.", "input": f"{n} " * 9, "output": f"{n}" * 5} for n in range(14)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def replies(transport: Troubled) -> list[Any]:
    """All that sites sent, apart from the identity of the run and the numbers in rows."""
    found = []
    for name, data in transport.received:
        packet = unpack(data)
        shapes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in packet.tensors.items()}
        found.append((name, packet.head.kind, packet.head.round, packet.values, shapes))
    return found


@pytest.mark.parametrize("privacy", [PRIVATE, {"clip": 0.5, "noise": 2.0, "metrics": "none"}])
def test_what_sites_send_beside_rows_is_the_same_for_all_data(world: World, privacy: dict[str, Any]) -> None:
    result, here = world.apart(world.sites(), privacy=privacy)
    elsewhere = World(world.folder / "elsewhere", world.model, other_data(world.folder / "other"))
    _, there = elsewhere.apart(elsewhere.sites(), privacy=privacy, split={"train": 9})
    assert replies(here) == replies(there)
    assert {kind for _, kind, *_ in replies(here)} == {"open", "train", "finish"}
    jobs = [values["jobs"] for _, kind, _, values, _ in replies(here) if kind == "train"]
    assert jobs == [[{"job": 0, "examples": 1, "tokens": 0, "steps": 2, "loss": 0.0}]] * 9
    for record in metrics(world.folder / "apart"):
        assert all(set(scores.values()) == {None} for scores in record.get("clients", {}).values())
        assert record.get("train_loss", {}) == dict.fromkeys(record.get("train_loss", {}))
    assert [client["examples"] for client in result["clients"]] == [None] * 3
    if "unit" in privacy:  # of a site that would take all of its examples in each step
        most = {"steps": 6, "noise": 1.5, "epsilon": epsilon(1.5, 1.0, 6, 1e-5), "delta": 1e-5}
        assert result["privacy"]["ann"] == most | {"at_most": True, "reported": True, "metrics": "none"}
    card = (world.folder / "sites" / "ann" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "loss |" not in card
    assert "| examples |" not in card


@pytest.mark.quick
def test_a_site_refuses_to_measure(world: World) -> None:
    lines, transport = list[str](), world.transport()
    opener = replace(world.opener(transport), say=lines.append)
    experiment.run(world.experiment(privacy=PRIVATE, rounds=1), world.folder / "apart", (), opener)
    assert "ann has joined, and tells no number of training examples" in lines
    name, opened = next((name, unpack(data)) for name, data in transport.sent if unpack(data).head.kind == "open")
    site = world.sites()[name]
    for kind in ("evaluate", "choose", "grade"):
        head: Any = replace(opened.head, kind=kind)
        said = unpack(site.handle(pack(Packet(head, {}, {})))).values
        assert said == {"failed": "privacy.metrics: losses and metrics as they are stay at this site"}
    # The reason for which it cannot take part would tell how many examples it has.
    given = opened.values["experiment"]
    strict = opened.values | {"experiment": given | {"privacy": given["privacy"] | {"delta": 0.25}}}
    said = unpack(world.sites("other")[name].handle(pack(Packet(opened.head, strict, {})))).values
    assert said == {"failed": "it failed; the reason is in the site's own log"}


def test_in_one_process_the_adapters_are_the_same_and_tables_say_not_told(tiny_folder: Path, tmp_path: Path) -> None:
    """Clients with equally many examples have equal weights anyway."""
    data = write_clients(tmp_path / "data.jsonl")
    for metric in ("exact", "none"):
        privacy = PRIVATE | {"simulation": True, "metrics": metric}
        file = write_config(tmp_path / f"{metric}.yaml", tiny_folder, data, privacy=privacy, method={"name": "fedit"})
        ended = mira("run", file, "--out", tmp_path / metric)
        assert ended.status == 0, ended.err
        rows = [load_file(path / "adapters" / "ann" / "adapter_model.safetensors") for path in (tmp_path / metric,)]
        (tmp_path / f"{metric}.rows").write_text(str(sorted((k, v.tolist()) for k, v in rows[0].items())))
    assert (tmp_path / "none.rows").read_text() == (tmp_path / "exact.rows").read_text()
    assert "ann" in ended.out
    assert ended.out.count("not told") >= 8
    assert "losses not told" in ended.err
    assert "nan" not in (ended.out + ended.err).lower()
    page = tmp_path / "page.html"
    assert mira("report", tmp_path / "none", "--out", page).status == 0
    assert "its clients told no losses, metrics and counts" in page.read_text(encoding="utf-8")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"training": {"local_epochs": 1}}, "training.local_epochs makes the number of steps tell"),
        ({"method": {"name": "mira", "strength": "personal"}}, "method.name=mira chooses by losses"),
    ],
)
def test_what_needs_losses_or_counts_is_refused(more: dict[str, Any], told: str) -> None:
    values: dict[str, Any] = {
        "rounds": 1, "model": {"name": "m"}, "training": {"local_steps": 1}, "data": {"source": "builtin"}, "privacy": PRIVATE,
    }  # fmt: skip
    Experiment(**values)
    with pytest.raises(UserError, match=told):
        Experiment(**values | more)


@pytest.mark.quick
def test_a_comparison_needs_losses(tmp_path: Path) -> None:
    experiment = {
        "rounds": 1, "model": {"name": "m"}, "training": {"local_steps": 1}, "data": {"source": "builtin"}, "privacy": PRIVATE,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps({"experiment": experiment, "seeds": [0], "entries": {"MIRA": {}}}))
    with pytest.raises(UserError, match=r"privacy\.metrics=none: a comparison measures losses"):
        plan.load(tmp_path / "c.yaml")
