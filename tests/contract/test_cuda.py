"""The batched engine on a GPU against the oracle on the CPU: the same code, other kernels. Skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from engines import RandomCorpus, make_engine, warm_row
from test_engines import LIMIT, displacement_error

from mira.core.training import Training
from mira.core.types import Work
from tiny import KINDS, Kind, make_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU path is not tested here")
STEPS = (6, 2, 4)


@pytest.mark.parametrize("budget", [None, 4096, 60])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind: Kind, dtype: torch.dtype, prefix: bool, budget: int | None) -> None:
    training, corpus = Training(lr=1e-3, local_steps=6, clip=0.5, weight_decay=0.01), RandomCorpus(STEPS)
    oracle = make_engine("reference", kind, corpus, training, dtype)
    ours = make_engine(
        "batched", kind, corpus, training, model=make_tiny(kind, dtype).cuda(), prefix=prefix, tokens_per_pass=budget
    )
    start = warm_row(ours.layout).expand(len(STEPS), -1).to(torch.promote_types(dtype, torch.float32))
    work = Work(torch.arange(len(STEPS)), start)
    there, here = (engine.train(work, 0, 1e-3) for engine in (ours, oracle))
    assert there.rows.device.type == "cpu", "rows come back to the server"
    assert displacement_error(ours.layout, there.rows, here.rows, start) <= LIMIT[dtype]
    torch.testing.assert_close(there.loss, here.loss, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_answers(kind: Kind) -> None:
    training, corpus = Training(local_steps=1), RandomCorpus(STEPS)
    oracle = make_engine("reference", kind, corpus, training, torch.float64)
    ours = make_engine("batched", kind, corpus, training, model=make_tiny(kind, torch.float64).cuda())
    rows, clients = warm_row(ours.layout).double().expand(len(STEPS), -1), torch.arange(len(STEPS))
    there, here = (engine.evaluate(rows, clients, ["test"]) for engine in (ours, oracle))
    torch.testing.assert_close(there.loss, here.loss, rtol=1e-10, atol=0)
    texts = [engine.generate(rows, clients, "test", 3, 8) for engine in (ours, oracle)]
    assert texts[0] == texts[1]
