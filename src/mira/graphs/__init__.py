"""Graphs: the relations between clients and their weights. One class and one line here for each."""

from mira.core.registry import Registry
from mira.graphs.file import File
from mira.graphs.known import Complete, GroupsGraph
from mira.graphs.random import Random
from mira.graphs.similarity import Knn, LearnedGraph, Similarity

GRAPHS = Registry("graph", "name", "mira.graphs", ("build",), "groups", {
    "groups": GroupsGraph, "complete": Complete, "random": Random, "file": File, "knn": Knn, "similarity": Similarity,
    "learned": LearnedGraph,
})  # fmt: skip
