"""Comparison files, and the runs of a comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mira import config
from mira.comparison.grid import Grid, Point, beyond, points, size
from mira.config import Experiment
from mira.config.overrides import override
from mira.config.validation_errors import explain
from mira.config.yaml_io import read
from mira.core.errors import UserError, did_you_mean
from mira.core.pydantic_config import STRICT, Count, UserPath

Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]

# Sections in which entries may differ, except for the training keys that decide the order of examples; and one key more: training
# by forward passes alone needs float32, which would cost the other entries twice their time.
_OWN = ("method", "graph", "adapter", "training")
_PRECISION = "model.dtype"
_SHARED = ("training.local_steps", "training.local_epochs", "training.batch_size")


class Resources(BaseModel):
    """The share of a machine that each run may use."""

    model_config = ConfigDict(**STRICT, frozen=True)

    cpus: Count | None = None
    """Threads of a run, where engine.threads sets none; null: the cores, divided by the runs that fit on a machine at a time."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a run; a fraction, such as 0.5, is that part of the memory of one. null: one where there is any."""
    memory: Annotated[float, Field(gt=0)] | None = None
    """GB of memory of a run, weights included; null: the memory of the machine, divided by the runs that its cores allow."""


class Primary(BaseModel):
    """Comparisons that were chosen before the first run, and whose p values are corrected for their number."""

    model_config = ConfigDict(**STRICT, frozen=True)

    entry: str
    """The entry of the claim."""
    against: Annotated[list[str], Field(min_length=1)]
    """The entries that it is compared with."""
    margin: Annotated[float, Field(ge=0)] | None = None
    """null: the claim is a lower loss. A number: the claim is a mean loss not higher by this share of the other's, e.g. 0.02."""


class Comparison(BaseModel):
    """Entries × grid × seeds over one experiment."""

    model_config = ConfigDict(**STRICT, frozen=True)

    base: UserPath | None = None
    """The common experiment: a YAML file, relative to this one. Give this or experiment."""
    experiment: dict[str, Any] | None = None
    """The common experiment, inline."""
    set: dict[str, Any] = {}
    """Dotted keys to set in the experiment of all entries."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """The reported seeds: of every entry, at its chosen point of the grid."""
    tune_seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    """The seeds for every point of the grid; null: seeds. Other seeds than those keep the choice apart from the report."""
    grid: Grid = {}
    """Dotted key -> values to try; every combination is a point. All entries have the same grid."""
    extend: Annotated[int, Field(strict=True, ge=0, le=8)] = 0
    """Points by which a grid of one number may grow beyond each end: as long as the end is the best one, the next point is in the
    ratio of the last two."""
    entries: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name of an entry -> the dotted keys that it sets, in method, graph, adapter and training. An entry may have its own grid
    with the same number of points, e.g. for steps of another scale."""
    against: list[str] | None = None
    """The baselines that all entries are tested against; null: all entries."""
    primary: list[Primary] = []
    """The comparisons that the file is about."""
    resources: Resources = Resources()
    """The share of a machine that each run may use."""

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        if (self.base is None) == (self.experiment is None):
            raise UserError("base: give the experiment either as base, a YAML file, or under experiment")
        for key in ("seeds", "tune_seeds", "against"):
            values = getattr(self, key) or []
            if len(set(values)) < len(values):
                raise UserError(f"{key}={values}: has a repeated value")
        named = [("against", name) for name in self.against or []]
        for n, each in enumerate(self.primary):
            named += [(f"primary[{n}].entry", each.entry), *((f"primary[{n}].against", name) for name in each.against)]
        for key, name in named:
            if name not in self.entries:
                raise UserError(f"{key}: no entry '{name}'{did_you_mean(name, self.entries)}")
        pairs = [(each.entry, name) for each in self.primary for name in each.against]
        for entry, other in pairs:
            if entry == other or pairs.count((entry, other)) > 1:
                what = "with itself" if entry == other else f"with '{other}' twice"
                raise UserError(f"primary: compares '{entry}' {what}; name each pair of different entries once")
        self._check_keys()
        return self

    def _check_keys(self) -> None:
        for place, keys in [
            ("grid", self.grid),
            *((f"entries.{name}.grid", self.grid_of(name)) for name in self.entries),
            *((f"entries.{name}", self.sets(name)) for name in self.entries),
        ]:
            for key in keys:
                own = key.split(".")[0] in _OWN and key not in _SHARED and key != "training"
                if not own and key != _PRECISION:
                    raise UserError(
                        f"{place}.{key}: must be the same for all entries, which see the same data in the same order; entries"
                        f" may differ in method, graph, adapter, training (except {', '.join(_SHARED)}) and {_PRECISION};"
                        " set it under set"
                    )
        wanted = size(self.grid)
        for name in self.entries:
            for key, values in self.grid_of(name).items():
                if len(set(map(_text, values))) < len(values):
                    raise UserError(
                        f"grid.{key}={values}: has a repeated value; every entry has the same number of points"
                    )
            if size(self.grid_of(name)) != wanted:
                raise UserError(
                    f"entries.{name}.grid: {size(self.grid_of(name))} points, but the others have {wanted}; every entry"
                    " has the same number of points"
                )
            if both := sorted(set(self.grid_of(name)) & set(self.sets(name))):
                raise UserError(f"entries.{name}.{both[0]}: is in the grid too; set it in one of the two")
        slugs = [slug(name) for name in self.entries]
        for name, place in zip(self.entries, slugs, strict=True):
            if not place or slugs.count(place) > 1:
                raise UserError(f"entries.{name}: gives no unique folder name ('{place}'); use other letters or digits")

    def grid_of(self, entry: str) -> Grid:
        own = self.entries[entry].get("grid", self.grid)
        if not isinstance(own, dict) or not all(isinstance(values, list) and values for values in own.values()):
            raise UserError(f"entries.{entry}.grid={own!r}: must be dotted keys, each with a list of values")
        return own

    def sets(self, entry: str) -> dict[str, Any]:
        return {key: value for key, value in self.entries[entry].items() if key != "grid"}


@dataclass(frozen=True)
class Job:
    """One run of a comparison. ``folder``: relative to the comparison's folder."""

    entry: str
    point: Point
    seed: int
    experiment: Experiment
    folder: Path


@dataclass(frozen=True)
class Plan:
    """A comparison with all of its possible runs; all configurations are valid."""

    name: str
    comparison: Comparison
    base: Experiment  # without the settings of entries, grid and seeds
    jobs: Mapping[str, Sequence[Sequence[Job]]]  # entry -> point -> one job for each reported and tuning seed
    beyond: Mapping[str, tuple[Sequence[Sequence[Job]], Sequence[Sequence[Job]]]] = field(default_factory=dict)
    """Entry -> points below and above its grid, from the inside to the outside, that it may be extended by."""

    def every_job(self) -> Iterator[Job]:
        """All possible runs."""
        for name, inside in self.jobs.items():
            for by_point in (inside, *self.beyond.get(name, ())):
                yield from (job for jobs in by_point for job in jobs)

    @property
    def tune_seeds(self) -> list[int]:
        return self.comparison.tune_seeds or self.comparison.seeds

    @property
    def baselines(self) -> list[str]:
        return self.comparison.against or list(self.jobs)

    @property
    def other_seeds(self) -> list[int]:
        """The reported seeds that tune nothing: they are run at the chosen point alone."""
        return [seed for seed in self.comparison.seeds if seed not in self.tune_seeds]

    @property
    def total(self) -> int:
        """The number of runs: the tuning seeds at every point, and the other seeds at the chosen point."""
        return sum(len(points) * len(self.tune_seeds) + len(self.other_seeds) for points in self.jobs.values())


def load(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a comparison file. ``overrides`` change the experiment of all entries. Raises UserError."""
    comparison = parse(read(path))
    values = comparison.experiment if comparison.base is None else read(path.parent / comparison.base)
    common = override(values or {}, [*_texts(comparison.set), *overrides])
    for text in overrides:
        key = text.partition("=")[0].strip()
        if any(key in comparison.grid_of(name) or key in comparison.sets(name) for name in comparison.entries):
            raise UserError(f"override '{text}': entries or grid set {key}; change it there")
    if "seed" in {text.partition("=")[0].strip() for text in [*_texts(comparison.set), *overrides]}:
        raise UserError("seed: give the seeds of a comparison in seeds")
    base = config.parse(common)
    if base.privacy is not None and not base.privacy.exact:
        raise UserError(
            f"privacy.metrics={base.privacy.metrics}: a comparison measures losses as they are, to choose by them; set"
            " privacy.metrics=exact, or use mira run"
        )
    jobs, outside = {}, {}
    for name in comparison.entries:
        grid = comparison.grid_of(name)
        jobs[name] = [_jobs(comparison, common, name, point) for point in points(grid)]
        lower, upper = (_possible(comparison, common, name, side) for side in beyond(grid, comparison.extend))
        outside[name] = lower, upper
    return Plan(path.stem, comparison, base, jobs, outside)


def parse(values: Mapping[str, Any]) -> Comparison:
    """The comparison of ``values``. Raises UserError, one line for the first error."""
    try:
        return Comparison(**values)
    except ValidationError as error:
        raise UserError(explain(error, values, Comparison.model_json_schema())) from None


def shown(settings: Mapping[str, Any]) -> str:
    """``settings`` as text: 'training.lr=0.001, method.strength=0.5', as for --set."""
    return ", ".join(_texts(settings))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]


def _jobs(comparison: Comparison, common: Mapping[str, Any], entry: str, point: Point) -> list[Job]:
    try:
        mine = override(common, _texts(comparison.sets(entry)))
        seeds = dict.fromkeys([*comparison.seeds, *(comparison.tune_seeds or ())])
        return [_job(mine, entry, point, seed) for seed in seeds]
    except UserError as error:
        raise UserError(f"entries.{entry}: {error}") from None


def _possible(comparison: Comparison, common: Mapping[str, Any], entry: str, side: Sequence[Point]) -> list[list[Job]]:
    """The jobs of the points of ``side`` up to the first that the configuration does not allow, e.g. a strength above 1."""
    found: list[list[Job]] = []
    for point in side:
        try:
            found.append(_jobs(comparison, common, entry, point))
        except UserError:
            break
    return found


def _job(values: Mapping[str, Any], entry: str, point: Point, seed: int) -> Job:
    """A job that does not read the test split, which is read once the point is chosen."""
    experiment = config.parse(override(values, [*_texts(point), f"seed={seed}", "evaluation.test=false"]))
    return Job(entry, point, seed, experiment, Path("runs", slug(entry), _folder(point), f"seed-{seed}"))


def _folder(point: Point) -> str:
    """A unique folder name, e.g. 'training.lr=0.001'; with a digest where the settings cannot be written in full."""
    text = ",".join(_texts(point)) or "only"
    safe = re.sub(r"[^A-Za-z0-9.=,_-]", "_", text)[:100]
    return safe if safe == text else f"{safe}-{blake2b(text.encode(), digest_size=4).hexdigest()}"


def _texts(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Any) -> str:
    """A value in YAML; a word without quotes."""
    word = isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z_-]*", value)
    plain = word and value.lower() not in ("true", "false", "null")
    return value if plain else json.dumps(value, ensure_ascii=False)  # JSON is YAML
