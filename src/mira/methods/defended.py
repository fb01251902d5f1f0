"""A defence against wrong rows under any method whose server step is a mean or a mixture: a wrapper around the method."""

from dataclasses import dataclass, replace
from math import fsum

from torch import Tensor

from mira.core.robust import COUNTED, Defence, Robust, Rule
from mira.core.types import Change, Method, ServerState, Setting, Trained, Work, uses_graph


@dataclass(frozen=True)
class Defended:
    """``method`` with the ``rule`` in its means and mixtures, which find it in the state. What each client's row counted for, as
    a share of its weight without the rule, is in the change."""

    method: Method
    rule: Rule

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def uses_graph(self) -> bool:
        return uses_graph(self.method)

    def init(self, setting: Setting) -> ServerState:
        return self.method.init(setting)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return self.method.broadcast(state, cohort)

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        had, meant = dict[int, list[float]](), dict[int, list[float]]()

        def told(client: Tensor, counted: Tensor, without: Tensor) -> None:
            for weights, found in ((had, counted), (meant, without)):
                for k, weight in zip(client.tolist(), found.sum(0).tolist(), strict=True):
                    weights.setdefault(k, []).append(weight)

        change = self.method.aggregate(replace(state, defence=Defence(self.rule, told)), trained)
        shares = {k: fsum(had[k]) / fsum(meant[k]) for k in sorted(meant) if fsum(meant[k]) > 0}
        return replace(change, of_clients={**change.of_clients, COUNTED: shares}) if shares else change

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return self.method.deployed(state, client)


def defended(method: Method, robust: Robust) -> Method:
    """``method`` with the defence ``robust``."""
    return method if robust == "none" else Defended(method, robust)
