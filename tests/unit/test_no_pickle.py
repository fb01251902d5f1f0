"""Nothing that is read can run code: no module here uses a format that may."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "mira"
# multiprocessing pickles whatever passes between its processes.
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
# The processes of one comparison, started by it, talk over pipes that no other process can open.
ALLOWED = {"comparison/processes.py": {"multiprocessing", "multiprocessing.connection"}}
CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "numpy.load",
    "np.load",
    "pandas.read_pickle",
    "yaml.unsafe_load",
}
LAST = {call.rpartition(".")[2] for call in CALLS}
NAMES = {"eval", "exec", "compile", "__import__"}
ARGUMENTS = {"allow_pickle", "weights_only"}  # whoever gives them reads pickles


def found(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{name.name}" for name in node.names} & CALLS
            yield from whole or ({node.module} if (node.module or "").split(".")[0] in MODULES else set())
        elif isinstance(node, ast.Attribute) and node.attr in LAST and ast.unparse(node) in CALLS:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in NAMES:
                yield node.func.id
            yield from (word.arg for word in node.keywords if word.arg in ARGUMENTS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_reads_what_may_run_code(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(PACKAGE).as_posix(), set())
    assert set(found(path.read_text(encoding="utf-8"))) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import multiprocessing.pool", "from torch import load", "torch.load(file)",
        "read = torch.load", "def f():\n    import dill as json", "np.load(file, allow_pickle=True)", "eval(text)",
    ],
)  # fmt: skip
def test_the_check_sees_it(source: str) -> None:
    assert list(found(source))


@pytest.mark.parametrize(
    "source", ["safetensors.torch.load(data)", "json.loads(text)", "model.eval()", "torch.compile(f)"]
)
def test_and_nothing_else(source: str) -> None:
    assert not list(found(source))
