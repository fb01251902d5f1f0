"""Checks that every method, graph, data source and adapter kind must pass, for the tests of a plug-in.

Each function below gives a list of functions without arguments that raise AssertionError, for instance:

    @pytest.mark.parametrize("check", method_checks(HalfWay()), ids=lambda check: check.__name__)
    def test_half_way(check):
        check()

They run in seconds on a CPU: methods over clients of five numbers each, adapters on a random model of 10,000 weights.
Nothing here imports pytest.
"""

from mira.testing.adapters import adapter_checks
from mira.testing.checks import Check
from mira.testing.graphs import graph_checks
from mira.testing.methods import method_checks
from mira.testing.sources import source_checks

__all__ = ["Check", "adapter_checks", "graph_checks", "method_checks", "source_checks"]
