"""test.json of a comparison's run: whole, of an older version, or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mira.comparison.tested import is_tested, measured
from mira.core.errors import UserError

LOSSES = {"local_loss": 1.0, "validation_loss": None, "clients": {"ann": {"test_loss": 1, "perplexity": 2.7}}}
BEST = LOSSES | {
    "transfer": {"names": ["ann"], "matrix": [[1.0]], "global_loss": None},
    "answers": {
        "rouge_l": 0.5,
        "exact_match": 0.0,
        "clients": {"ann": {"rouge_l": 0.5, "exact_match": None, "own": 1}},
    },
}
WHOLE = {"best_round": 1, "start": LOSSES, "best": BEST, "last": LOSSES}


def written(folder: Path, value: Any) -> Path:
    (folder / "test.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    assert measured(tmp_path) is None
    assert not is_tested(tmp_path)
    assert measured(written(tmp_path, WHOLE)) == WHOLE
    assert is_tested(tmp_path)
    older = {key: value for key, value in WHOLE.items() if key != "start"}
    assert measured(written(tmp_path, older)) == older
    assert not is_tested(tmp_path)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("5", "input should be a valid dictionary"), ("[]", "dictionary"), ("null", "dictionary"), ('["start"]', "dictionary"),
        ("{", "not JSON"), ({"start": 1}, "best_round: field required"), (WHOLE | {"start": 1}, "start: "),
        (WHOLE | {"best": 3}, "best: "), (WHOLE | {"best": LOSSES}, "best.transfer is missing"),
        (WHOLE | {"last": LOSSES | {"local_loss": "1"}}, "last.local_loss: "),
        (WHOLE | {"last": LOSSES | {"clients": {"bob": {"test_loss": 1.0}}}}, "of different clients"),
        (WHOLE | {"best": BEST | {"answers": {"clients": 3}}}, "best.answers.rouge_l: "),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(value: Any, why: str, tmp_path: Path) -> None:
    for read in (measured, is_tested):
        with pytest.raises(UserError, match=r"test\.json: corrupt checkpoint") as caught:
            read(written(tmp_path, value))
        assert why.lower() in str(caught.value).lower()
        assert "\n" not in str(caught.value)
