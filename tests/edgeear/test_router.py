"""Routing: discriminant analysis by definition, fair between domains, and right on domains that can be told apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeear.memory import DomainMemory, learn
from edgeear.router import FLOOR, SHRINKAGE, by_domain, router
from edgeear.types import F32

M = 6


def cloud(n: int, seed: int, at: float = 0.0, draw: int = 0) -> F32:
    """`n` correlated points in 16 dimensions around `at` on an axis; axis and correlations follow from `seed`."""
    mix = np.eye(16) + 0.3 * np.random.default_rng(seed).normal(size=(16, 16))
    x = np.random.default_rng([seed, draw]).normal(size=(n, 16)) @ mix
    x[:, seed % M] += at
    return x.astype(np.float32)


def memory(h: F32) -> DomainMemory:
    return learn(h, np.arange(len(h)) % 2, ("a", "b"), M)


def test_scores_are_linear_discriminant_analysis() -> None:
    clouds = [cloud(50, 0, 2), cloud(20, 1, 2), cloud(90, 2, 2)]
    heads = [c[:, :M].astype(np.float64) for c in clouds]
    within = sum(np.cov(x.T, bias=True) for x in heads) / 3
    diagonal = np.diag(np.diag(within))
    ratio = SHRINKAGE[0] + SHRINKAGE[1] * M / (M + 3 * 20)
    shrunk = (1 - ratio) * within + ratio * diagonal + FLOOR * np.trace(within) / M * np.eye(M)
    inverse = np.linalg.inv(shrunk)
    x = cloud(30, 3)
    expected = np.empty((30, 3))
    for k, own in enumerate(heads):
        z = x[:, :M] - own.mean(0)
        expected[:, k] = -0.5 * np.einsum("ni,ij,nj->n", z, inverse, z)
    got = router([memory(c) for c in clouds]).scores(x)
    # The quadratic term is common to all domains: discriminants agree up to a constant for each input.
    np.testing.assert_allclose(got - got[:, :1], expected - expected[:, :1], rtol=1e-3, atol=1e-3)


def test_one_domain_takes_everything() -> None:
    x = cloud(40, 0)
    alone = router([memory(x)])
    assert alone.scores(x).shape == (40, 1)
    np.testing.assert_array_equal(alone.route(x * 100), np.zeros(40))


def test_the_whole_hypervector_or_its_first_coordinates_route_alike() -> None:
    one = router([memory(cloud(40, s, 3)) for s in range(3)])
    x = cloud(25, 5)
    np.testing.assert_array_equal(one.scores(x), one.scores(x[:, :M]))


@given(st.permutations(range(4)), st.integers(0, 50))
def test_order_of_domains_does_not_matter(order: list[int], seed: int) -> None:
    memories = [memory(cloud(30, s, 2)) for s in range(4)]
    x = cloud(20, seed)
    straight, shuffled = router(memories), router([memories[i] for i in order])
    np.testing.assert_allclose(shuffled.scores(x), straight.scores(x)[:, order], rtol=1e-3, atol=1e-3)
    best = np.sort(straight.scores(x), axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-2
    assert clear.any()
    np.testing.assert_array_equal(np.array(order)[shuffled.route(x)][clear], straight.route(x)[clear])


def test_domains_count_equally_however_many_samples_each_has() -> None:
    few, many = cloud(20, 0, 2), cloud(20, 1, 2)
    repeated = np.tile(many, (50, 1))
    x = cloud(60, 4)
    fair, lopsided = router([memory(few), memory(many)]), router([memory(few), memory(repeated)])
    np.testing.assert_allclose(lopsided.scores(x), fair.scores(x), rtol=1e-3, atol=1e-3)


def test_a_memory_without_spread_still_routes() -> None:
    flat = [memory(np.full((5, 16), v, np.float32)) for v in (0.0, 1.0)]
    x = np.repeat(np.array([[0.1], [0.9]], np.float32), 16, axis=1)
    np.testing.assert_array_equal(router(flat).route(x), [0, 1])


@pytest.mark.parametrize("domains", [2, 6])
def test_separable_domains_are_told_apart(domains: int) -> None:
    memories = [memory(cloud(200, s, 12)) for s in range(domains)]
    one = router(memories)
    for s in range(domains):
        assert (one.route(cloud(500, s, 12, draw=1)) == s).mean() >= 0.99


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_contenders_by_domain_cover_every_place_once(samples: int, domains: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    contenders = np.argsort(rng.random((samples, domains)), axis=1)[:, :3]
    seen, times = np.full(contenders.shape, -1), np.zeros(contenders.shape, int)
    asked = list(by_domain(contenders))
    for k, where in asked:
        seen[where] = k
        times[where] += 1
    np.testing.assert_array_equal(seen, contenders)
    assert (times == 1).all() and len({k for k, _ in asked}) == len(asked)
