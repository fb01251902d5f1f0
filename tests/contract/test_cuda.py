"""The engine's way on a GPU against the oracle on the CPU: on the CPU, with a stand-in for the attention kernel, and on a GPU
where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import fake_cuda
from helpers.displacement import LIMIT, displacement_error
from helpers.engines import RandomCorpus, make_engine, warm_row
from helpers.tiny_models import KINDS, Kind, make_tiny
from mira.adapters.lowrank import AdapterBatch
from mira.core.training import Training
from mira.core.types import Work
from mira.engine.attention import packed as attention
from mira.engine.batched import BatchedEngine
from mira.engine.cuda import graphs as cuda_graphs
from mira.engine.packing import pack

STEPS = (6, 2, 4)
_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its kernels are not tested here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=_CUDA)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        fake_cuda.take(monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind: Kind, dtype: torch.dtype, prefix: bool, budget: int | None, device: str) -> None:
    training, corpus = Training(lr=1e-3, local_steps=6, clip=0.5, weight_decay=0.01), RandomCorpus(STEPS)
    oracle = make_engine("reference", kind, corpus, training, dtype)
    model = make_tiny(kind, dtype).to(device)
    ours = make_engine("batched", kind, corpus, training, model=model, prefix=prefix, tokens_per_pass=budget)
    start = warm_row(ours.spec.layout).expand(len(STEPS), -1).to(torch.promote_types(dtype, torch.float32))
    work = Work(torch.arange(len(STEPS)), start)
    there, here = (engine.train(work, 0, 1e-3) for engine in (ours, oracle))
    assert there.rows.device.type == "cpu", "rows come back to the server"
    assert displacement_error(ours.spec.layout, there.rows, here.rows, start) <= LIMIT[dtype]
    torch.testing.assert_close(there.loss, here.loss, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_bfloat16(kind: Kind, prefix: bool, device: str) -> None:
    """As near to fp32 on the same weights as the oracle in bfloat16 is; half as much again, since noise is compared."""
    training, corpus = Training(lr=1e-3, local_steps=6, clip=0.5), RandomCorpus(STEPS)
    oracle = make_engine("reference", kind, corpus, training, torch.bfloat16)
    exact = make_engine("reference", kind, corpus, training, model=make_tiny(kind, torch.bfloat16).float())
    model = make_tiny(kind, torch.bfloat16).to(device)
    ours = make_engine("batched", kind, corpus, training, model=model, prefix=prefix)
    start = warm_row(ours.spec.layout).expand(len(STEPS), -1)
    work = Work(torch.arange(len(STEPS)), start)
    rows = [engine.train(work, 0, 1e-3).rows.float() for engine in (ours, oracle, exact)]
    errors = [displacement_error(ours.spec.layout, found, rows[2], start) for found in rows[:2]]
    assert 1e-4 < errors[0] < 1.5 * errors[1]
    assert attention._agrees.cache_info().currsize, "the kernel for all sequences was asked for"
    assert attention._agrees(model.device, torch.bfloat16, 4, 4 if kind == "gpt2" else 2, 8)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_answers(kind: Kind, prefix: bool, device: str) -> None:
    training, corpus = Training(local_steps=1), RandomCorpus(STEPS)
    oracle = make_engine("reference", kind, corpus, training, torch.float64)
    model = make_tiny(kind, torch.float64).to(device)
    ours = make_engine("batched", kind, corpus, training, model=model, prefix=prefix)
    rows = torch.stack([warm_row(ours.spec.layout, seed) for seed in range(len(STEPS))]).double()
    clients = torch.arange(len(STEPS))
    there, here = (engine.evaluate(rows, clients, ["test"]) for engine in (ours, oracle))
    torch.testing.assert_close(there.loss, here.loss, rtol=1e-10, atol=0)
    texts = [engine.generate(rows, clients, "test", 3, 8) for engine in (ours, oracle)]
    assert texts[0] == texts[1]


class _Kernel(torch.autograd.Function):
    """In the place of the attention kernel, as many operations as it is kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return q.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        k, v = ctx.saved_tensors
        return grad.clone(), torch.zeros_like(k), torch.zeros_like(v)


class _Count(TorchDispatchMode):
    """Operations that give floats of their own; views launch nothing, and whole numbers are laid out on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        self.found += isinstance(first, Tensor) and first.is_floating_point() and not function.is_view
        return out


def test_a_step_launches_no_more_kernels_for_more_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are what a GPU would wait for."""
    found = []
    for clients in (4, 16):
        engine = make_engine("batched", "llama", RandomCorpus((1,) * clients), Training(local_steps=1))
        fake_cuda.take(monkeypatch)
        monkeypatch.setattr(attention, "_agrees", lambda *shape: True)
        monkeypatch.setattr(
            "torch.nn.attention.varlen.varlen_attn", lambda q, k, v, *rest, **named: _Kernel.apply(q, k, v)
        )
        work = Work(torch.arange(clients), warm_row(engine.spec.layout).repeat(clients, 1))
        with _Count() as count:
            engine.train(work, 0, 1e-3)
        monkeypatch.undo()
        found.append(count.found)
    assert found[1] < 1.1 * found[0]


class _Questions(TorchDispatchMode):
    """How often a number is read out of a tensor, for which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_pass_reads_no_number_out_of_a_tensor(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.take(monkeypatch)
    engine = make_engine("batched", kind, RandomCorpus(STEPS), Training(local_steps=1))
    assert isinstance(engine, BatchedEngine)
    packed = pack([(n, engine.spec.corpus.batches(0, n)[0]) for n in range(len(STEPS))], True)
    rows = warm_row(engine.spec.layout).repeat(len(STEPS), 1)
    adapters = AdapterBatch(rows, packed.ranges, torch.zeros_like(rows), needed=packed.predict)
    assert adapters.padded is not None
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v, *rest, **named: _Kernel.apply(q, k, v))
    with _Questions() as questions, engine.adapted.using(adapters):
        engine.adapted.hidden_states(packed).sum().backward()
    assert not questions.found
    with _Questions() as questions:
        rows.sum().item()
    assert questions.found == 1


@_CUDA
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    ("dtype", "recorded"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_a_pass_waits_for_nothing(dtype: torch.dtype, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs.CudaGraphs, "timed", fake_cuda.timed)
    engine = make_engine(
        "batched", "llama", RandomCorpus(STEPS), Training(local_steps=1), model=make_tiny(dtype=dtype).cuda(),
        cuda_graphs=recorded,
    )  # fmt: skip
    assert isinstance(engine, BatchedEngine)
    jobs = [(n, engine.spec.corpus.batches(0, n)[0]) for n in range(len(STEPS))]
    rows = engine.adapted.rows(warm_row(engine.spec.layout).repeat(len(STEPS), 1))
    grad, loss = torch.zeros_like(rows), torch.zeros(len(STEPS), dtype=torch.float64, device=rows.device)
    for _ in range(2):  # kernels are chosen, and the pass is recorded
        engine._accumulate(jobs, rows, grad.zero_(), loss, None, {})
    assert bool(engine.replayer and engine.replayer.captured) == recorded
    grad.zero_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._accumulate(jobs, rows, grad, loss, None, {})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(grad.any())
