"""The experiment and its YAML: what is given comes back, and every mistake is one line that names key and fix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from mira.config import Experiment, differences, dump, load, parse, parse_text, schema
from mira.config import yaml_io as yaml_text
from mira.config.sections import SECTIONS, OneOf
from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT
from mira.core.registry import Registry
from mira.methods import METHODS

MINIMAL: dict[str, Any] = {
    "rounds": 3,
    "model": {"name": "m"},
    "data": {"source": "builtin"},
    "training": {"lr": 1e-3, "local_steps": 4},
}
YAML = """
rounds: 3
model: {name: m}
data: {source: builtin}
training: {lr: 1e-3, local_steps: 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(YAML, encoding="utf-8")
    return path


def refused(**sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse({**MINIMAL, **sections})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    experiment = parse(MINIMAL)
    assert experiment.method == METHODS["mira"]()
    assert experiment.graph.name == "groups"
    assert (experiment.seed, experiment.cohort, experiment.engine.name) == (0, 1.0, "auto")


def test_from_python_with_mappings_or_objects() -> None:
    method = METHODS["mira"](strength=0.25)
    a = Experiment(**MINIMAL, method=method)
    b = Experiment(**MINIMAL, method={"strength": 0.25})
    assert a == b
    assert a.method == method
    with pytest.raises(UserError, match="training: neither of local_steps and local_epochs"):
        Experiment(**{**MINIMAL, "training": {}})


def test_an_experiment_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(MINIMAL).rounds = 4  # type: ignore[misc]


def test_file_overrides_and_back(file: Path, tmp_path: Path) -> None:
    experiment = load(file, ["training.lr=3e-4", "adapter.targets=[q_proj, v_proj]", "engine.prefix=on", "cohort=0.5"])
    assert experiment.training.lr == 3e-4
    assert experiment.adapter.targets == ("q_proj", "v_proj")
    assert experiment.engine.prefix == "on"  # not a boolean, as YAML 1.1 has it
    (tmp_path / "again.yaml").write_text(dump(experiment), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == experiment


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("graph", ["groups", "complete", "random"])
def test_every_variant_survives_the_round_trip(file: Path, method: str, graph: str) -> None:
    needs = ["training.optimizer=sgd"] if method == "scaffold" else []  # it refuses AdamW
    experiment = load(file, [f"method.name={method}", f"graph.name={graph}", *needs])
    assert parse_text(dump(experiment)) == experiment


scalars = st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False) | st.text()


values = st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(), values))
@pytest.mark.slow
def test_yaml_gives_back_what_was_written(values: dict[str, Any]) -> None:
    back = yaml_text.value(yaml_text.write(values), "test")
    assert back == values
    assert json.dumps(back) == json.dumps(values)  # 1 == 1.0 == True, but they are not the same


@settings(deadline=None)
@given(st.text(st.sampled_from("0123456789eE+-._:xon~!&*[]{}#\"' ,\n\tynulTrue"), max_size=12))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        value = yaml_text.value(text, "here")
    except UserError as error:
        value = str(error).startswith("here") and "\n" not in str(error)
    assert value is not False


def test_scalars_are_those_of_yaml_1_2() -> None:
    given = "[1e-4, 1.5, .5, 1_000, -3, true, null, on, no, 010, 1:30, 2024-01-01, 1e, '1']"
    expected = [1e-4, 1.5, 0.5, 1000, -3, True, None, "on", "no", "010", "1:30", "2024-01-01", "1e", "1"]
    assert yaml_text.value(given, "test") == expected


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"round": 3}, "round: unknown key; did you mean 'rounds'?"),
        (
            {"method": {"name": "ffa-lora"}, "adapter": {"kind": "prompt"}},
            "method.name=ffa-lora: needs the factors A and B of LoRA, but this adapter has 'prompt'; "
            "set adapter.kind=lora, or method.name=fedit",
        ),
        (
            {"method": {"factors": "B"}, "adapter": {"kind": "seeds"}},
            "method.factors=B: this adapter has 'seed' and no factors A and B; use factors=all or adapter.kind=lora",
        ),
        (
            {"clients": {"rank": {"ann": 2}}, "adapter": {"kind": "seeds"}},
            "clients.rank.ann=2: ranks belong to adapter.kind=lora; leave clients.rank out",
        ),
        (
            {"clients": {"rank": {"ann": 2}}, "method": {"space": "product"}},
            "method.space=product: needs the same rank for all clients (clients.rank); use space=factors",
        ),
        ({"lr": 3}, "lr: unknown key; did you mean 'training.lr'?"),
        ({"adapter": {"rnak": 3}}, "adapter.rnak: unknown key; did you mean 'rank'?"),
        ({"method": {"name": "mira", "strenght": 0.1}}, "method.strenght: unknown key; did you mean 'strength'?"),
        ({"method": {"strenght": 0.1}}, "method.strenght: unknown key; did you mean 'strength'?"),
        (
            {"method": {"name": "mirra"}},
            f"method.name='mirra': must be one of {', '.join(METHODS)}; did you mean 'mira'?",
        ),
        ({"method": "fedit"}, "method='fedit': must be a section of keys and values"),
        ({"method": {"strength": 2}}, "method.strength=2: must be less than or equal to 1"),
        ({"data": {}}, "data.source: missing; must be one of builtin, dolly, hub, jsonl, memory, natural-instructions, sites"),
        ({"graph": {"name": "file"}}, "graph.path: missing; The CSV file."),
        ({"rounds": None}, "rounds=None: must be a valid integer"),
        ({"rounds": True}, "rounds=True: must be a valid integer"),
        ({"rounds": 0}, "rounds=0: must be greater than or equal to 1"),
        ({"cohort": 0}, "cohort=0: must be greater than 0"),
        ({"adapter": {"dropout": 1.0}}, "adapter.dropout=1.0: must be less than 1"),
        ({"adapter": {"alpha": float("nan")}}, "adapter.alpha=nan: must be a finite number"),
        ({"adapter": {"targets": 3}}, "adapter.targets=3: must be a valid string or must be a list"),
        ({"evaluation": {"every": 0}}, "evaluation.every=0: must be greater than or equal to 1"),
        ({"name": "../x"}, "name='../x': must match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$'"),
        ({"training": 3}, "training=3: must be a section of keys and values"),
        ({"model": {"name": "m" * 500, "dtype": "x" * 500}}, f"model.dtype='{'x' * 37}"),
        ({"a\nb": 1}, "'a\\nb': unknown key"),
        ({"seed": -1, "cohort": 2}, "seed=-1: must be greater than or equal to 0 (and 1 more)"),
        ({"seed": -1, "foo": 2}, "foo: unknown key"),
        (
            {"training": {"lr": 1, "local_steps": 1, "optimizer": "adam"}},
            "training.optimizer='adam': must be 'adamw' or 'sgd'; did you mean 'adamw'?",
        ),
        (
            {"training": {"lr": 1, "local_steps": 1, "local_epochs": 1}},
            "training: both of local_steps and local_epochs given; set exactly one, e.g. local_steps: 4",
        ),
        (
            {"training": {"local_steps": 1, "warmup_rounds": 3}},
            "training.warmup_rounds=3: must be less than rounds=3, or the learning rate never reaches its peak",
        ),
        (
            {"adapter": {"dropout": 0.1}, "engine": {"prefix": "on"}},
            "engine.prefix=on: a shared prefix is computed once, but adapter.dropout=0.1",
        ),
        (
            {"data": {"source": "hub", "path": "x", "partition": {"by": "iid", "client": 3}}},
            "data.partition.client: unknown key; did you mean 'clients'? (and 1 more)",
        ),
        (
            {"data": {"source": "hub", "path": "x", "columns": {"inpt": "x"}, "partition": {"by": "iid"}}},
            "data.columns.inpt: unknown key; did you mean 'input'? (and 1 more)",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_key_given_allowed_and_fix(sections: dict[str, Any], message: str) -> None:
    assert refused(**sections).startswith(message)


def test_what_is_missing_is_said_with_its_meaning() -> None:
    with pytest.raises(UserError, match=r"^rounds: missing; Communication rounds\. \(and 3 more\)$"):
        parse({})


def test_an_empty_section_has_its_defaults() -> None:
    empty = dict.fromkeys(("adapter", "prompt", "method", "graph", "engine", "evaluation"))
    assert parse({**MINIMAL, **empty}) == parse(MINIMAL)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr", "override 'training.lr': must be key=value, for example training.lr=0.001"),
        ("training..lr=1", "override 'training..lr=1': must be key=value"),
        ("rounds.x=1", "override 'rounds.x=1': rounds is a value, not a section"),
        ("training.lr=[1", "override 'training.lr=[1', line 1: not valid YAML"),
        ("training.lrr=1", "training.lrr: unknown key; did you mean 'lr'?"),
        ("x.y.z=1", "x: unknown key"),
    ],
)
def test_a_bad_override_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(file, [override])
    assert str(caught.value).startswith(message)


def test_another_variant_forgets_what_only_the_former_one_knows(file: Path) -> None:
    file.write_text(YAML + "method: {name: mira, strength: 0.3}\n")
    assert load(file, ["method.name=fedit"]).method == METHODS["fedit"]()
    assert load(file, ["method.name=fedit", "method.name=mira"]).method == METHODS["mira"]()
    assert load(file, ["method.name=mira"]).method == METHODS["mira"](strength=0.3)
    file.write_text(YAML + "method: {strength: 0.3}\n")  # mira by default
    assert load(file, ["method.name=fedit"]).method == METHODS["fedit"]()


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.name=fedit", "method.strength=0.3"],
        ["method.strength=0.3", "method.name=fedit"],
        ["method={name: mira, strength: 0.3}", "method.name=fedit"],
    ],
)
def test_a_parameter_given_explicitly_is_never_forgotten(file: Path, overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"method\.strength: unknown key"):
        load(file, overrides)


def test_a_typing_error_in_the_file_is_not_forgotten_with_the_variant(file: Path) -> None:
    file.write_text(YAML + "method: {name: mira, strenght: 0.3}\n")
    with pytest.raises(UserError, match=r"method\.strenght: unknown key"):
        load(file, ["method.name=fedit"])


def test_what_both_variants_know_is_kept(file: Path) -> None:
    file.write_text(YAML.replace("source: builtin", "source: jsonl, path: here"))
    overrides = ["data.source=hub", "data.partition={by: iid, clients: 2}"]
    assert load(file, overrides).data.path == "here"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rounds: 3\nmodel: [\n", "line 3: not valid YAML"),
        (b"rounds: 3\nrounds: 4\n", "line 2: not valid YAML ('rounds' is given twice)"),
        (b"rounds: 3\n4: x\n", "line 2: not valid YAML (a key must be text; put it in quotes)"),
        (b"rounds: 3\nname: \xff\n", "line 2: not UTF-8; save the file as UTF-8"),
        (b"- 1\n", ": must be a mapping such as 'rounds: 3', got a list"),
        (b"a: !!python/object/apply:os.system [ls]\n", "line 1: not valid YAML"),
        (b"a: !!int x\n", ": not valid YAML (a value that does not fit its tag"),
        (b"a: !!timestamp x\n", "line 1: not valid YAML"),
        (b"a: \x00\n", "not valid YAML"),
        (b"[" * 100_000, "not valid YAML (nested too deeply)"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_grows_when_printed_is_no_trap(tmp_path: Path) -> None:
    lines = ["rounds: &a0 [x, x]", *(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "bomb.yaml")
    assert len(str(caught.value)) < 1000


def test_a_missing_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: cannot be read \(No such file or directory\)"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(UserError, match="rounds: missing"):
        load(tmp_path / "empty.yaml")


def test_a_byte_order_mark_is_no_fault(file: Path) -> None:
    file.write_text(YAML, encoding="utf-8-sig")
    assert load(file) == parse(MINIMAL)


def test_differences_name_every_field_that_differs() -> None:
    here = parse(MINIMAL)
    there = parse({**MINIMAL, "training": {"lr": 2e-3, "local_steps": 4}, "method": {"name": "fedit"}, "name": "other"})
    assert differences(here, here) == []
    assert differences(here, there) == [
        'name: "mira" here, "other" there',
        "training.lr: 0.001 here, 0.002 there",
        'method.name: "mira" here, "fedit" there',
        'method.form: "normalised" here, absent there',
        "method.strength: null here, absent there",
        "method.regularisation: 0.001 here, absent there",
        'method.neighbours: "cohort" here, absent there',
        'method.space: "factors" here, absent there',
        'method.factors: "all" here, absent there',
        "method.upper_layers: 1.0 here, absent there",
        "method.strength_end: null here, absent there",
        "method.common_rounds: 0 here, absent there",
    ]


def documented(node: dict[str, Any], where: str) -> list[str]:
    """Fields of the schema at ``where`` that say nothing, by dotted name; tags of variants need no words."""
    return [
        f"{where}.{name}"
        for name, field in node.get("properties", {}).items()
        if not field.keys() & {"description", "$ref", "const", "discriminator"}
    ]


def test_every_field_is_documented_in_the_schema() -> None:
    whole = schema()
    sections = [
        "ModelSection",
        "Lora",
        "VirtualPrompt",
        "Seeds",
        "PromptSection",
        "EngineSection",
        "EvaluationSection",
        "Training",
    ]
    assert documented(whole, "") == []
    assert [name for section in sections for name in documented(whole["$defs"][section], section)] == []
    json.dumps(whole)


def test_one_class_of_several_is_chosen_by_its_tag() -> None:
    @dataclass(frozen=True, config=STRICT)
    class Cat:
        lives: int = 9
        kind: Literal["cat"] = "cat"

    @dataclass(frozen=True, config=STRICT)
    class Dog:
        tricks: Annotated[int, Field(ge=0)] = 0
        kind: Literal["dog"] = "dog"

    animal: TypeAdapter[Any] = TypeAdapter(
        Annotated[Any, OneOf(Registry("animal", "kind", "no.such.group", (), None, {"cat": Cat, "dog": Dog}))]
    )
    assert animal.validate_python({"kind": "dog", "tricks": 2}) == Dog(tricks=2)
    assert animal.validate_python(Cat(lives=1)) == Cat(lives=1)
    with pytest.raises(ValueError, match="lives"):
        animal.validate_python({"kind": "dog", "lives": 2})


@pytest.mark.parametrize("section", SECTIONS)
def test_registries_and_classes_agree_on_names(section: str) -> None:
    registry = SECTIONS[section]
    for name, variant in registry.items():
        default = next(field.default for field in dataclasses.fields(variant) if field.name == registry.tag)
        assert default == name
    assert registry.default is None or registry.default in registry
