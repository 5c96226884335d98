"""What a spectrum and two subspaces come to: known answers, NumPy's, and what must hold of any matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep.adapters.subspaces import other_seeds, steps
from sweep.lora.lowrank import lost_share, update_parts
from sweep.lora.spectra import (
    amplification,
    dense_parts,
    effective_rank,
    kept_rank,
    projected_norm,
    random_rows,
    row_space,
    similarity,
)

SEEDS = st.integers(0, 2**31)
VALUES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_effective_rank_of_k_equal_values_is_k(k: int) -> None:
    values = torch.cat([torch.full((k,), 0.7), torch.zeros(4)])
    assert effective_rank(values) == pytest.approx(k)
    assert effective_rank(torch.zeros(3)) == 0.0


@settings(max_examples=60, deadline=None)
@given(VALUES, st.floats(0.1, 10))
def test_effective_rank_is_numpys_entropy_whatever_the_scale(values: list[float], scale: float) -> None:
    share = np.array(values) / np.sum(values)
    expected = float(np.exp(-(share * np.log(share)).sum()))
    assert effective_rank(scale * torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected, rel=1e-9)
    assert 1 - 1e-9 <= expected <= len(values) + 1e-9


def test_kept_rank_by_hand() -> None:
    values = torch.tensor([2.0, 1.0, 1.0])  # squares 4, 1, 1: shares 0.67, 0.83, 1
    assert [kept_rank(values, share) for share in (0.5, 0.66, 0.7, 0.84, 0.99)] == [1, 1, 2, 3, 3]
    assert kept_rank(torch.zeros(2), 0.9) == 0


@settings(max_examples=60, deadline=None)
@given(VALUES, st.floats(0.05, 0.95))
def test_kept_rank_is_the_smallest_that_loses_no_more(values: list[float], share: float) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    k = kept_rank(S, share)
    assert lost_share(S, k) <= 1 - share + 1e-9
    assert k == 1 or lost_share(S, k - 1) > 1 - share - 1e-9


def test_similarity_of_equal_and_of_orthogonal_spaces() -> None:
    rows = torch.linalg.qr(gaussian(9, 6, seed=1))[0].T  # 6 orthonormal rows
    same = similarity(rows[:3], rows[:3])
    expected = [[min(i, j) / min(i, j) for j in (1, 2, 3)] for i in (1, 2, 3)]
    np.testing.assert_allclose(same, expected, atol=1e-12)
    np.testing.assert_allclose(similarity(rows[:3], rows[3:]), np.zeros((3, 3)), atol=1e-12)
    turned = similarity(rows[:2], rows[[1, 0]])  # the same space, its directions in another order
    np.testing.assert_allclose(turned, [[0, 1], [1, 1]], atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), SEEDS)
def test_similarity_is_numpys_and_between_0_and_1(r: int, q: int, seed: int) -> None:
    one, other = gaussian(r, 12, seed=seed), gaussian(q, 12, seed=seed + 1)
    phi = similarity(row_space(one), row_space(other)).numpy()
    V, W = (np.linalg.svd(A.numpy(), full_matrices=False)[2] for A in (one, other))
    for i in range(1, r + 1):
        for j in range(1, q + 1):
            expected = np.linalg.norm(V[:i] @ W[:j].T) ** 2 / min(i, j)
            assert phi[i - 1, j - 1] == pytest.approx(expected, abs=1e-9)
    assert phi.min() >= -1e-12 and phi.max() <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), SEEDS)
def test_similarity_does_not_see_how_a_is_written(r: int, seed: int) -> None:
    """A rotation RA leaves A's singular directions, any invertible R its space."""
    A, other = gaussian(r, 12, seed=seed), row_space(gaussian(5, 12, seed=seed + 1))
    rotation = torch.linalg.qr(gaussian(r, r, seed=seed + 2))[0]
    before, after = similarity(row_space(A), other), similarity(row_space(rotation @ A), other)
    np.testing.assert_allclose(after, before, atol=1e-6)
    mixed = torch.tril(gaussian(r, r, seed=seed + 3)).fill_diagonal_(2.0)
    np.testing.assert_allclose(similarity(row_space(mixed @ A), other)[-1], before[-1], atol=1e-6)


def test_random_directions_share_what_chance_gives() -> None:
    """E φ(i, j) = max(i, j) / I of directions drawn at random."""
    generator, I = torch.Generator().manual_seed(0), 60  # noqa: E741
    phi = torch.stack(
        [similarity(random_rows(4, I, generator), random_rows(12, I, generator)) for _ in range(300)]
    ).mean(0)
    expected = [[max(i, j) / I for j in range(1, 13)] for i in range(1, 5)]
    np.testing.assert_allclose(phi, expected, atol=0.012)


def test_amplification_by_hand_and_by_numpy() -> None:
    W = torch.diag(torch.tensor([5.0, 0.5, 2.0]))
    update = torch.zeros(3, 3)
    update[1, 1] = 3.0  # strengthens a direction that W hardly has
    assert amplification(dense_parts(update, 1), W, 1) == pytest.approx(6.0)
    assert amplification(dense_parts(torch.zeros(3, 3), 1), W, 1) is None

    A, B, W = gaussian(4, 10, seed=1), gaussian(7, 4, seed=2), gaussian(7, 10, seed=3)
    U, S, Vh = np.linalg.svd(0.5 * (B @ A).numpy())
    for k in (1, 2, 4):
        inside = np.linalg.norm(U[:, :k].T @ W.numpy() @ Vh[:k].T)
        parts = update_parts(A, B, 0.5)
        assert projected_norm(W, parts[0][:, :k], parts[2][:k]) == pytest.approx(inside)
        assert amplification(parts, W, k) == pytest.approx(np.linalg.norm(S) / inside)


def test_pairs_are_of_other_seeds_and_use_each_once() -> None:
    assert other_seeds([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 1)]
    assert other_seeds([1, 2], [1, 2]) == [(1, 2), (2, 1)]
    assert other_seeds([1], [1]) == [(1, 1)] and other_seeds([2], [1, 2, 3]) == [(2, 1)]


def test_steps_end_where_the_rank_does() -> None:
    assert steps(3) == [1, 2, 3] and steps(64) == [*range(1, 9), 12, 16, 24, 32, 48, 64] and steps(10)[-2:] == [8, 10]
