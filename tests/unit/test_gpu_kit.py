"""The wheels for a GPU machine without network: what belongs to them, and which of them a machine takes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from benchmarks.gpu import kit
from packaging.requirements import Requirement
from tools import gpu_kit

ROOT = Path(__file__).parents[2]


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> None:
    module = name.replace("-", "_")
    with zipfile.ZipFile(folder / f"{module}-{version}-{tag}.whl", "w") as file:
        file.writestr(f"{module}.py", f"version = {version!r}\n")
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
        file.writestr(f"{module}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def test_a_machine_takes_what_it_lacks_or_has_too_old(tmp_path: Path) -> None:
    wheels, site = tmp_path / "kit", tmp_path / "site"
    wheels.mkdir()
    wheel(wheels, "mira-absent", "1.0", "mira-deeper>=2", "mira-optional; extra == 'more'")
    wheel(wheels, "mira-deeper", "2.0")
    wheel(wheels, "mira-deeper", "3.0", tag="cp27-cp27m-win32")
    wheel(wheels, "mira-optional", "1.0")
    wheel(wheels, "numpy", "999.0")
    wheel(wheels, "torch", "999.0", "mira-optional")
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "mira-fl"\ndependencies = ["mira-absent", "numpy>=998", "torch>=2"]\n'
        "[project.optional-dependencies]\ndev = []\n"
    )
    assert kit.lacking(project) == ["mira-absent", "numpy"]
    assert kit.unpacked(wheels, project, site) == ["mira-absent", "mira-deeper", "numpy"]
    assert (site / "mira_deeper.py").read_text() == "version = '2.0'\n"
    assert not (site / "torch.py").exists()


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--kit=.*make gpu-kit"):
        kit.unpacked(tmp_path, ROOT / "pyproject.toml", tmp_path / "site")


def test_the_kit_is_what_the_core_needs_beyond_the_machine() -> None:
    needed = set(gpu_kit.needed())
    assert {"mira-fl", "pydantic", "pydantic-core", "pebble", "rouge-score", "pytest", "peft"} <= needed
    assert not needed & {"torch", "transformers", "numpy", "tokenizers", "ray", "matplotlib", "flwr"}
    assert needed - {"mira-fl"} <= set(gpu_kit.pinned())


def test_a_kit_that_is_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path, "mira-absent", "1.0")
    gpu_kit.check(tmp_path, ["mira-absent"])
    with pytest.raises(SystemExit, match="missing: mira-other"):
        gpu_kit.check(tmp_path, ["mira-absent", "mira-other"])
    wheel(tmp_path, "mira-fast", "1.0", tag="cp312-cp312-manylinux2014_x86_64")
    with pytest.raises(SystemExit, match="not expected to be: mira-fast"):
        gpu_kit.check(tmp_path, ["mira-absent"])
    monkeypatch.setattr(gpu_kit, "MOST", 10)
    with pytest.raises(SystemExit, match="of at most"):
        gpu_kit.check(tmp_path, [])


# Installed by the core, but needed by a part of it alone; and all that comes with an extra.
ELSEWHERE = (
    "rouge_score", "nltk", "gguf", "tensorboardX", "google", "pebble", "ray", "matplotlib", "flwr", "cryptography", "datasets",
    "pandas", "bitsandbytes", "wandb", "mlflow", "dp_accounting",
)  # fmt: skip
TRAIN = f"""
import sys
sys.modules |= dict.fromkeys({ELSEWHERE!r})  # importing one raises ModuleNotFoundError
import torch
import mira.library
from helpers.engines import RandomCorpus, make_engine, warm_row
from mira.core.training import Training
from mira.core.types import Work

engine = make_engine("batched", "llama", RandomCorpus((1,)), Training(local_steps=1))
start = warm_row(engine.spec.layout)[None]
assert not torch.equal(engine.train(Work(torch.arange(1), start), 0, 1e-3).rows, start)
"""


@pytest.mark.slow
def test_the_core_trains_without_what_only_parts_of_it_need() -> None:
    path = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], capture_output=True, text=True, env={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr


def test_the_bounds_admit_the_machine() -> None:
    """Versions that the first look was tried with on a bare environment."""
    bounds = {each.name: each.specifier for each in kit.roots(ROOT / "pyproject.toml")}
    for line in ("torch==2.11.0", "transformers==5.17.0", "peft==0.20.0", "safetensors==0.6.0", "tokenizers==0.23.2"):
        pin = Requirement(line)
        assert bounds[pin.name].contains(next(iter(pin.specifier)).version), line
