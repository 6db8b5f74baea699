"""Each proxy against its formula, written out a second time with loops on tiny heads; and where none is defined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaptors.cost import cost
from adaptors.modules import Head, TensorLayers
from adaptors.proxies import PROXIES, Probe, Sample, kernel_loo
from adaptors.proxies.probe import STEM, Kept, SampledLayers
from adaptors.proxies.spectral import STRENGTHS, spectrum_loo
from adaptors.spec import HeadSpec
from tests.adaptors.test_search import HEADS, SHAPES, labelled, probe

F64 = NDArray[np.float64]
MLP = HeadSpec(("a.mean",), "mlp", 4, reconfigurator="linear")
CONV = HeadSpec(("a.mean",), "conv", 4, spatial="m", reconfigurator="linear")
LEARNED = [h for h in HEADS if h.operator not in ("linear", "fourier")]


def sample(samples: int = 24, seed: int = 0, kept: Kept | None = None) -> Sample:
    taps, labels = labelled(samples, seed)
    tensors = {t: torch.from_numpy(x) for t, x in taps.items()}
    return Sample(tensors, torch.from_numpy(labels), 3, kept=kept or Kept())


def on(spec: HeadSpec, shared: Sample) -> Probe:
    return Probe(spec, cost(spec, shared.shapes, shared.classes), shared)


def score(name: str, p: Probe) -> float:
    found = PROXIES[name](p)
    assert found is not None
    return found


def weight(p: Probe, name: str) -> F64:
    found: F64 = p.head.matrices[name].detach().numpy().astype(np.float64)
    return found


def inputs(p: Probe) -> F64:
    """What the first layer of an mlp reads, by the head's own path."""
    head = p.head
    with torch.no_grad():
        x = (head.vector(p.sample.taps) - head.shift) * head.scale
    read: F64 = x.numpy().astype(np.float64) * x.shape[1] ** 0.5
    return read


def before_activations(p: Probe) -> list[F64]:
    """Inputs of the activations of an mlp without residuals, or of a conv, `(samples, units, positions)`."""
    x = inputs(p)[:, :, None]
    names = [f"layer{i}" for i in range(p.spec.depth)]
    if p.spec.operator == "conv":
        assert p.spec.spatial is not None
        x = p.sample.taps[p.spec.spatial].flatten(2).numpy().astype(np.float64)
        names = ["stem", *(f"block{i}" for i in range(p.spec.depth))]
    found = []
    for name in names:
        found.append(np.einsum("wc,ncp->nwp", weight(p, name).reshape(p.spec.width, -1), x))
        x = np.maximum(found[-1], 0)
    return found


def gradients(p: Probe, chunk: slice = slice(None)) -> dict[str, F64]:
    """Of the cross-entropy, for an mlp of one layer that is read linearly."""
    x, w, v = inputs(p)[chunk], weight(p, "layer0"), weight(p, "readout")
    hidden = np.maximum(x @ w.T, 0)
    logits = hidden @ v.T
    wrong = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong -= np.eye(3)[p.sample.labels[chunk].numpy()]
    wrong /= len(x)
    return {"layer0": ((wrong @ v) * (hidden > 0)).T @ x, "readout": wrong.T @ hidden}


@pytest.mark.parametrize("spec", [*HEADS, replace(CONV, operator="depthwise", residual=True, depth=2)], ids=str)
def test_the_gram_matrix_is_that_of_the_codes(spec: HeadSpec) -> None:
    p = on(spec, sample())
    if spec.operator == "fourier":  # the kernel that the features approximate
        p = on(replace(spec, width=8192), sample())
    expected = (p.codes @ p.codes.T).numpy()
    tolerance = 0.06 if spec.operator == "fourier" else 1e-4 * np.abs(expected).max()
    assert np.allclose(p.gram.numpy(), expected, atol=tolerance)
    centred = p.codes - p.codes.mean(0)
    values = np.linalg.svd(centred.double().numpy(), compute_uv=False) ** 2
    top = p.spectrum[0].flip(0)[:4].numpy()
    assert np.allclose(top, values[: len(top)], rtol=0.1 if spec.operator == "fourier" else 1e-3)


@pytest.mark.parametrize("spec", HEADS, ids=str)
def test_the_sample_normalises_as_the_head_does(spec: HeadSpec) -> None:
    shared = sample()
    head = Head(spec, SHAPES, 3)
    head.fit_normalisation(shared.taps)
    for found, expected in zip(shared.normalisation(spec), (head.shift, head.scale), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", PROXIES)
def test_what_is_shared_or_forgotten_changes_no_score(name: str) -> None:
    shared, forgetful = sample(), sample(kept=Kept(0))
    alone = [PROXIES[name](on(spec, sample())) for spec in HEADS]
    assert [PROXIES[name](on(spec, shared)) for spec in HEADS] == alone
    assert [PROXIES[name](on(spec, shared)) for spec in reversed(HEADS)] == alone[::-1]
    assert [PROXIES[name](on(spec, forgetful)) for spec in HEADS] == alone and forgetful.kept.bytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), max_size=30))
def test_what_is_kept_stays_within_its_limit(asked: list[tuple[int, int]]) -> None:
    kept = Kept(200)
    for key, size in asked:
        (tensor,) = kept.get((key, size), lambda size=size: (torch.zeros(size),))  # type: ignore[misc]
        assert len(tensor) == size and kept.bytes <= 200


def test_a_kept_result_is_not_made_again() -> None:
    made: list[int] = []

    def make() -> tuple[torch.Tensor, ...]:
        made.append(1)
        return (torch.zeros(2),)

    kept = Kept(20)
    assert kept.get("a", make) is kept.get("a", make) and len(made) == 1
    kept.get("b", make), kept.get("a", make), kept.get("c", make)  # "b" was asked for longest ago
    kept.get("a", make)
    assert len(made) == 3
    kept.get("b", make)
    assert len(made) == 4


@pytest.mark.parametrize("width", [8, STEM + 8])
@pytest.mark.parametrize("trained", [False, True])
def test_the_stem_is_the_heads_own(width: int, trained: bool) -> None:
    shared = sample()
    p = on(replace(CONV, width=width), shared)
    if trained:
        p.head.matrices["stem"].data.add_(0.1)
        p.head.biases["stem"].data.add_(0.2)
    found, own = SampledLayers(p), TensorLayers(p.head, shared.taps)
    stems = [layers.conv(layers.map(), "stem", width) for layers in (found, own)]
    assert torch.allclose(stems[0], stems[1], atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 20), st.sampled_from(HEADS[:1] + HEADS[3:]))
def test_class_means_equals_a_loop(seed: int, samples: int, spec: HeadSpec) -> None:
    rng = np.random.default_rng(seed)
    drawn = sample(samples, seed)
    labels = torch.from_numpy(rng.integers(0, 3, samples))
    p = on(spec, Sample(drawn.taps, labels, 3))
    found = PROXIES["class_means"](p)
    if max(np.bincount(labels.numpy())) < 2:
        assert found is None
        return
    assert found is not None
    codes = p.codes.double().numpy()
    z = codes / np.linalg.norm(codes, axis=1, keepdims=True).clip(1e-6)
    right, close = 0, 0
    for i in range(samples):
        cosines = []
        for c in range(3):
            total = sum((z[j] for j in range(samples) if j != i and labels[j] == c), np.zeros(z.shape[1]))
            cosines.append(float(z[i] @ total) / max(float(np.linalg.norm(total)), 1e-6))
        margin = cosines[labels[i]] - max(c for k, c in enumerate(cosines) if k != labels[i])
        right, close = right + (margin > 0), close + (abs(margin) < 1e-4)
    assert abs(found * samples - right) <= close + 1e-3


@pytest.mark.parametrize("spec", [MLP, replace(MLP, depth=2), CONV, replace(CONV, depth=2)], ids=str)
def test_activation_patterns_are_counted_and_compared(spec: HeadSpec) -> None:
    p = on(spec, sample(12))
    flat = np.concatenate([(x > 0).reshape(12, -1) for x in before_activations(p)], 1)
    kernel = np.array([[float((a == b).sum()) for a in flat] for b in flat])
    assert score("naswot", p) == pytest.approx(np.linalg.slogdet(kernel + 1e-3 * np.eye(12))[1], rel=1e-6)
    assert score("swap", p) == len({tuple(column) for column in flat.T})


@pytest.mark.parametrize("name", ["naswot", "swap", "meco", "synflow"])
def test_prototypes_do_not_hide_the_hidden_units(name: str) -> None:
    for spec in (MLP, CONV):
        assert score(name, probe(spec)) == score(name, probe(replace(spec, reconfigurator="prototypes")))


def test_hidden_units_of_residual_and_hardswish_heads_count() -> None:
    deep = replace(MLP, depth=2, activation="hardswish")
    assert score("swap", probe(deep)) >= score("swap", probe(replace(MLP, activation="hardswish")))
    assert probe(replace(deep, residual=True)).hidden[1].shape == (60, 4)
    depthwise = probe(HEADS[5])
    assert [x.shape for x in depthwise.hidden] == [(60, 8, 5, 5)] * 2


@pytest.mark.parametrize("spec", [MLP, replace(MLP, depth=2), replace(CONV, taps=())], ids=str)
def test_synflow_is_a_product_of_sizes(spec: HeadSpec) -> None:
    p = on(replace(spec, activation="hardswish"), sample())
    flow = np.ones(6) if spec.convolutional else np.ones(8) * 8**0.5
    for name in p.head.matrices:
        flow = np.abs(weight(p, name).reshape(-1, len(flow))) @ flow
    assert score("synflow", p) == pytest.approx(np.log1p(len(p.head.matrices) * flow.sum()), rel=1e-5)


def test_proxies_of_the_gradient_equal_their_formulas() -> None:
    p = on(MLP, sample())
    whole = gradients(p)
    assert score("snip", p) == pytest.approx(sum(np.abs(weight(p, n) * g).sum() for n, g in whole.items()), rel=1e-4)
    assert score("grad_norm", p) == pytest.approx(sum(np.sqrt((g**2).sum()) for g in whole.values()), rel=1e-4)
    parts = [gradients(p, slice(i, i + 6)) for i in (0, 6, 12, 18)]
    expected = 0.0
    for name in whole:
        ratios = 0.0
        for values in np.abs([part[name].ravel() for part in parts]).T:
            ratios += values.mean() / values.std() if values.std() > 0 else 0.0
        expected += np.log(ratios)
    assert score("zico", p) == pytest.approx(expected, rel=1e-3)


def test_te_nas_is_the_condition_number_of_the_kernel_of_gradients() -> None:
    p = on(replace(MLP, width=32), sample(6))
    x, w, v = inputs(p), weight(p, "layer0"), weight(p, "readout")
    hidden = np.maximum(x @ w.T, 0)
    rows = [
        np.concatenate([np.outer(v.sum(0) * (h > 0), xi).ravel(), np.tile(h, 3)])
        for xi, h in zip(x, hidden, strict=True)
    ]
    values = np.linalg.eigvalsh(np.array(rows) @ np.array(rows).T)
    assert score("te_nas", p) == pytest.approx(-np.log(values[-1] / values[0]), rel=1e-3)


@pytest.mark.parametrize("spec", [MLP, replace(MLP, depth=2), CONV], ids=str)
def test_meco_sums_least_eigenvalues_of_correlations(spec: HeadSpec) -> None:
    p = on(spec, sample())
    layers = [x.transpose(1, 0, 2).reshape(spec.width, -1) for x in before_activations(p)]
    expected = sum(np.linalg.eigvalsh(np.corrcoef(x[x.std(1) > 1e-6]))[0] for x in layers)
    assert score("meco", p) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("spec", [HEADS[0], HEADS[3], HEADS[6]], ids=str)
def test_expressivity_is_the_entropy_of_principal_variances(spec: HeadSpec) -> None:
    p = on(spec, sample())
    codes = p.codes.double().numpy()
    share = np.linalg.eigvalsh(np.cov(codes.T)).clip(1e-12)
    share = share / share.sum()
    assert score("az_expressivity", p) == pytest.approx(-float((share * np.log(share)).sum()), abs=1e-3)


@pytest.mark.parametrize("spec", [HEADS[0], HEADS[1], HEADS[3], HEADS[4], HEADS[5]], ids=str)
def test_spectral_is_the_error_of_ridge_on_the_codes(spec: HeadSpec) -> None:
    p = on(spec, sample())
    codes = p.codes.double()
    codes = codes - codes.mean(0)
    targets = torch.nn.functional.one_hot(p.sample.labels, 3).double()
    strengths = STRENGTHS[-1:] if spec.reconfigurator == "prototypes" else STRENGTHS
    expected = -kernel_loo(codes @ codes.T, targets - targets.mean(0), strengths)
    assert score("spectral", p) == pytest.approx(expected, rel=1e-3)


def test_few_random_features_cost_what_the_correction_says() -> None:
    """Ridge on drawn features errs more than on their kernel; the correction accounts for most of it."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(60, 5)), rng.normal(size=(60, 1))
    y = torch.from_numpy(np.sin(2 * x[:, :1]) + 0.1 * noise)
    kernel = torch.from_numpy(np.exp(-0.3 * np.square(x[:, None] - x[None]).sum(2)))
    strength = np.array([0.05])
    drawn = []
    for _ in range(60):
        phases = x @ rng.normal(size=(5, 400)) * 0.6**0.5 + rng.uniform(0, 2 * np.pi, 400)
        z = torch.from_numpy(np.cos(phases) * (2 / 400) ** 0.5)
        z = z - z.mean(0)
        drawn.append(kernel_loo(z @ z.T, y - y.mean(0), strength))
    centred = kernel - kernel.mean(0)
    values, vectors = torch.linalg.eigh(centred - centred.mean(1, keepdim=True))
    plain, corrected = (spectrum_loo(values, vectors, y - y.mean(0), strength, m) for m in (np.inf, 400))
    gap = float(np.mean(drawn)) - plain
    assert gap > 0.02 * plain and abs(float(np.mean(drawn)) - corrected) < 0.5 * gap


def test_a_proxy_is_undefined_where_its_idea_has_no_object() -> None:
    everywhere = {"spectral", "class_means", "az_expressivity", "parameters", "macs", "random"}
    for name, proxy in PROXIES.items():
        defined = {str(spec) for spec in HEADS if proxy(probe(spec)) is not None}
        wanted = HEADS if name in everywhere else LEARNED
        if name == "te_nas":  # a head of few units may have a singular kernel
            assert defined <= {str(spec) for spec in wanted} and defined
        else:
            assert defined == {str(spec) for spec in wanted}, name


@pytest.mark.parametrize("name", ["spectral", "class_means", "az_expressivity"])
def test_constant_codes_have_no_score(name: str) -> None:
    live = sample()
    dead = Sample({t: torch.ones_like(x) for t, x in live.taps.items()}, live.labels, 3)
    assert [PROXIES[name](on(spec, dead)) for spec in HEADS] == [None] * len(HEADS)


def test_a_class_of_one_sample_is_no_obstacle() -> None:
    live = sample(13)
    labels = torch.tensor([0, 1] * 6 + [2])
    lonely = Sample(live.taps, labels, 3)
    for name in ("spectral", "class_means"):
        assert all(np.isfinite(score(name, on(spec, lonely))) for spec in HEADS)
    assert score("class_means", on(HEADS[0], lonely)) <= 12 / 13  # it cannot be right about itself
    for labels in (torch.arange(13), torch.arange(13).flip(0)):
        assert PROXIES["class_means"](on(HEADS[0], Sample(live.taps, labels, 13))) is None


def test_too_few_samples_for_batches_have_no_score() -> None:
    assert PROXIES["zico"](on(MLP, sample(3))) is None and PROXIES["te_nas"](on(MLP, sample(1))) is None
