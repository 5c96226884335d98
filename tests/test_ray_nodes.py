"""How many workers each node of a cluster gets, from the study's `resources` and from what the nodes have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.execution.ray_nodes import (
    Node,
    count_workers,
    cpus_of_worker,
    plan_workers,
    refuse_more,
    what_a_worker_needs,
)
from sweep.study.errors import FieldError
from sweep.study.schema import Resources


def node(cpus: float, gpus: float = 0.0) -> Node:
    return Node(f"{cpus}-{gpus}", "10.0.0.1", cpus, gpus)


def shares(asked: dict[str, Any], *nodes: Node) -> list[tuple[int, float]] | None:
    """Of each node the workers that it holds, and the CPUs that each of them gets."""
    plan = plan_workers(Resources(**asked), nodes)
    return plan and [(count_workers(plan, n), cpus_of_worker(plan, n)) for n in nodes]


@pytest.mark.parametrize(
    ("asked", "nodes", "expected"),
    [
        ({}, [node(8), node(4)], [(1, 8), (1, 4)]),  # on CPUs one a node, with all of them
        ({}, [node(0), node(4)], [(0, 0), (1, 4)]),  # a head that is to run nothing
        ({}, [node(8), node(16, 4)], [(0, 8), (4, 4)]),  # one a GPU; a node without any is left out
        ({}, [node(2, 4)], [(4, 0)]),  # fewer CPUs than GPUs
        ({"gpus": 0.5}, [node(16, 2)], [(4, 4)]),
        ({"gpus": 0.4}, [node(16, 2)], [(4, 4)]),  # a fifth of each GPU is left: no share lies on two
        ({"gpus": 1.0, "cpus": 8.0}, [node(16, 4)], [(2, 8)]),
        ({"gpus": 0.0}, [node(16, 4)], [(1, 16)]),
        ({"gpus": 1.0}, [node(8)], [(0, 8)]),  # waits for a node that has one
        ({"cpus": 2.0}, [node(8), node(5)], [(4, 2), (2, 2)]),
        ({"workers": 2}, [node(8)], [(2, 4)]),
        ({"workers": 2}, [node(8), node(8)], [(1, 8), (1, 8)]),
        ({"workers": 4}, [node(8), node(2)], [(4, 2), (1, 2)]),
        ({"workers": 16}, [node(2)], [(16, 0.125)]),
        ({"workers": 2}, [node(0), node(1)], [(0, 0.5), (2, 0.5)]),
    ],
)
def test_workers_share_what_the_nodes_have(
    asked: dict[str, Any], nodes: list[Node], expected: list[tuple[int, float]]
) -> None:
    assert shares(asked, *nodes) == expected


@pytest.mark.parametrize("asked", [{}, {"workers": 2}])
def test_nothing_is_decided_before_a_node_could_run_something(asked: dict[str, Any]) -> None:
    assert plan_workers(Resources(**asked), [node(0)]) is None


@given(st.lists(st.integers(0, 64), min_size=1, max_size=6).filter(any), st.integers(1, 40))
def test_as_many_workers_fit_as_are_asked_for(cpus: list[int], workers: int) -> None:
    nodes = [node(n) for n in cpus]
    plan = plan_workers(Resources(workers=workers), nodes)
    assert plan is not None and plan.cpus is not None
    assert sum(count_workers(plan, n) for n in nodes) >= workers
    assert plan.cpus < 1 or plan.cpus == int(plan.cpus), "Ray takes whole CPUs, or a part of one"
    for n in nodes:
        assert count_workers(plan, n) * plan.cpus <= n.cpus + 1e-6


def test_a_machine_that_nothing_will_join_must_hold_what_is_asked_for() -> None:
    for fitting in (None, Resources(), Resources(workers=40), Resources(workers=4, cpus=2.0), Resources(gpus=0.0)):
        refuse_more(fitting, node(8))
    for asked, field, wanted in [
        (Resources(gpus=1.0), "resources.gpus", "1 worker with 1 GPU"),
        (Resources(cpus=16.0), "resources.cpus", "1 worker with 16 CPUs"),
        (Resources(workers=5, cpus=2.0), "resources.workers", "5 workers with 2 CPUs"),
    ]:
        with pytest.raises(FieldError) as caught:
            refuse_more(asked, node(8))
        assert caught.value.problems == ((field, f"{wanted} each are more than this machine has: 8 CPUs"),)


def test_what_a_worker_needs_is_told_in_words() -> None:
    assert what_a_worker_needs(None) == "a GPU or a CPU"
    assert what_a_worker_needs(Resources(gpus=0.5, cpus=1.0)) == "0.5 GPUs and 1 CPU"
    assert what_a_worker_needs(Resources(gpus=1.0)) == "1 GPU"
    assert what_a_worker_needs(Resources(gpus=0.0)) == "a CPU"
