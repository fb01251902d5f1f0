"""The GPU's benchmark, small and on the CPU: that both sides compute the same there, and the report is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, report
from transformers import LlamaConfig

from helpers import fake_cuda

pytestmark = pytest.mark.slow

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def test_both_sides_compute_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = gpu.random_workload(CONFIG, gpu.Crowd(3, 2, 32, 1e9), torch.device("cpu"), torch.float32)
    found = gpu.measure(workload, 1e9, samples=2)
    for name, agreement in found["agreement"].items():
        assert agreement["difference"] <= agreement["allowed"], name
    on, off = (found["ratios"][f"shared prefix {way}"] for way in ("on", "off"))
    assert len(on["samples"]) == len(found["seconds"]["peft"]) == len(found["gemm_peak_gflops"]) == 2
    # Of 2·31 tokens 16 are shared; heads, and the last layer's MLP, are left out on both ways alike.
    assert on["flop_ratio"] > off["flop_ratio"] > 1
    assert found["ratios"]["recorded passes"]["samples"]
    results = {"environment": report.environment(), "samples": 2, **found}
    report.write(results, tmp_path / "out" / "gpu.json")
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["ratios"].keys() == found["ratios"].keys()
    report.show(results, tmp_path / "out" / "gpu.json")
    assert "missed" in capsys.readouterr().out


def test_each_way_is_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.take(monkeypatch)
    workload = gpu.random_workload(CONFIG, gpu.Crowd(3, 2, 32, None), torch.device("cpu"), torch.float32)
    read = {}
    for prefix, recorded in ((True, True), (True, False), (False, True)):
        engine = workload.engine(prefix, cuda_graphs=recorded)
        packed = engine.adapted.pack([(0, engine.spec.corpus.batches(0, 0)[0])])
        read[prefix] = len(packed.tokens)
        engine.train(workload.work(workload.rows()), 0, 1e-4)
        recordings = engine.replayer.captured if engine.replayer else {}
        assert [bucket.keys > 0 for bucket in recordings] == [prefix] * recorded
    assert read == {True: 2 * 31 - 16, False: 2 * 31}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()


def test_the_shapes_are_those_they_are_called() -> None:
    from transformers import LlamaForCausalLM

    for name, millions in (("SmolLM2 135M", 134.5), ("Llama 1.3B", 1345.4)):
        with torch.device("meta"):
            size = sum(p.numel() for p in LlamaForCausalLM(gpu.SHAPES[name]).parameters())
        assert round(size / 1e6, 1) == millions
