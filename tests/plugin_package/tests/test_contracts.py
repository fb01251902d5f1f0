"""The contracts of MIRA, for the four plug-ins of this package."""

import pytest
from mira_example.adapter import Ia3
from mira_example.graph import Ring
from mira_example.method import HalfWay
from mira_example.source import Sums

from mira.testing import adapter_checks, graph_checks, method_checks, source_checks

CHECKS = [*method_checks(HalfWay()), *graph_checks(Ring()), *source_checks(Sums()), *adapter_checks(Ia3())]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_its_contract(check):
    check()
