"""Scores of answers: in any script, against the packages that define them, and one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.sample_config import mira, settings, write_config
from mira import Experiment
from mira.core.errors import UserError
from mira.core.layout import Entry, Layout
from mira.core.text_metrics import chrf, words
from mira.core.types import Scores
from mira.runner import evaluation as measure
from mira.runner.evaluation import answers, check_metrics, exact_match, grade, register, rouge_l, transfer
from mira.runner.label_accuracy import label_accuracy
from mira.setup.build import open_session

EQUAL = [
    "你好，世界", "Привет мир", "مرحبا", "हिन्दी", "สวัสดี", "안녕 세계",
    "שלום", "Ελλάδα", "ファイル名", "=>", "✓", "{}", "😀", "é", "½",
]  # fmt: skip


@pytest.mark.parametrize("text", EQUAL)
def test_equal_texts_score_one_in_any_script(text: str) -> None:
    assert exact_match([text], [text]) == rouge_l([text], [text]) == chrf(text, text) == 1.0
    assert rouge_l(["other"], [text]) == 0.0


@pytest.mark.parametrize(
    ("given", "reference", "share"),
    [
        ("你好世界", "你好，世界", 1.0),
        ("我爱你", "我恨你", 2 / 3),
        ("Привет, мир!", "привет мир", 1.0),
        ("добрый день", "добрый вечер", 0.5),
        ("Cafe\u0301", "café", 1.0),
        ("می\u200cروم", "میروم", 1.0),
        ("", "你好", 0.0),
        ("=>", "=>=", 0.8),
    ],
)
def test_rouge_of_other_scripts(given: str, reference: str, share: float) -> None:
    assert rouge_l([given], [reference]) == pytest.approx(share, abs=1e-12)


@given(st.text(st.characters(codec="ascii")), st.text(st.characters(codec="ascii")))
def test_rouge_of_ascii_is_rouge_itself(one: str, other: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(["rougeL"], use_stemmer=True).score(other, one)["rougeL"].fmeasure
    if any(c.isalnum() for c in one) and any(c.isalnum() for c in other):
        assert rouge_l([one], [other]) == expected


def test_rouge_of_sentences_is_rouge_itself() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    one, other = "The cats were sitting on a mat, happily.", "the cat sat (happily) on the mats"
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(other, one)["rougeL"].fmeasure
    assert rouge_l([one], [other]) == expected > 0


def test_words_of_scripts_with_marks_and_without_spaces() -> None:
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("看GPT4模型") == ["看", "gpt4", "模", "型"]
    assert words("snake_case don't") == ["snake", "case", "don", "t"]


# sacrebleu 2.6.0, CHRF().sentence_score(given, [reference]).score / 100
CHRF = [
    ("The cat sat on the mat.", "The cat is on the mat.", 0.6717273492330232),
    ("你好世界", "你好，世界", 0.3399581589958159),
    ("a", "ab", 0.5555555555555556),
    ("kitten sitting", "sitting kitten", 0.72756734006734),
    ("Привет мир", "Привет, мир!", 0.5062134456514557),
    ("34000|m", "34000|g", 0.7345238095238095),
    ("no", "yes indeed", 0.06578947368421052),
    ("", "x", 0.0),
    ("x", "x", 1.0),
]


@pytest.mark.parametrize(("given", "reference", "score"), CHRF)
def test_chrf_is_that_of_sacrebleu(given: str, reference: str, score: float) -> None:
    assert chrf(given, reference) == pytest.approx(score, abs=1e-12)


class Says:
    """An engine that gives these answers."""

    def __init__(self, *given: list[str]) -> None:
        self.given = list(given)

    def generate(self, *_: object) -> list[list[str]]:
        return self.given


def test_ones_own_metric_stands_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_more", dict(measure._more))
    register(
        "brief",
        lambda given, expected: sum(len(g) <= len(e) for g, e in zip(given, expected, strict=True)) / len(given),
    )
    check_metrics(["brief", "chrf", "label_accuracy"])
    one = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    (found,) = grade(Says(["aa", "b"]), *one, [["a", "b"]], None, 9, ["brief", "chrf"])  # type: ignore[arg-type]
    assert found == {"exact_match": 0.5, "rouge_l": 0.5, "brief": 0.5, "chrf": pytest.approx((5 / 6 + 1) / 2, abs=0.05)}
    told = answers(["x", "y"], [found, found | {"brief": 1.0}])
    assert (told["brief"], told["exact_match"]) == (0.75, 0.5)


@pytest.mark.parametrize("name", ["exact_match", "label_accuracy"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is built in"):
        register(name, lambda given, expected: 0.0)


def test_an_unknown_metric_is_refused_before_anything_runs(tiny_folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_folder, tmp_path / "none", evaluation={"metrics": ["chfr"]})
    refused = mira("run", config, "--out", tmp_path / "run").error
    assert "unknown metric 'chfr'" in refused
    assert "did you mean 'chrf'?" in refused
    assert mira("config", "check", config).error == refused


@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_label_accuracy_is_the_share_whose_answer_is_the_likeliest(
    engine: str, tiny_folder: Path, tmp_path: Path
) -> None:
    lines = [
        {"instruction": "Odd?", "input": str(n), "output": "yes" if n % 2 else "no", "who": "few"} for n in range(12)
    ]
    lines += [{"instruction": "Say", "input": str(n), "output": str(n), "who": "many"} for n in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = settings(tiny_folder, data, engine={"name": engine}, graph={"name": "complete"}) | {
        "data": {"source": "jsonl", "path": str(data), "client_column": "who"},
        "split": {"train": 6, "validation": 2, "test": 4},
    }
    session = open_session(Experiment(**values))
    rows = session.start().expand(2, -1)
    few, many = label_accuracy(session.engine, session.corpus, rows, None)
    assert many is None
    owner, right = session.federation.clients[0], 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for example in owner.test:  # by plain losses of the model itself
        tried = {}
        for label in ("yes", "no"):
            encoded = session.corpus.encoder.encode(replace(example, output=label))
            tokens = torch.tensor([encoded.tokens])
            with torch.no_grad():
                logits = plain(tokens).logits[0].log_softmax(-1)
            tried[label] = sum(float(logits[n - 1, t]) for n, t in enumerate(encoded.tokens) if encoded.label[n])
        right += max(tried, key=tried.__getitem__) == example.output
    assert few == right / len(owner.test)


class Distances:
    """Losses that are the distance of a row's first number to the client's, and the limits of what was measured."""

    def __init__(self) -> None:
        self.limits: list[tuple[int, int | None]] = []

    def evaluate(self, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None) -> Scores:
        assert splits == ("test",)
        self.limits.append((len(client), limit))
        return Scores((rows[:, :1].double() - client[:, None]).abs(), torch.ones(len(client), 1, dtype=torch.int64))


class Own:
    def deployed(self, state: Tensor, client: Tensor) -> Tensor:
        return state[client]


def test_one_row_for_all_is_the_mean_of_all_rows_on_all_data() -> None:
    """Beside the matrix, which is of few clients and few examples."""
    rows = torch.tensor([[0.0, 1.0], [1.0, 1.0], [5.0, 1.0], [10.0, 1.0]])
    engine, layout = Distances(), Layout((Entry("m", "seed", (2,), 0),))
    names = ["a", "b", "c", "d"]
    found = transfer(Own(), engine, rows, layout, names, 0, clients=2, examples=3, limit=None)  # type: ignore[arg-type]
    assert found["mean_row_loss"] == (4 + 3 + 2 + 1) / 4  # the mean row is at 4, the clients at 0, 1, 2, 3
    assert engine.limits == [(2, 3), (2, 3), (4, None)]
    some = transfer(Own(), engine, rows, layout, names, 0, 8, 3, 5, among=torch.tensor([0, 2]))  # type: ignore[arg-type]
    assert some["names"] == ["a", "c"]
    assert some["mean_row_loss"] == (2.5 + 0.5) / 2
    assert engine.limits[-1] == (2, 5)
