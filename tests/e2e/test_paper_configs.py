"""The paper's configurations: they say what the paper says, and a round of each runs on a tiny model of its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import save_tiny
from mira import config, run
from mira.data.sources.natural_instructions import MIN_INSTANCES

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
TARGETS = {"llama": ("q_proj",), "gpt2": ("c_attn", "c_proj")}


def architecture(file: Path) -> Any:
    return file.name.split("-")[0]


def local_data(file: Path, folder: Path) -> list[str]:
    """Overrides that point ``file`` to data in its source's own format, of as many clients as two values or tasks give."""
    if "dolly" in file.name:
        path = folder / "dolly.jsonl"
        rows = [
            {
                "instruction": f"Ask {kind} {n}.",
                "context": "Here." if n % 2 else "",
                "response": str(n),
                "category": kind,
            }
            for kind in ("open_qa", "summarization")
            for n in range(24)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [f"data.path={path}", "data.partition.clients_per_value=2"]
    for task in range(5):
        instances = [{"id": str(n), "input": f"question {n}", "output": [str(n), "other"]} for n in range(60)]
        few = instances[: MIN_INSTANCES - 1] + [{"id": "long", "input": "x" * 1024, "output": ["y"]}] * 9
        content = {"Definition": ["Answer."], "Categories": ["QA"], "Instances": instances if task else few}
        (folder / f"task{task}.json").write_text(json.dumps(content))
    return [f"data.path={folder}", "data.clients=4"]


def test_two_models_on_two_data_sets() -> None:
    assert len(CONFIGS) == 4
    assert {config.load(file).model.name for file in CONFIGS} == {
        "datajuicer/LLaMA-1B-dj-refine-150B", "openai-community/gpt2-large"
    }  # fmt: skip


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_protocol_is_the_papers(file: Path) -> None:
    e = config.load(file)
    data: Any = e.data
    clients = data.clients if "natural" in file.name else 8 * data.partition.clients_per_value
    assert (clients, e.cohort) == (80, 0.1)
    assert 40 <= e.rounds <= 100
    assert 4 <= e.training.batch_size <= 8
    assert 3e-5 <= e.training.lr <= 3e-4
    assert 8 <= e.adapter.rank <= 16  # type: ignore[union-attr]
    assert e.adapter.alpha == 8  # type: ignore[union-attr]
    assert tuple(e.adapter.targets) == TARGETS[architecture(file)]  # type: ignore[union-attr]
    assert (e.method.form, e.graph.name) == ("paper", "random")  # type: ignore[attr-defined]
    assert (e.prompt.template, e.split.train, e.evaluation.max_new_tokens) == ("alpaca", 0.8, 128)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.parametrize("more", [[], ["method.name=fedit", "adapter.kind=prompt"]], ids=["mira", "fedptuning"])
def test_a_round_of_it_runs(file: Path, more: list[str], tmp_path: Path) -> None:
    """All as in the file but for the size of model, data and cohort: with a tenth of 4 clients nothing would mix."""
    result, record = a_round(file, more, tmp_path)
    if not more:
        assert record["mixing_step"] == pytest.approx(3e-4 * 5 * 0.5)
        adapter = json.loads((Path(result["clients"][0]["adapter"]) / "adapter_config.json").read_text())
        assert (adapter["r"], adapter["lora_alpha"], sorted(adapter["target_modules"])) == (
            16, 8, sorted(TARGETS[architecture(file)])
        )  # fmt: skip


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_round_of_fedkseed_sends_less_than_20_kilobytes(file: Path, tmp_path: Path) -> None:
    """4096 coefficients of directions in all weights, as published; what a client sends and is sent, as measured."""
    seeds = ["method.name=fedit", "adapter={kind: seeds, count: 4096, epsilon: 5e-4, targets: all}"]
    _, record = a_round(file, [*seeds, "training.lr=1e-6", "model.dtype=float32"], tmp_path)
    assert list(record["client_bytes"].values()) == [{"down": 4 * 4096, "up": 4 * 4096}] * 2
    assert 4 * 4096 < 20_000


def a_round(file: Path, more: list[str], tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of a run of ``file`` with ``more`` on a tiny model, and the record of its one round."""
    model = save_tiny(tmp_path / "model", architecture(file))
    (tmp_path / "data").mkdir()
    small = ["rounds=1", "cohort=0.5", "engine.threads=1", "evaluation.max_new_tokens=2", f"model.name={model}"]
    e = config.load(file, [*small, *local_data(file, tmp_path / "data"), *more])
    result = run(e, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (result["rounds"], len(result["clients"]), len(record["cohort"])) == (1, 4, 2)
    assert result["lost"] == 0
    return result, record
