"""Products with frozen weights in passes without gradients."""

import pytest
import torch
from torch import nn

from mira.adapters.frozen import FrozenWeights

CPU = torch.device("cpu")
ROWS = (16, 2, 64, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_prepared_copies_change_no_bit(dtype: torch.dtype, bias: bool) -> None:
    if not FrozenWeights.available(CPU, dtype):
        pytest.skip("this processor has no AVX-512")
    torch.manual_seed(0)
    layer = nn.Linear(96, 160, bias).to(dtype)
    kept, plain = FrozenWeights(keep=True), FrozenWeights(keep=False)
    with torch.no_grad():
        for rows in ROWS:
            x = torch.randn(1, rows, 96).to(dtype)
            found = kept.multiply(x, layer)
            assert torch.equal(found, plain.multiply(x, layer))
            torch.testing.assert_close(found, layer(x))
    assert kept.prepared[layer] is not None
    assert not plain.prepared


def test_one_row_and_another_precision_are_multiplied_as_ever() -> None:
    layer, frozen = nn.Linear(8, 4), FrozenWeights(keep=True)
    x = torch.randn(1, 8)
    assert torch.equal(frozen.multiply(x, layer), layer(x))
    assert not frozen.prepared
    assert not FrozenWeights.available(CPU, torch.float64)
    assert not FrozenWeights.available(torch.device("cuda"), torch.float32)
