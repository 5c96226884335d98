"""Updates by their singular parts, against NumPy's decomposition of the dense product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep.lora.lowrank import factors, lost_share, update_parts, weighted_sum

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))


def draw(r: int, inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_parts_are_those_of_the_dense_update(sizes: tuple[int, int, int, int]) -> None:
    A, B = draw(*sizes)
    U, S, Vh = update_parts(A, B, 1.5)
    dense = 1.5 * B.double().numpy() @ A.double().numpy()
    np.testing.assert_allclose((U * S) @ Vh, dense, atol=1e-10)
    expected = np.linalg.svd(dense, compute_uv=False)[: len(S)]
    np.testing.assert_allclose(S, expected, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_smaller_rank_loses_what_numpy_says(rank: int) -> None:
    A, B = draw(6, 20, 15, seed=3)
    parts = update_parts(A, B, 0.5)
    small_A, small_B = factors(parts, rank, scaling=2.0)
    assert small_A.shape == (rank, 20) and small_B.shape == (15, rank)
    dense = 0.5 * B.double().numpy() @ A.double().numpy()
    U, S, Vh = np.linalg.svd(dense, full_matrices=False)
    nearest = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    np.testing.assert_allclose(2.0 * small_B.double() @ small_A.double(), nearest, atol=1e-5)
    assert lost_share(parts[1], rank) == pytest.approx(((dense - nearest) ** 2).sum() / (dense**2).sum(), abs=1e-12)


def test_no_update_loses_nothing() -> None:
    parts = update_parts(torch.randn(4, 8), torch.zeros(6, 4), 2.0)
    assert lost_share(parts[1], 1) == 0.0


def test_a_weighted_sum_is_exact() -> None:
    one, other = draw(2, 7, 5, seed=1), draw(5, 7, 5, seed=2)
    A, B = weighted_sum([(*one, 0.7), (*other, -0.3)])
    dense = 0.7 * one[1].double() @ one[0].double() - 0.3 * other[1].double() @ other[0].double()
    assert A.shape == (7, 7) and B.shape == (5, 7)
    np.testing.assert_allclose(B.double() @ A.double(), dense, atol=1e-5)
