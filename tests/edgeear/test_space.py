"""Hypervectors: golden numbers, the algebra of binding and bundling, refusals, and parity with torchhd."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptors.hadamard import fwht, permutation, signs
from edgeear.errors import DataError, UsageError
from edgeear.levels import SCALE, projection, shares
from edgeear.space import CHUNK, HypervectorSpace, SpacePolicy
from edgeear.types import F32, Tap

TAPS = (Tap("stem", (16,)), Tap("body", (24,)), Tap("head", (300,)))
POLICY = SpacePolicy(dimensions=256, seed=3, levels=0)


def features(samples: int, seed: int = 0) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    return {t.name: rng.normal(1, 2, (samples, t.channels)).astype(np.float32) for t in TAPS}


def test_seeded_numbers_are_the_same_for_ever() -> None:
    assert signs(7, "role/head.mean", 12).tolist() == [-1, 1, -1, 1, 1, -1, -1, 1, 1, -1, 1, -1]
    assert permutation(7, "place/head.mean", 12).tolist() == [8, 11, 10, 7, 1, 9, 2, 6, 4, 0, 3, 5]
    assert sorted(permutation(1, "x", 1000)) == list(range(1000))
    assert abs(signs(1, "x", 4096).sum()) < 256


@pytest.mark.parametrize("n", [1, 2, 8, 128, 2048])
def test_transform_is_orthonormal_symmetric_and_has_constant_modulus(n: int) -> None:
    matrix = fwht(np.eye(n, dtype=np.float32))
    np.testing.assert_allclose(np.abs(matrix), n**-0.5, rtol=1e-5)
    np.testing.assert_array_equal(matrix, matrix.T)
    x = np.random.default_rng(0).normal(size=(3, 2, n)).astype(np.float32)
    np.testing.assert_allclose(fwht(fwht(x)), x, atol=1e-5)
    np.testing.assert_allclose(fwht(x), x @ matrix, atol=1e-4)


def test_transform_is_the_sylvester_one() -> None:
    expected = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32) / 2
    np.testing.assert_array_equal(fwht(np.eye(4, dtype=np.float32)), expected)


@pytest.mark.parametrize("n", [0, 3, 1000])
def test_transform_refuses_other_lengths(n: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        fwht(np.zeros((1, n), np.float32))


@pytest.mark.parametrize("d", [2, 4, 8, 64, 128, 256, 1024])
def test_encoding_is_the_sum_of_bound_projected_taps(d: int) -> None:
    space, given_features = HypervectorSpace(TAPS, SpacePolicy(dimensions=d, seed=3, levels=0)), features(2)
    full = fwht(np.eye(d, dtype=np.float32))
    code, expected = space.code(given_features), np.zeros((2, d))
    for i, (flat, sign) in enumerate(zip(space.index, space.sign, strict=True)):
        slot, place = divmod(int(flat), d)
        row = sign * full[place] * space.roles[slot] * space.weights[slot]
        expected += code[:, i : i + 1] * row
    np.testing.assert_allclose(space.encode(given_features), expected, atol=1e-5)


def test_code_is_direction_and_scaled_log_magnitude() -> None:
    space = HypervectorSpace([Tap("a", (4,))], SpacePolicy(dimensions=16, magnitude_scale=0.5, levels=0))
    x = np.array([[2, 2, 2, 2]], np.float32)
    np.testing.assert_allclose(space.code({"a": x})[0], [0.5, 0.5, 0.5, 0.5, 0.5 * np.log(2)], rtol=1e-6)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_one_tap_keeps_norms_and_inner_products(channels: int, seed: int) -> None:
    space = HypervectorSpace([Tap("a", (channels,))], SpacePolicy(dimensions=256, seed=seed, levels=0))
    x = np.random.default_rng(seed).normal(size=(5, channels)).astype(np.float32)
    code, h = space.code({"a": x}), space.encode({"a": x})
    np.testing.assert_allclose(h @ h.T, code @ code.T, atol=1e-4)


def test_unbind_inverts_one_slot_and_estimates_among_many() -> None:
    x = features(4)
    alone = HypervectorSpace(TAPS[:1], POLICY)
    direction = x["stem"] / np.linalg.norm(x["stem"], axis=1, keepdims=True)
    np.testing.assert_allclose(alone.unbind(alone.encode(x), "stem"), direction, atol=1e-5)
    space = HypervectorSpace(TAPS[:2], SpacePolicy(dimensions=4096, levels=0))
    estimate = space.unbind(space.encode(x), "stem")
    assert np.sum(estimate * direction, axis=1).min() > 0.6
    with pytest.raises(UsageError, match="nose"):
        space.unbind(space.encode(x), "nose")


def test_a_tap_wider_than_the_space_takes_several_slots() -> None:
    space = HypervectorSpace([Tap("wide", (64,))], SpacePolicy(dimensions=32, levels=0))
    assert space.slots == (3,) and space.roles.shape == (3, 32)
    assert len(set(space.index.tolist())) == 65
    wider = HypervectorSpace([Tap("wide", (64,))], SpacePolicy(dimensions=64, levels=0))
    assert wider.slots == (2,)
    x = np.random.default_rng(0).normal(size=(400, 64)).astype(np.float32)
    estimate = wider.unbind(wider.encode({"wide": x}), "wide")
    assert np.mean(np.sum(estimate * x, axis=1) / np.linalg.norm(x, axis=1)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("count", "shallow"), [(1, 0), (2, 1), (3, 2), (18, 9)])
def test_the_first_half_of_the_taps_is_shallow(count: int, shallow: int) -> None:
    space = HypervectorSpace([Tap(f"t{i}", (3,)) for i in range(count)], POLICY)
    assert space.weights.tolist() == [np.float32(0.3)] * shallow + [1.0] * (count - shallow)


def test_taps_of_deviations_count_more_than_those_of_means() -> None:
    taps = [Tap(name, (3,)) for name in ("a.mean", "a.std", "b.mean", "b.std", "c")]
    weights = HypervectorSpace(taps, SpacePolicy(dimensions=16, shallow_weight=1, deviation_weight=4, levels=0)).weights
    np.testing.assert_allclose(weights, [0.5, 2, 0.5, 2, 1])


def test_levels_come_first_from_the_middle_taps_and_keep_magnitude() -> None:
    taps = [Tap(f"t{i}", (6,)) for i in range(10)]
    space = HypervectorSpace(taps, SpacePolicy(dimensions=64, levels=12))
    assert [t.name for t in space.level_taps] == ["t4", "t5", "t6", "t7"]
    x = {t.name: np.random.default_rng(i).normal(size=(3, 6)).astype(np.float32) for i, t in enumerate(taps)}
    whole, plain = space.encode(x), HypervectorSpace(taps, SpacePolicy(dimensions=64, levels=0)).encode(x)
    assert whole.shape == (3, 76)
    np.testing.assert_allclose(whole[:, 12:], plain, atol=1e-6)
    louder = space.encode(x | {t.name: 2 * x[t.name] for t in space.level_taps})
    np.testing.assert_allclose(louder[:, :12], 2 * whole[:, :12], rtol=1e-4)
    other = space.encode(x | {"t0": -x["t0"], "t9": -x["t9"]})
    np.testing.assert_array_equal(other[:, :12], whole[:, :12])
    silent = np.concatenate([0 * whole[:, :12], plain], axis=1)
    np.testing.assert_allclose(space.unbind(whole, "t3"), space.unbind(silent, "t3"), atol=1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 64), st.integers(0, 99))
def test_levels_of_a_tap_are_a_projection_of_it_alone(channels: list[int], m: int, seed: int) -> None:
    taps = [Tap(f"t{i}", (c,)) for i, c in enumerate(channels)]
    matrix, given_widths = projection(taps, m, seed), shares(channels, m)
    assert matrix.shape == (sum(channels), m)
    assert all(w <= c for w, c in zip(given_widths, channels, strict=True)) and sum(given_widths) <= m
    row = column = 0
    for c, w in zip(channels, given_widths, strict=True):
        outside = matrix[row : row + c].copy()
        outside[:, column : column + w] = 0
        assert not outside.any()
        np.testing.assert_allclose(np.linalg.norm(matrix[row : row + c, column : column + w], axis=0), SCALE, rtol=1e-4)
        row, column = row + c, column + w


def test_batches_of_any_size_give_the_same_rows() -> None:
    space, x = HypervectorSpace(TAPS, POLICY), features(CHUNK + 3)
    whole = space.encode(x)
    for row in (0, CHUNK - 1, CHUNK, CHUNK + 2):
        one = space.encode({k: v[row : row + 1] for k, v in x.items()})
        np.testing.assert_allclose(one[0], whole[row], atol=1e-5)
    assert space.encode(features(0)).shape == (0, 256)


def test_inputs_are_neither_changed_nor_aliased() -> None:
    space = HypervectorSpace([Tap("stem", (16,))], POLICY)
    x = features(2)["stem"]
    before = x.copy()
    space.encode({"stem": x})
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e30])
def test_silent_and_huge_taps_stay_finite(scale: float) -> None:
    space = HypervectorSpace(TAPS, POLICY)
    x = {k: (v * scale).astype(np.float32) for k, v in features(2).items()}
    assert np.isfinite(space.encode(x)).all()


def test_refusals_name_the_tap() -> None:
    space, x = HypervectorSpace(TAPS, POLICY), features(2)
    with pytest.raises(UsageError, match="body is missing"):
        space.encode({k: v for k, v in x.items() if k != "body"})
    with pytest.raises(UsageError, match=r"body has shape \(2, 23\)"):
        space.encode(x | {"body": x["body"][:, :23]})
    with pytest.raises(UsageError, match=r"body has shape \(1, 24\)"):
        space.encode(x | {"body": x["body"][:1]})
    for bad in (np.nan, np.inf):
        broken = x["body"].copy()
        broken[1, 5] = bad
        with pytest.raises(DataError, match="tap body"):
            space.encode(x | {"body": broken})


@pytest.mark.parametrize("taps", [(), (Tap("m", (3, 4, 4)),), (Tap("a", (3,)), Tap("a", (4,)))])
def test_unusable_taps_are_refused(taps: tuple[Tap, ...]) -> None:
    with pytest.raises(UsageError):
        HypervectorSpace(taps, POLICY)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpacePolicy(dimensions=100),
        lambda: SpacePolicy(dimensions=1),
        lambda: SpacePolicy(shallow_weight=0.0),
        lambda: SpacePolicy(magnitude_scale=float("nan")),
        lambda: SpacePolicy(deviation_weight=0.0),
        lambda: SpacePolicy(levels=-1),
        lambda: SpacePolicy(level_from=0.5, level_to=0.5),
    ],
)
def test_unusable_policies_are_refused(make: Callable[[], SpacePolicy]) -> None:
    with pytest.raises(UsageError, match="it must be"):
        make()


def test_digest_changes_with_everything_that_changes_hypervectors() -> None:
    digests = {
        HypervectorSpace(taps, policy).digest
        for taps in (TAPS, TAPS[::-1], TAPS[:2])
        for policy in (POLICY, SpacePolicy(256, 4), SpacePolicy(256, 3, 0.5), SpacePolicy(256, 3, 0.3, 0.1))
    }
    digests |= {HypervectorSpace(TAPS, SpacePolicy(256, 3, levels=n)).digest for n in (8, 9)}
    assert len(digests) == 14
    assert HypervectorSpace(TAPS, POLICY).digest == HypervectorSpace(list(TAPS), POLICY).digest


def test_numpy_equals_torchhd() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchhd")
    from edgeear.torch_space import encode

    x = features(9) | {"stem": np.zeros((9, 16), np.float32)}
    for policy in (POLICY, SpacePolicy(2048), SpacePolicy(256, levels=9)):
        space = HypervectorSpace(TAPS, policy)
        ours = encode(space, {k: torch.from_numpy(v) for k, v in x.items()})
        np.testing.assert_allclose(ours.numpy(), space.encode(x), atol=1e-5)
