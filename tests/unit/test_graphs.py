"""Graphs against dense numpy, and what the graph file's reader refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from mira.core import graph as core_graph
from mira.core import similarity
from mira.core.errors import UserError
from mira.core.graph import Edges, Graph, Groups
from mira.core.graph_io import from_tensors, in_use, to_tensors, with_graph
from mira.core.learned_graph import Learned
from mira.core.similarity import SKETCH, choices_among_all, cosines, pairs_above, sketch
from mira.graphs import GRAPHS, Complete, File, GroupsGraph, Knn, Random, Similarity
from mira.graphs.similarity import LearnedGraph

Array = NDArray[np.float64]
Case = tuple[Graph, Array]


@st.composite
def grouped(draw: st.DrawFn) -> Case:
    label = np.array(draw(st.lists(st.integers(0, 4), min_size=1, max_size=8)))
    a = (label[:, None] == label[None, :]).astype(np.float64)
    np.fill_diagonal(a, 0)
    return Groups(torch.from_numpy(label)), a


@st.composite
def weighted(draw: st.DrawFn) -> Case:
    k = draw(st.integers(1, 8))
    upper = draw(arrays(np.float64, (k, k), elements=st.one_of(st.just(0.0), st.floats(0.01, 3))))
    a = np.triu(upper, 1) + np.triu(upper, 1).T
    return Edges.dense(torch.from_numpy(a)), a


cases = st.one_of(grouped(), weighted())


@given(cases, st.data())
def test_weights_and_neighbours_equal_the_dense_matrix(case: Case, data: st.DataObject) -> None:
    graph, a = case
    assert graph.num_clients == len(a)
    some = st.permutations(range(len(a))).flatmap(lambda p: st.integers(0, len(p)).map(lambda n: p[:n]))
    rows, columns = data.draw(some), data.draw(some)
    given_rows = torch.tensor(rows, dtype=torch.int64)
    weights = graph.weights(given_rows, torch.tensor(columns, dtype=torch.int64))
    assert weights.dtype == torch.float64
    np.testing.assert_array_equal(weights, a[np.ix_(rows, columns)])
    assert graph.neighbours(given_rows).tolist() == np.flatnonzero(a[rows].any(0)).tolist()


@given(cases)
def test_the_largest_eigenvalue_and_degree_equal_numpys(case: Case) -> None:
    graph, a = case
    exact = np.linalg.eigvalsh(np.diag(a.sum(1)) - a)[-1]
    # Two LAPACK calls on a matrix of norm below 2 · 7 · 3; a graph without edges has exactly 0.
    assert graph.laplacian_max() == pytest.approx(exact, abs=1e-12)
    assert graph.laplacian_max() == 0 or a.any()
    assert graph.degree_max() == pytest.approx(a.sum(1).max(), abs=1e-12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weighted())
def test_of_many_clients_the_bound_is_never_too_small(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    graph, a = case
    with monkeypatch.context() as patch:
        patch.setattr(core_graph, "_DENSE_LIMIT", 0)
        bound = graph.laplacian_max()
    assert bound >= np.linalg.eigvalsh(np.diag(a.sum(1)) - a)[-1] - 1e-12
    assert bound <= 2 * a.sum(1).max() + 1e-12  # and never worse than Gershgorin's discs


@given(cases)
def test_a_graph_comes_back_from_its_tensors(case: Case) -> None:
    graph, a = case
    back = from_tensors(to_tensors(graph))
    everyone = torch.arange(len(a))
    assert type(back) is type(graph)
    assert back.num_clients == graph.num_clients
    np.testing.assert_array_equal(back.weights(everyone, everyone), a)
    assert graph.updated(0, everyone, torch.zeros(len(a), 1)) is graph


def test_many_clients_cost_their_edges() -> None:
    """A ring of 200 000 clients: a dense matrix would take 320 GB."""
    k = 200_000
    ring = Edges.of(torch.arange(k), (torch.arange(k) + 1) % k, torch.ones(k), k)
    assert ring.weights(torch.tensor([7, 3]), torch.tensor([8, 2, 6])).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert ring.neighbours(torch.tensor([0, 5])).tolist() == [1, 4, 6, k - 1]
    assert (ring.laplacian_max(), ring.degree_max()) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("source", "target", "weight", "message"),
    [
        ([0], [3], [1.0], "outside 0..2"),
        ([-1], [1], [1.0], "outside 0..2"),
        ([1], [1], [1.0], "client 1 has an edge to itself"),
        ([0], [1], [-0.5], "not negative"),
        ([0], [1], [float("nan")], "finite"),
        ([0], [1], [float("inf")], "finite"),
        ([0, 1], [1, 0], [1.0, 1.0], "twice"),
        ([0, 0], [1, 1], [1.0, 2.0], "twice"),
    ],
)
def test_edges_that_make_no_graph_are_refused(
    source: list[int], target: list[int], weight: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Edges.of(torch.tensor(source), torch.tensor(target), torch.tensor(weight), 3)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.0, 1.0], [2.0, 0.0]], "symmetric"),
        ([[0.0, 1.0]], "symmetric"),
        ([[1.0, 1.0], [1.0, 0.0]], "diagonal"),
        ([[0.0, -1.0], [-1.0, 0.0]], "not negative"),
    ],
)
def test_matrices_that_are_no_graph_are_refused(matrix: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Edges.dense(torch.tensor(matrix))


# How graphs are made.


def dense(graph: Graph) -> Array:
    everyone = torch.arange(graph.num_clients)
    return graph.weights(everyone, everyone).numpy()


def test_the_random_graph_is_the_papers() -> None:
    names = [f"c{n}" for n in range(60)]
    a = dense(Random().build(names, [""] * 60, seed=3))
    assert (a == a.T).all()
    assert (a.diagonal() == 0).all()
    off = a[~np.eye(60, dtype=bool)]
    assert ((off == 0) | (off >= 0.25)).all()
    assert (off <= 1).all()
    # The mean of two uniforms is triangular: P(below 0.25) = 2 · 0.25² = 0.125. 1770 pairs: standard deviation 0.008.
    assert (off == 0).mean() == pytest.approx(0.125, abs=0.03)
    np.testing.assert_array_equal(a, dense(Random().build(names, [""] * 60, seed=3)))
    assert (a != dense(Random().build(names, [""] * 60, seed=4))).any()


def test_the_complete_graph() -> None:
    a = dense(Complete().build(["a", "b", "c"], ["", "", ""], 0))
    np.testing.assert_array_equal(a, np.ones((3, 3)) - np.eye(3))


def test_groups_join_clients_with_the_same_label() -> None:
    a = dense(GroupsGraph().build(["a", "b", "c", "d"], ["y", "x", "y", "z"], 0))
    assert sorted(zip(*map(list, np.nonzero(a)), strict=True)) == [(0, 2), (2, 0)]
    assert a[0, 2] == 1


def test_clients_without_a_group_are_named() -> None:
    with pytest.raises(UserError, match=r"graph\.name=groups: 1 of 3 clients .*'b'.*graph\.name=complete"):
        GroupsGraph().build(["a", "b", "c"], ["x", "", "x"], 0)


def test_every_graph_is_registered_under_its_name() -> None:
    assert {name: graph.__dataclass_fields__["name"].default for name, graph in GRAPHS.items()} == {
        n: n for n in GRAPHS
    }


# The user's own graph.

NAMES = ["alpha", "beta, the second", "gamma"]


@pytest.fixture
def edges(tmp_path: Path) -> Callable[[str | bytes], Graph]:
    def build(text: str | bytes) -> Graph:
        path = tmp_path / "edges.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return File(path).build(NAMES, [""] * 3, 0)

    return build


def test_a_file_of_edges(edges: Callable[[str], Graph]) -> None:
    text = 'source,target,weight\ngamma,alpha,0.5\r\n"beta, the second",gamma,2\nalpha,"beta, the second",0\n'
    a = [[0, 0, 0.5], [0, 0, 2], [0.5, 2, 0]]
    assert dense(edges(text)).tolist() == a
    assert dense(edges("\ufeff" + text)).tolist() == a  # as Excel saves it
    assert dense(edges("source,target,weight\n")).tolist() == np.zeros((3, 3)).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1 must be 'source,target,weight'"),
        ("from,to,weight\n", r"line 1 must be 'source,target,weight', got \['from', 'to', 'weight'\]"),
        ("source,target,weight\nalpha,gama,1\n", r"line 2: no client is named 'gama'; did you mean 'gamma'\?"),
        ("source,target,weight\nalpha,gamma,1\nalpha\n", r"line 3: .*3 fields"),
        ("source,target,weight\nalpha,gamma,1,2\n", r"line 2: .*3 fields"),
        ("source,target,weight\nalpha,alpha,1\n", r"line 2: .*'alpha'.* itself"),
        ("source,target,weight\nalpha,gamma,1\ngamma,alpha,2\n", r"line 3: .*'gamma' and 'alpha'.* twice"),
        ("source,target,weight\nalpha,gamma,-1\n", r"line 2: weight '-1' must be a finite number"),
        ("source,target,weight\nalpha,gamma,nan\n", r"line 2: weight 'nan' must be a finite number"),
        ("source,target,weight\nalpha,gamma,inf\n", r"line 2: weight 'inf' must be a finite number"),
        ("source,target,weight\nalpha,gamma,much\n", r"line 2: weight 'much' must be a finite number"),
        ("source,target,weight\nalpha,gamma,\n", r"line 2: weight '' must be a finite number"),
        ('source,target,weight\nalpha,"gam\nma",1\n', r"line 3: no client is named 'gam\\nma'"),
        (b"source,target,weight\nalpha,g\xe4mma,1\n", r"not UTF-8 at byte \d+; save the file as UTF-8"),
        ("source,target,weight\n" + "a" * 200_000 + ",gamma,1\n", r"line 2: field larger"),
    ],
)
def test_a_bad_file_is_one_clear_line(edges: Callable[[str | bytes], Graph], text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        edges(text)
    assert str(refused.value).startswith("graph.path=")
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"graph\.path=.*nowhere\.csv: cannot be read \(No such file"):
        File(tmp_path / "nowhere.csv").build(NAMES, [""] * 3, 0)


# Graphs by likeness, against the formula one pair at a time.


def cosines_np(x: Array) -> Array:
    u = x - x.mean(0)
    norm = np.linalg.norm(u, axis=1)
    size = np.outer(norm, norm)
    return np.divide(u @ u.T, size, out=np.zeros_like(size), where=size > 0)


def alike_np(cosine: Array, most: int, above: float) -> Array:
    """Each row's ``most`` largest entries beyond ``above``, its own aside; the larger where both ends chose."""
    a = np.zeros_like(cosine)
    for k, row in enumerate(cosine):
        others = [n for n in np.argsort(-row, kind="stable") if n != k and row[n] > above]
        for n in others[:most]:
            a[k, n] = row[n] - above
    return np.maximum(a, a.T)


def vectors(clients: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(clients, width)) + 3)


@pytest.mark.parametrize("tile", [1, 7, 2**20])
def test_cosines_equal_the_formula_whatever_the_tile(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_TILE", tile)
    x = vectors(9)
    # Sums of at most 9 products of numbers below 10: rounding far below 1e-12.
    np.testing.assert_allclose(cosines(x), cosines_np(x.numpy()), rtol=0, atol=1e-12)
    flat = torch.ones(3, 5)
    assert cosines(flat).tolist() == [[0.0] * 3] * 3  # all equal their mean: no direction, not NaN


@pytest.mark.parametrize("tile", [1, 7, 2**20])
@pytest.mark.parametrize(("most", "above"), [(1, 0.0), (3, 0.0), (9, 0.2), (2, 0.4)])
def test_nearest_neighbours_equal_the_formula(
    most: int, above: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_TILE", tile)
    x, names = vectors(9), ["c"] * 9
    expected = alike_np(cosines_np(x.numpy()), most, above)
    assert expected.any()
    made = similarity.undirected(choices_among_all(x, most, above), 9)
    np.testing.assert_allclose(dense(made), expected, rtol=0, atol=1e-12)
    if above == 0:
        np.testing.assert_array_equal(dense(Knn(neighbours=most).build(names, names, 0, lambda: x)), dense(made))
    if most == 9:
        np.testing.assert_array_equal(dense(Similarity(threshold=above).build(names, names, 0, lambda: x)), dense(made))


def test_weights_minimise_the_objective_that_is_documented() -> None:
    """No other weights on the same number of neighbours do better: 300 random ones for each of seven clients."""
    x, most, above = vectors(7), 2, 0.1
    cosine = cosines_np(x.numpy())

    def objective(a: Array, k: int) -> float:
        return float((a * (1 - cosine[k]) - (1 - above) * a + a**2 / 2).sum())  # ½‖u_k − u_l‖² = 1 − cos

    source, target, weight = (part.numpy() for part in choices_among_all(x, most, above))
    draw = np.random.default_rng(1)
    for k in range(7):
        ours = np.zeros(7)
        ours[target[source == k]] = weight[source == k]
        for _ in range(300):
            other = np.zeros(7)
            other[draw.choice([n for n in range(7) if n != k], most, replace=False)] = draw.uniform(0, 1, most)
            assert objective(ours, k) <= objective(other, k) + 1e-12


def test_many_descriptions_need_no_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families far apart; what is compared at a time is a tile, not all pairs."""
    k, largest = 3000, 0

    def recorded(cosine: Tensor, *rest: Any) -> Any:
        nonlocal largest
        largest = max(largest, cosine.numel())
        return pairs_above(cosine, *rest)

    monkeypatch.setattr(similarity, "pairs_above", recorded)
    x = torch.zeros(k, 2)
    x[: k // 2, 0], x[k // 2 :, 1] = 1.0, 1.0
    source, target, _ = choices_among_all(x, 2, 0.0)
    assert len(source) == 2 * k
    assert 0 < largest <= similarity._TILE < k * k / 8
    assert bool(((source < k // 2) == (target < k // 2)).all())


def families(seed: int = 0, noise: float = 0.3) -> Tensor:
    """Nine clients in three families: rows of a family move the same way from a common start."""
    draw = np.random.default_rng(seed)
    direction = np.repeat(draw.normal(size=(3, 40)), 3, axis=0)
    return torch.from_numpy(5 + draw.normal(size=40) + direction + noise * draw.normal(size=(9, 40)))


DIRECTION = torch.from_numpy(np.repeat(np.random.default_rng(5).normal(size=(3, 40)), 3, axis=0))
NOISE = 0.3 * torch.from_numpy(np.random.default_rng(6).normal(size=(5, 9, 40)))
FAMILY = np.kron(np.eye(3), np.ones((3, 3))) - np.eye(9)


def test_the_learned_graph_finds_families_it_was_not_told_of() -> None:
    begun = LearnedGraph().build(["c"] * 9, [""] * 9, 0, unused)
    assert not dense(begun).any()
    assert begun.isolated().tolist() == []
    assert isinstance(begun, Learned)
    found = begun.updated(0, torch.arange(9), families())
    np.testing.assert_array_equal(dense(found) > 0, FAMILY > 0)
    unit = families().numpy() / np.linalg.norm(families(), axis=1, keepdims=True)
    # Displacements are kept in float32: cosines of numbers of order 1 are off by a few 1e-7.
    np.testing.assert_allclose(dense(found), alike_np(cosines_np(unit), 3, 0.0), rtol=0, atol=2e-6)
    assert not dense(begun).any(), "it is a value: nothing is changed in place"


def test_only_pairs_with_an_end_in_the_cohort_are_estimated_anew() -> None:
    begun = Learned.start(9, 1, 3, 0.0).updated(0, torch.arange(9), families())
    cohort = torch.tensor([8, 0, 1, 5])
    again = begun.updated(1, cohort, families(noise=0.5)[cohort])
    before, after = dense(begun), dense(again)
    outside = ~np.isin(np.arange(9), cohort)
    pairs = np.outer(outside, outside)
    assert (before[pairs] == after[pairs]).all()
    assert (before[~pairs & (FAMILY > 0)] != after[~pairs & (FAMILY > 0)]).all()
    np.testing.assert_array_equal(after > 0, FAMILY > 0)


def test_clients_that_never_meet_are_compared_whatever_the_length_of_their_histories() -> None:
    """Cohorts {0, 3, 6}, {1, 4, 7} and {2, 5, 8} hold one client of each family, and the first trains three times as often, in
    displacements that shrink."""
    learned = Learned.start(9, 1, 3, 0.0)
    for round, first in enumerate((0, 1, 0, 2, 0)):
        cohort = torch.tensor([6, 0, 3]) + first
        learned = learned.updated(round, cohort, 0.5**round * (DIRECTION + NOISE[round])[cohort])
    np.testing.assert_array_equal(dense(learned) > 0, FAMILY > 0)
    assert learned.rounds.tolist() == [3, 1, 1, 3, 1, 1, 3, 1, 1]


def test_a_displacement_is_kept_as_a_sketch_of_nearly_the_same_cosines() -> None:
    """512 numbers of 100 000: cosines err by 1/√512 = 0.044 in standard deviation, 0.2 is beyond 4 of them."""
    rows = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 100_000)))
    rows[1] += rows[0]
    rows[3] -= 2 * rows[2]
    exact = cosines_np(rows.numpy() / np.linalg.norm(rows, axis=1, keepdims=True))
    kept = sketch(rows)
    assert kept.shape == (6, SKETCH)
    assert kept.dtype == torch.float32
    assert np.abs(cosines_np(kept.double().numpy()) - exact).max() < 0.2
    assert torch.equal(sketch(rows), kept), "the groups are the same in every process"
    assert torch.equal(sketch(torch.zeros(1, 5)), torch.zeros(1, 5))


def test_a_client_never_chooses_more_than_it_may() -> None:
    learned = Learned.start(9, 1, 1, 0.0)
    for seed in range(5):
        cohort = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:5]
        learned = learned.updated(seed, cohort, vectors(9, seed=seed)[cohort])
        assert int(learned.choices[0].bincount().max()) == 1


@pytest.mark.parametrize("cohort", [[], [4], [4, 2]])
def test_less_than_three_clients_tell_nothing_until_others_come(cohort: list[int]) -> None:
    few = Learned.start(9, 1, 3, 0.0).updated(0, torch.tensor(cohort, dtype=torch.int64), families()[cohort])
    assert not dense(few).any()
    rest = torch.tensor([k for k in range(9) if k not in cohort])
    np.testing.assert_array_equal(dense(few.updated(1, rest, families()[rest])) > 0, FAMILY > 0)


def test_a_learned_graph_comes_back_from_its_tensors() -> None:
    learned = Learned.start(9, 2, 3, 0.1).updated(0, torch.arange(9), families())
    assert learned.updated(1, torch.arange(9), families(1)) is learned, "it is the turn of every second round"
    back = from_tensors(to_tensors(learned))
    assert isinstance(back, Learned)
    assert all(torch.equal(getattr(back, name), getattr(learned, name)) for name in ("seen", "rounds", "moved"))
    assert (back.num_clients, back.every, back.most, back.above) == (9, 2, 3, 0.1)
    np.testing.assert_array_equal(dense(back), dense(learned))
    begun, other = to_tensors(Groups(torch.zeros(9, dtype=torch.int64))), {"other": torch.ones(1)}
    for extra, expected in ((other, from_tensors(begun)), (with_graph(other, learned), learned)):
        graph, own = in_use(begun, extra)
        np.testing.assert_array_equal(dense(graph), dense(expected))
        assert own == other


@pytest.mark.parametrize("section", [Knn(source="displacement"), Similarity(source="displacement", threshold=0.2)])
def test_displacement_is_learned_from_the_first_round_on(section: Knn | Similarity) -> None:
    graph = section.build(["c"] * 9, [""] * 9, 0, unused)
    assert isinstance(graph, Learned)
    assert (graph.every, graph.most, graph.above) == ((1, 3, 0.0) if isinstance(section, Knn) else (1, 9, 0.2))


def unused() -> Tensor:
    raise AssertionError("this graph needs no embedding")
