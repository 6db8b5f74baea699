"""Training: the closed forms against direct solutions, and gradient training on data with a known answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adaptors import train as training
from adaptors.fields import TapShapes
from adaptors.modules import Head
from adaptors.quantise import F32, dequantised
from adaptors.spec import PROTOTYPE_DIMENSIONS, PROTOTYPE_SCALE, HeadSpec
from adaptors.train import Trained, TrainPolicy, split, train

SHAPES: TapShapes = {"a.mean": (8,), "b.mean": (16,), "m": (6, 5, 5)}
RIDGE = HeadSpec(("a.mean", "b.mean"))
MEANS = HeadSpec(("a.mean", "b.mean"), reconfigurator="prototypes")
FOURIER = HeadSpec(("a.mean", "b.mean"), "fourier", 1024, bandwidth=0.3)
MLP = HeadSpec(("a.mean", "b.mean"), "mlp", 16, reconfigurator="linear")
JOINT = replace(MLP, reconfigurator="prototypes")
CONV = HeadSpec(("b.mean",), "depthwise", 16, spatial="m", reconfigurator="linear")
CLOSED, TRAINED = [RIDGE, MEANS, FOURIER], [MLP, JOINT, CONV]
POLICY = TrainPolicy(epochs=12, batch=16, learning_rate=0.03)
Data = tuple[dict[str, F32], NDArray[np.int64]]


def name(spec: HeadSpec) -> str:
    return f"{spec.operator}-{spec.reconfigurator}"


def labelled(samples: int, seed: int = 0, distance: float = 3.0) -> Data:
    """Three classes in equal shares, each with directions of its own in every tap."""
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % 3
    taps = {t: rng.normal(1, 1, (samples, *s)).astype(np.float32) for t, s in SHAPES.items()}
    for x in taps.values():
        for c in range(3):
            x[labels == c, 2 * c : 2 * c + 2] += distance
    return taps, labels.astype(np.int64)


def fitted(
    spec: HeadSpec, data: Data, policy: TrainPolicy | None = None, views: Sequence[dict[str, F32]] = ()
) -> Trained:
    policy = policy or POLICY
    return train(spec, SHAPES, [data[0], *views], data[1], 3, policy)


def loaded(spec: HeadSpec, result: Trained, seed: int = 0) -> Head:
    head = Head(spec, SHAPES, 3, seed)
    head.load(result.weights)
    return head


def scores(head: Head, taps: dict[str, F32]) -> F32:
    with torch.no_grad():
        out: F32 = head({t: torch.from_numpy(x) for t, x in taps.items()}).numpy()
    return out


def codes(head: Head, taps: dict[str, F32]) -> NDArray[np.float64]:
    with torch.no_grad():
        z: F32 = head.code(head.adapted({t: torch.from_numpy(x) for t, x in taps.items()})).numpy()
    return z.astype(np.float64)


def accuracy(head: Head, data: Data) -> float:
    return float((scores(head, data[0]).argmax(1) == data[1]).mean())


def chosen(data: Data, index: torch.Tensor) -> Data:
    return {t: x[index.numpy()] for t, x in data[0].items()}, data[1][index.numpy()]


def ridge(z: NDArray[np.float64], labels: NDArray[np.int64], strength: float) -> tuple[F32, F32]:
    """Weight and bias of ridge regression with an unpenalised intercept, solved as one augmented system."""
    targets = np.eye(3)[labels]
    unit = np.square(z - z.mean(0)).sum() / len(z)
    augmented = np.hstack([z, np.ones((len(z), 1))])
    penalty = np.diag([strength * unit] * z.shape[1] + [0.0])
    solution = np.linalg.solve(augmented.T @ augmented + penalty, augmented.T @ targets)
    return solution[:-1].T.astype(np.float32), solution[-1].astype(np.float32)


@pytest.mark.parametrize("samples", [90, 18], ids=["primal", "dual"])
def test_the_closed_form_is_ridge_regression(samples: int) -> None:
    data = labelled(samples)
    result = fitted(RIDGE, data, TrainPolicy(strengths=(0.3,)))
    weight, bias = ridge(codes(loaded(RIDGE, result), data[0]), data[1], 0.3)
    np.testing.assert_allclose(result.weights["matrix.readout"], weight, atol=2e-5)
    np.testing.assert_allclose(result.weights["bias.readout"], bias, atol=2e-5)
    assert result.chosen == "ridge strength 0.3"


@pytest.mark.parametrize(("samples", "width"), [(30, 29), (30, 30), (30, 31), (12, 40), (40, 12)])
def test_primal_and_dual_agree(samples: int, width: int) -> None:
    rng = np.random.default_rng(samples + width)
    z, labels = rng.normal(2, 1, (samples, width)), rng.integers(0, 3, samples)
    solve = training._ridge(torch.tensor(z), torch.from_numpy(labels), 3)
    for strength in (0.03, 3.0):
        weight, bias = solve(strength)
        expected, offset = ridge(z, labels, strength)
        np.testing.assert_allclose(weight, expected, atol=1e-6)
        np.testing.assert_allclose(bias, offset, atol=1e-6)


def test_leave_one_out_is_what_leaving_each_one_out_gives() -> None:
    rng, strengths = np.random.default_rng(0), (1e-3, 0.1, 1.0)
    y = torch.arange(24) % 3
    codes = torch.from_numpy((rng.normal(size=(24, 5)) + 0.8 * np.eye(3, 5)[y.numpy()]).astype(np.float64))
    unit = float((codes - codes.mean(0)).square().sum()) / 24
    errors, rates = [], []
    for strength in strengths:
        error, right = 0.0, 0
        for i in range(24):
            rest = [k for k in range(24) if k != i]
            # The ridge is absolute and centring leaves the sample's share in the hat matrix, as in the closed form.
            z = torch.cat([codes[rest] - codes.mean(0), torch.full((23, 1), 24**-0.5)], 1)
            penalty = torch.diag(torch.tensor([strength * unit] * 5 + [0.0], dtype=torch.float64))
            targets = torch.nn.functional.one_hot(y[rest], 3).double()
            weight = torch.linalg.solve(z.T @ z + penalty, z.T @ targets)
            said = torch.cat([codes[i] - codes.mean(0), torch.tensor([24**-0.5])]) @ weight
            error += float((torch.nn.functional.one_hot(y[i], 3) - said).square().mean()) / 24
            right += int(said.argmax() == y[i])
        errors.append(error)
        rates.append(right / 24)
    strength, rate, _ = training.left_out(codes, y, 3, strengths)
    best = int(np.argmin(errors))
    assert strength == strengths[best]
    assert rate == pytest.approx(rates[best])


def test_the_chosen_strength_and_its_accuracy_are_reported() -> None:
    data, policy = labelled(60, distance=1.2), TrainPolicy(strengths=(1e-6, 0.1, 1.0, 30.0))
    result = fitted(RIDGE, data, policy)
    head = loaded(RIDGE, result)
    with torch.no_grad():
        codes = head.code(head.adapted({t: torch.from_numpy(x) for t, x in data[0].items()}))
    strength, accuracy_left_out, scores = training.left_out(codes, torch.from_numpy(data[1]), 3, policy.strengths)
    assert result.chosen == f"ridge strength {strength:g}"
    assert result.validation_accuracy == pytest.approx(accuracy_left_out, abs=1e-6) and accuracy_left_out < 1
    assert result.validated == len(data[1])
    assert result.temperature is not None and 0.01 < result.temperature < 1 and len(scores) == len(data[1])


@pytest.mark.parametrize("spec", CLOSED, ids=name)
def test_closed_forms_are_validated_on_samples_that_they_did_not_see(spec: HeadSpec) -> None:
    """Labels that say nothing about the features: memorised by a strong head, at chance for what it has not seen."""
    taps, labels = labelled(90, distance=8.0)
    assert fitted(spec, (taps, labels)).validation_accuracy == 1.0
    shuffled = np.random.default_rng(0).permutation(labels)
    assert fitted(spec, (taps, shuffled)).validation_accuracy < 0.6


@pytest.mark.parametrize("spec", TRAINED, ids=name)
def test_gradient_training_reports_the_accuracy_on_held_out_samples(spec: HeadSpec) -> None:
    data = labelled(90, distance=0.2)
    fit, held = split(data[1], POLICY.validation_fraction, POLICY.seed)
    result = fitted(spec, data)
    head = loaded(spec, result)
    assert result.validation_accuracy == pytest.approx(accuracy(head, chosen(data, held)))
    assert result.validation_accuracy != pytest.approx(accuracy(head, chosen(data, fit)))


def test_the_split_is_stratified_and_disjoint() -> None:
    labels = np.repeat([0, 1, 2], [20, 10, 1]).astype(np.int64)
    fit, held = split(labels, 0.2, 7)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(31))
    assert np.bincount(labels[held.numpy()], minlength=3).tolist() == [4, 2, 0]
    assert torch.equal(held, split(labels, 0.2, 7)[1]) and not torch.equal(held, split(labels, 0.2, 8)[1])


@pytest.mark.parametrize("spec", CLOSED + TRAINED, ids=name)
def test_training_is_seeded_and_learns(spec: HeadSpec) -> None:
    data, policy = labelled(90), POLICY
    result, again = fitted(spec, data, policy), fitted(spec, data, policy)
    assert all(np.array_equal(w, again.weights[n]) for n, w in result.weights.items())
    assert (result.validation_accuracy, result.chosen) == (again.validation_accuracy, again.chosen)
    assert accuracy(loaded(spec, result), labelled(300, seed=1)) > 0.9


@pytest.mark.parametrize("spec", [RIDGE, FOURIER, MLP, CONV], ids=name)
def test_a_quantised_head_is_within_a_point(spec: HeadSpec) -> None:
    data, fresh, policy = labelled(90), labelled(900, seed=1), POLICY
    full = fitted(spec, data, policy)
    small = fitted(replace(spec, bits=8), data, policy)
    assert abs(accuracy(loaded(spec, full), fresh) - accuracy(loaded(spec, small), fresh)) <= 0.01
    for key, value in dequantised(full.weights, 8).items():
        np.testing.assert_allclose(small.weights[key], value, atol=1e-6)


def test_prototypes_are_the_class_means_of_all_samples() -> None:
    data = labelled(60)
    result = fitted(MEANS, data)
    z = codes(loaded(MEANS, result), data[0])
    means = np.stack([z[data[1] == c].mean(0) for c in range(3)])
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(result.weights["matrix.readout"], unit, atol=1e-5)
    assert unit.shape == (3, PROTOTYPE_DIMENSIONS) and not result.weights["bias.readout"].any()
    cosine = z @ unit.T  # codes have length one
    np.testing.assert_allclose(scores(loaded(MEANS, result), data[0]), PROTOTYPE_SCALE * cosine, atol=1e-3)


def test_two_views_are_two_samples() -> None:
    data, other = labelled(45), labelled(45, seed=5)[0]
    policy = TrainPolicy(strengths=(0.3,))
    result = fitted(RIDGE, data, policy, views=[other])
    head = loaded(RIDGE, result)
    both = np.concatenate([codes(head, data[0]), codes(head, other)])
    weight, bias = ridge(both, np.concatenate([data[1], data[1]]), 0.3)
    np.testing.assert_allclose(result.weights["matrix.readout"], weight, atol=2e-5)
    np.testing.assert_allclose(result.weights["bias.readout"], bias, atol=2e-5)
    np.testing.assert_array_equal(result.weights["shift"], fitted(RIDGE, data, policy).weights["shift"])


def test_gradient_training_looks_at_every_view() -> None:
    data = labelled(90)
    useless = {t: np.zeros_like(x) for t, x in data[0].items()}
    useful = fitted(MLP, data, TrainPolicy(epochs=4, batch=16)).weights
    mixed = fitted(MLP, data, TrainPolicy(epochs=4, batch=16), views=[useless]).weights
    assert not np.array_equal(useful["matrix.readout"], mixed["matrix.readout"])
    np.testing.assert_array_equal(useful["shift"], mixed["shift"])


def test_normalisation_is_fitted_without_the_held_out_samples() -> None:
    data, policy = labelled(60), TrainPolicy()
    fit, _ = split(data[1], policy.validation_fraction, policy.seed)
    head = Head(RIDGE, SHAPES, 3)
    head.fit_normalisation({t: torch.from_numpy(x)[fit] for t, x in data[0].items()})
    result = fitted(RIDGE, data, policy)
    np.testing.assert_array_equal(result.weights["shift"], head.shift.numpy())
    np.testing.assert_array_equal(result.weights["scale"], head.scale.numpy())


@pytest.mark.parametrize("spec", CLOSED + TRAINED, ids=name)
def test_a_class_with_one_sample_is_learned(spec: HeadSpec) -> None:
    taps, labels = labelled(61, distance=6.0)
    keep = np.concatenate([np.flatnonzero(labels != 2), np.flatnonzero(labels == 2)[:1]])
    few = {t: x[keep] for t, x in taps.items()}, labels[keep]
    result = fitted(spec, few, TrainPolicy(epochs=3, batch=16))
    assert all(np.isfinite(w).all() for w in result.weights.values())
    if spec.closed_form:
        assert scores(loaded(spec, result), few[0])[-1].argmax() == 2


@pytest.mark.parametrize("spec", CLOSED + TRAINED, ids=name)
def test_one_sample_a_class_leaves_nothing_to_validate_on(spec: HeadSpec) -> None:
    data = labelled(3, distance=8.0)
    result = fitted(spec, data, TrainPolicy(epochs=2))
    assert all(np.isfinite(w).all() for w in result.weights.values())
    if spec.closed_form and spec.reconfigurator == "ridge":
        assert result.validation_accuracy == 0  # each left out: its class is unknown to the others
    else:
        assert np.isnan(result.validation_accuracy)


def test_early_stopping_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [0.3, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1]
    readouts: list[F32] = []

    def accuracy_of_epoch(head: Head, *_: object) -> float:
        readouts.append(head.weights()["matrix.readout"])
        return measured[len(readouts) - 1]

    monkeypatch.setattr(training, "_accuracy", accuracy_of_epoch)
    epochs: list[tuple[str, int, int]] = []
    policy = TrainPolicy(epochs=7, batch=16, patience=3)
    data = labelled(60)
    result = train(MLP, SHAPES, [data[0]], data[1], 3, policy, lambda *at: epochs.append(at))
    assert epochs == [("train", i, 7) for i in range(1, 6)]
    assert (result.validation_accuracy, result.chosen) == (0.9, "stopped after epoch 2")
    np.testing.assert_array_equal(result.weights["matrix.readout"], readouts[1])
    assert not np.array_equal(readouts[1], readouts[-1])


@pytest.mark.parametrize("epochs", [1, 2])
def test_few_epochs_are_enough_to_run(epochs: int) -> None:
    data = labelled(15)
    result = fitted(MLP, data, TrainPolicy(epochs=epochs))
    assert 0 <= result.validation_accuracy <= 1
    assert result.chosen.startswith("stopped after epoch")


def test_joint_training_keeps_virtual_outliers_away() -> None:
    data, fresh = labelled(120), labelled(120, seed=1)
    order = np.random.default_rng(0).permutation(120)
    mixed = {t: (x + x[order]) / 2 for t, x in fresh[0].items()}
    outliers = {t: x[fresh[1] != fresh[1][order]] for t, x in mixed.items()}
    similarity, right = [], []
    for weight in (0.0, 3.0):
        head = loaded(JOINT, fitted(JOINT, data, replace(POLICY, outlier_weight=weight)))
        similarity.append(float(scores(head, outliers).max(1).mean()) / PROTOTYPE_SCALE)
        right.append(accuracy(head, fresh))
    assert similarity[1] < similarity[0] - 0.05
    assert min(right) > 0.9
