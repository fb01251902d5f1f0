"""Recomputing layers changes what is kept in memory, and no number."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.engines import RandomCorpus, make_engine, warm_row
from helpers.model_families import FAMILIES, Family, build
from helpers.tiny_models import KINDS, make_tiny
from mira.adapters.lora import Lora
from mira.core.errors import UserError
from mira.core.training import Training
from mira.core.types import Trained, Work
from mira.engine.body import Body
from mira.engine.checkpoint import check_gradients, decoder_layers, recomputed

STEPS = (4, 2, 3)


def train(name: str, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Trained:
    engine = make_engine(name, kind, RandomCorpus(STEPS), Training(lr=1e-2, local_steps=4, clip=0.5), dtype, **options)
    start = warm_row(engine.spec.layout).expand(len(STEPS), -1)
    return engine.train(Work(torch.arange(3), start.double() if dtype == torch.float64 else start), 0, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["batched", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_to_the_last_bit(kind: str, name: str, dtype: torch.dtype) -> None:
    kept, again = (train(name, kind, dtype, checkpointing=on) for on in (False, True))
    assert torch.equal(kept.rows, again.rows)
    assert torch.equal(kept.loss, again.loss)


@pytest.mark.filterwarnings("ignore")  # optional kernels that are not installed
@pytest.mark.parametrize("name", ["batched", "reference"])
@pytest.mark.parametrize(
    "family", [one for one in FAMILIES if one.name in ("gemma3n_text", "gemma4_text")], ids=lambda one: one.name
)
def test_layers_that_share_keys_and_values_send_their_gradients_back(family: Family, name: str) -> None:
    """A layer leaves them for later ones in what it was given; adapters on k and v learn from all of these."""
    rows = []
    for on in (False, True):
        model = build(family)
        layout = Lora(rank=2, alpha=4.0, targets=("k_proj", "v_proj")).layout(model)
        corpus, training = RandomCorpus((1, 1)), Training(optimizer="sgd", local_steps=1)
        engine = make_engine(name, "llama", corpus, training, model=model, layout=layout, checkpointing=on)
        start = warm_row(layout).expand(2, -1)
        rows.append(engine.train(Work(torch.arange(2), start), 0, 1e-2).rows)
    assert torch.equal(*rows)
    assert not torch.equal(rows[0][0], rows[0][1])


@pytest.mark.parametrize("name", ["batched", "reference"])
def test_dropout_draws_the_same_masks_again(name: str) -> None:
    kept, again = (train(name, "llama", dropout=0.3, prefix=False, checkpointing=on) for on in (False, True))
    assert torch.equal(kept.rows, again.rows)
    assert not torch.equal(kept.rows, train(name, "llama", prefix=False).rows)


def test_adapters_on_the_last_layer_alone() -> None:
    """Below the first adapter there is nothing to differentiate."""
    model = make_tiny("llama")
    weight = nn.Parameter(torch.zeros(32))
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out + weight)
    grads = []
    for block in (nullcontext(), recomputed(model)):
        weight.grad = None
        with block:
            loss = model(torch.tensor([[5, 6, 7]]), use_cache=False).logits.square().mean()
        loss.backward()
        assert weight.grad is not None
        grads.append(weight.grad)
    assert torch.equal(*grads)


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps while the block runs, the model's own aside."""
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice
    frozen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_backward_pass_in_another_thread_is_the_same(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where autograd has a thread of its own."""
    engine = make_engine(
        "batched",
        "llama",
        RandomCorpus(STEPS),
        Training(lr=1e-2, local_steps=4),
        checkpointing=True,
        dropout=dropout,
        prefix=not dropout,
    )
    work = Work(torch.arange(3), warm_row(engine.spec.layout).expand(3, -1))
    here, backward = engine.train(work, 0, 1e-2), Tensor.backward

    def elsewhere(self: Tensor, *args: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(backward, self, *args).result()

    monkeypatch.setattr(Tensor, "backward", elsewhere)
    assert torch.equal(engine.train(work, 0, 1e-2).rows, here.rows)
    assert not torch.allclose(here.rows, work.start, atol=1e-3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_inputs_of_layers_are_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[bool, int] = {}
    for on in (False, True):
        engine: Any = make_engine("batched", kind, RandomCorpus((1, 1)), Training(local_steps=1), checkpointing=on)
        body = Body.__call__

        def measured(self: Any, tokens: Tensor, *rest: Any, on: bool = on, body: Any = body) -> Tensor:
            with counted(self.model) as bytes_:
                hidden: Tensor = body(self, tokens, *rest)
            kept[on] = sum(bytes_.values())
            # Inputs of two layers and of the last norm with what it keeps, angles, and indices: a few times T·d.
            assert not on or kept[on] <= 8 * tokens.numel() * 32 * 4
            return hidden

        with monkeypatch.context() as patch:
            patch.setattr(Body, "__call__", measured)
            engine.train(Work(torch.arange(2), warm_row(engine.spec.layout).expand(2, -1)), 0, 1e-3)
    assert kept[True] < kept[False] / 4


def test_the_model_is_left_as_it_was() -> None:
    model = make_tiny("llama")
    before = [dict(vars(layer)) for layer in decoder_layers(model)]
    with recomputed(model):
        assert all("forward" in vars(layer) for layer in decoder_layers(model))
        with pytest.raises(ValueError, match="input_ids"):
            model(use_cache=False)
    assert [dict(vars(layer)) for layer in decoder_layers(model)] == before


@pytest.mark.parametrize("leaving", [False, True])
def test_layers_that_leave_something_where_nobody_looks_are_refused(leaving: bool) -> None:
    model, left = make_tiny("llama"), list[Tensor]()
    first, second = (layer.forward for layer in model.model.layers)

    def leave(*given: Any, **options: Any) -> Any:
        out = first(*given, **options)
        left[:] = [out]
        return out

    def take(hidden: Tensor, *given: Any, **options: Any) -> Any:
        return second(hidden + left.pop(), *given, **options) if left else second(hidden, *given, **options)

    if not leaving:
        check_gradients(model)
        return
    model.model.layers[0].forward, model.model.layers[1].forward = leave, take
    with pytest.raises(
        UserError, match=r"^engine\.checkpointing=true: architecture 'llama' does not support recomputed layers"
    ):
        check_gradients(model)


def test_a_model_without_marked_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"^engine\.checkpointing=true: architecture 'Linear' marks no layers"):
        decoder_layers(nn.Linear(2, 2))
