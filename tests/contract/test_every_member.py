"""The checks of ``mira.testing`` on every method, graph, source and adapter kind that MIRA offers, plug-ins included."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.method_variants import HALVES, VARIANTS, used_by
from mira.adapters import ADAPTERS
from mira.core.layout import Layout
from mira.data import SOURCES
from mira.data.partition import ByChance
from mira.data.sources.memory import Given
from mira.data.types import Client, Example
from mira.graphs import GRAPHS
from mira.testing import (
    Check,
    adapter_checks,
    adapters,
    graph_checks,
    graphs,
    method_checks,
    methods,
    source_checks,
    sources,
)

pytestmark = pytest.mark.quick

EVEN = Layout.of({"layer": (3, 2)}, rank=2, alpha=1.0)
ROWS = [{"instruction": "Say it.", "context": str(n), "response": f"{n}!", "category": "ab"[n % 2]} for n in range(24)]


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.__name__ == name)


def laws(of: Any) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("law", [law.__name__ for law in of.LAWS])


@laws(methods)
@pytest.mark.parametrize("name", VARIANTS)
def test_method(name: str, law: str) -> None:
    method = VARIANTS[name]
    layout = EVEN if name in HALVES else methods.LAYOUT
    named(method_checks(method, layout, used_by(method, methods.sparse_graph())), law)()


def edges(folder: Path) -> Any:
    file = folder / "edges.csv"
    file.write_text("source,target,weight\nann,bob,0.5\ncleo,gus,2\nann,gus,1\n")
    return GRAPHS["file"](path=file)


@laws(graphs)
@pytest.mark.parametrize("name", [*GRAPHS, "knn-displacement"])
def test_graph(name: str, law: str, tmp_path: Path) -> None:
    special: Mapping[str, Callable[[], Any]] = {
        "file": lambda: edges(tmp_path),
        "knn-displacement": lambda: GRAPHS["knn"](source="displacement"),
    }
    named(graph_checks(special.get(name, GRAPHS.get(name))()), law)()


def jsonl(folder: Path) -> Any:
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": r["context"], "completion": "x"}) + "\n" for r in ROWS)
    )
    return SOURCES["jsonl"](path=folder)


def dolly(folder: Path) -> Any:
    (folder / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return SOURCES["dolly"](path=folder / "dolly.jsonl")


def tasks(folder: Path) -> Any:
    instances = [{"id": str(n), "input": f"question {n}", "output": [str(n)]} for n in range(25)]
    for name in ("task1_a", "task2_b"):
        task = {"Definition": ["Answer."], "Categories": ["Talk"], "Instances": instances}
        (folder / f"{name}.json").write_text(json.dumps(task))
    return SOURCES["natural-instructions"](path=folder, share=0.9)


def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: ROWS)
    return SOURCES["hub"](
        "some/data", ByChance(3), {"instruction": "instruction", "input": "context", "output": "response"}
    )


@laws(sources)
@pytest.mark.parametrize("name", SOURCES)
def test_source(name: str, law: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    special: Mapping[str, Callable[[], Any]] = {
        "jsonl": lambda: jsonl(tmp_path),
        "dolly": lambda: dolly(tmp_path),
        "natural-instructions": lambda: tasks(tmp_path),
        "hub": lambda: hub(monkeypatch),
        "memory": lambda: Given([Client("a", (Example("Say it.", "7", "seven"),))]),
        "sites": lambda: SOURCES["sites"](examples={"a": 3}, expected=["b"]),
    }
    named(source_checks(special.get(name, SOURCES[name])()), law)()


KINDS: Mapping[str, Callable[[], Any]] = {
    **ADAPTERS,
    "rslora": lambda: ADAPTERS["lora"](rslora=True, targets=("q_proj", "down_proj"), rank=3),
    "dora": lambda: ADAPTERS["lora"](dora=True),
    "orthogonal": lambda: ADAPTERS["lora"](init="orthogonal"),
}


@laws(adapters)
@pytest.mark.parametrize("name", KINDS)
def test_adapter(name: str, law: str) -> None:
    named(adapter_checks(KINDS[name]()), law)()
