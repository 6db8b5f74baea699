"""The continual protocol on small real digits: schema, figures that agree with each other, and refusals.

The domains are the 8x8 digits of scikit-learn as they are, inverted, and turned by a quarter, seen by a fixed random
convolution. Nothing here is exported or downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from adaptors import search
from adaptors.search_space import BUDGETS, Budget, EmptyBudget
from device.cli import app as cli
from device.encoder.engine import OrtEngine
from device.evaluation import stream as evaluate_stream
from device.evaluation.data import EvalData, read_domains
from device.evaluation.memory import inference_memory
from device.evaluation.ood import OodOptions, bench_ood, mahalanobis, maximum_softmax, nearest_mean, nearest_neighbours
from device.evaluation.protocol import evaluate, learn_domains, wrong_routes
from device.evaluation.result import EvalResult
from device.evaluation.run import EvalOptions, Laps, Run, fingerprint
from device.evaluation.stream import QUIET, WARMUP, false_alarms, shifts
from device.images.dataset import is_test
from edgeear.errors import DataError, UsageError
from edgeear.flow import Judgement
from edgeear.incremental import head_spec, readout
from edgeear.memory import DomainMemory, learn, merge
from edgeear.system import System, SystemPolicy
from edgeear.types import F32, U8, Tap
from tests.support.tiny_models import model, node, saved

SIZE = 8
DOMAINS = ("plain", "inverted", "turned")
CLASSES = ("1", "3", "4", "7")
PER_CLASS = 100
KEYS = {  # DESIGN's JSON: these must be there, whatever else is
    "domains", "classes", "seed", "shots", "accuracy_matrix", "final_accuracy", "bwt", "oracle_route_accuracy",
    "routing_accuracy", "ood", "shift", "false_alarms_per_10k", "growth", "old_outputs_bit_identical", "peak_rss_mb",
}  # fmt: skip
GROWTH_KEYS = {"domain", "spec", "parameters", "bytes", "macs", "search_s", "train_s", "specs_scored"}


class RandomConvolution:
    """A fixed random 3x3 convolution behind `edgeear.types.Encoder`, and the picture itself as a third tap."""

    digest = hashlib.sha256(b"random convolution").hexdigest()
    input_size = (SIZE, SIZE)
    taps = (
        Tap("conv.mean", (16,)),
        Tap("conv.std", (16,)),
        Tap("pixels.mean", (SIZE * SIZE,)),
        Tap("logits", (2,)),
        Tap("early.map", (16, 6, 6)),
        Tap("conv.map", (16, 6, 6)),
    )

    def __init__(self) -> None:
        self.filters = np.random.default_rng(0).normal(size=(16, 3, 3)).astype(np.float32)

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        grey = frames[..., 0].astype(np.float32) / 255
        windows = np.lib.stride_tricks.sliding_window_view(grey, (3, 3), axis=(1, 2))
        maps = np.maximum(np.einsum("nijab,cab->ncij", windows, self.filters), 0)
        found = {
            "conv.mean": maps.mean(axis=(2, 3)),
            "conv.std": maps.std(axis=(2, 3)),
            "pixels.mean": grey.reshape(len(grey), -1),
            "conv.map": maps,
            "logits": np.zeros((len(grey), 2), np.float32),
        }
        return {t: found[t].astype(np.float32) for t in taps}


class Poisoned(RandomConvolution):
    """The same, until a feature overflows."""

    def encode(self, frames: U8, taps: Sequence[str]) -> dict[str, F32]:
        found = super().encode(frames, taps)
        found[taps[0]][-1, 0] = np.nan
        return found


def write(root: Path, domain: str, classes: Sequence[str], change: Callable[[U8], U8], count: int = PER_CLASS) -> None:
    digits = load_digits()
    for name in classes:
        folder = root / domain / name
        folder.mkdir(parents=True)
        for i, picture in enumerate(digits.images[digits.target == int(name)][:count]):
            levels = (picture * (255 / 16)).astype(np.uint8)
            Image.fromarray(change(levels)).save(folder / f"{i:03}.png")


def inverted(picture: U8) -> U8:
    return np.uint8(255) - picture


def turned(picture: U8) -> U8:
    return np.ascontiguousarray(np.rot90(picture))


def unchanged(picture: U8) -> U8:
    return picture


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    for domain, change in zip(DOMAINS, (unchanged, inverted, turned), strict=True):
        write(root, domain, CLASSES, change)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "features"


def options(root: Path, cache: Path, *order: str, **changes: Any) -> EvalOptions:
    return replace(
        EvalOptions(root, order or None, cache=cache, specs=12, policy=SystemPolicy(memory_dimensions=64)), **changes
    )


@pytest.fixture(scope="module")
def result(digits: Path, cache: Path) -> EvalResult:
    return evaluate(options(digits, cache, *DOMAINS), encoder=RandomConvolution())


@pytest.fixture(scope="module")
def data(digits: Path, cache: Path) -> EvalData:
    return read_domains(options(digits, cache, *DOMAINS), RandomConvolution(), lambda *_: None)


def figures(result: EvalResult) -> dict[str, Any]:
    """The JSON without what depends on the machine."""
    found: dict[str, Any] = json.loads(result.to_json())
    for key in ("timings_s", "peak_rss_mb"):
        del found[key]
    for growth in found["growth"]:
        for key in ("search_s", "train_s", "memory_s"):
            del growth[key]
    return found


# ------------------------------------------------------------------------------------------- the JSON object


def test_json_has_the_promised_keys(result: EvalResult) -> None:
    found = json.loads(result.to_json())
    assert set(found) >= KEYS
    assert set(found["growth"][0]) >= GROWTH_KEYS
    assert set(found["shift"][0]) >= {"from", "to", "detected", "delay_samples"}
    assert set(found["ood"][0]) == {"known", "unknown", "auroc", "fpr95"}
    assert set(found["peak_rss_mb"]) >= {"inference", "learning"}
    assert found["domains"] == list(DOMAINS) and found["classes"] == list(CLASSES)
    assert EvalResult.model_validate_json(result.to_json()) == result


def test_every_share_is_a_fraction_and_every_matrix_is_full(result: EvalResult) -> None:
    accuracy, routes = np.array(result.accuracy_matrix), np.array(result.routing_accuracy)
    assert accuracy.shape == routes.shape == (3, 3)
    shares = [*accuracy.ravel(), *routes.ravel(), *result.false_ood_rate, *result.own_head_accuracy]
    shares += [v for pair in result.ood for v in (pair.auroc, pair.fpr95)]
    assert min(shares) >= 0 and max(shares) <= 1
    np.testing.assert_allclose(routes.sum(axis=1), 1)


def test_figures_agree_with_each_other(result: EvalResult) -> None:
    accuracy = np.array(result.accuracy_matrix)
    assert result.final_accuracy == pytest.approx(accuracy[-1].mean())
    assert result.bwt == pytest.approx(np.mean([accuracy[2, j] - accuracy[j, j] for j in range(2)]))
    assert result.oracle_route_accuracy == pytest.approx(np.mean(result.own_head_accuracy))
    assert [(p.known, p.unknown) for p in result.ood] == [(a, b) for a in DOMAINS for b in DOMAINS if a != b]
    assert [(s.from_, s.to) for s in result.shift] == [("plain", "inverted"), ("inverted", "turned")]


def test_the_system_learns_each_domain_and_keeps_it(result: EvalResult) -> None:
    accuracy = np.array(result.accuracy_matrix)
    assert np.diag(accuracy).min() > 0.8 and result.bwt > -0.1
    assert accuracy[0, 1] < accuracy[1, 1] - 0.2  # inverted digits need their own head
    assert np.diag(result.routing_accuracy).min() > 0.8
    assert result.old_outputs_bit_identical and result.rejected == ()


def test_inverted_digits_are_told_and_declared(result: EvalResult) -> None:
    assert {(p.known, p.unknown): p.auroc for p in result.ood}["plain", "inverted"] > 0.95
    assert result.shift[0].detected and 1 <= (result.shift[0].delay_samples or 0) <= 100
    assert result.false_alarms_per_10k == 0


def test_same_seed_same_figures(digits: Path, cache: Path, result: EvalResult) -> None:
    again = evaluate(options(digits, cache, *DOMAINS), encoder=RandomConvolution())
    assert figures(again) == figures(result)


def test_shots_bound_the_training_images_and_another_seed_takes_others(digits: Path, cache: Path) -> None:
    first, second = (
        read_domains(options(digits, cache, "plain", shots=5, seed=seed), RandomConvolution(), lambda *_: None)
        for seed in (0, 1)
    )
    assert np.bincount(first.domains[0].train_labels).tolist() == [5] * len(CLASSES)
    assert not np.array_equal(first.domains[0].train_h, second.domains[0].train_h)
    assert np.array_equal(first.domains[0].test_h, second.domains[0].test_h)


def test_maps_are_read_only_on_request_and_scores_of_another_task_never(digits: Path, cache: Path) -> None:
    for spatial in (False, True):
        found = read_domains(options(digits, cache, "plain", spatial=spatial), RandomConvolution(), lambda *_: None)
        read = set(found.domains[0].train[1])
        assert read == {"conv.mean", "conv.std", "pixels.mean"} | ({"conv.map"} if spatial else set())
        assert {t.name for t in found.space.taps} == {"conv.mean", "conv.std", "pixels.mean"}


def test_a_broken_file_stops_the_run_or_is_named(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "plain", ("1", "3"), unchanged)
    (tmp_path / "plain" / "1" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        read_domains(options(tmp_path, cache), RandomConvolution(), lambda *_: None)
    found = read_domains(options(tmp_path, cache, on_bad="skip"), RandomConvolution(), lambda *_: None)
    domain = found.domains[0]
    assert len(domain.train_labels) + len(domain.test_labels) == 2 * PER_CLASS
    assert sum("broken.png" in warning for warning in found.warnings) == 1


def test_progress_names_the_phases_of_every_domain(digits: Path, cache: Path) -> None:
    seen: list[str] = []
    evaluate(
        options(digits, cache, "plain", "turned"), lambda phase, *_: seen.append(phase), encoder=RandomConvolution()
    )
    phases = list(dict.fromkeys(seen))
    for name in ("plain", "turned"):
        wanted = [f"{name}: {phase}" for phase in ("features (plain)", "search", "train", "memory")]
        assert [phase for phase in phases if phase in wanted] == wanted


def test_laps_split_the_time_where_the_phase_changes() -> None:
    moments = iter([10.0, 13.0, 18.0, 25.0])
    laps = Laps(lambda: next(moments), "d", lambda *_: None, "search")
    for phase in ("search", "search", "train", "train", "memory"):
        laps(phase, 0, 1)
    laps.finish()
    assert laps.seconds == {"search": 3.0, "train": 5.0, "memory": 7.0}


# --------------------------------------------------------------------------------------------- awkward data


def test_a_copy_of_a_domain_is_rejected_and_the_protocol_goes_on(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "plain", CLASSES, unchanged)
    write(tmp_path, "copy", CLASSES, unchanged)
    write(tmp_path, "inverted", CLASSES, inverted)
    found = evaluate(options(tmp_path, cache, "plain", "copy", "inverted"), encoder=RandomConvolution())
    assert [r.domain for r in found.rejected] == ["copy"] and found.rejected[0].reasons
    assert [g.domain for g in found.growth] == ["plain", "inverted"]
    assert found.accuracy_matrix[1] == found.accuracy_matrix[0]  # a rejection changes nothing
    assert np.array(found.routing_accuracy)[:, 1].tolist() == [0, 0, 0]
    assert found.accuracy_matrix[2][1] > 0.8  # served by the head that its inputs are routed to


def test_classes_are_matched_by_name(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "first", ("3", "7"), unchanged)
    write(tmp_path, "second", ("1", "4"), inverted)
    found = evaluate(options(tmp_path, cache, "first", "second"), encoder=RandomConvolution())
    assert found.classes == CLASSES
    assert found.accuracy_matrix[0][1] == 0  # none of its classes is known yet
    assert min(found.accuracy_matrix[1]) > 0.8


def test_a_class_with_one_image_is_learned_and_never_tested(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "plain", ("1", "3"), unchanged)
    write(tmp_path, "plain", ("4",), unchanged, count=1)
    found = evaluate(options(tmp_path, cache), encoder=RandomConvolution())
    assert found.classes == ("1", "3", "4") and found.final_accuracy > 0.8
    assert any("one image" in warning for warning in found.warnings)


def test_a_domain_without_a_test_image_is_refused(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "plain", ("1", "3"), unchanged, count=1)
    with pytest.raises(DataError, match="no test image"):
        evaluate(options(tmp_path, cache), encoder=RandomConvolution())


def test_a_domain_of_one_class_is_refused_with_a_remedy(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "plain", ("1",), unchanged)
    with pytest.raises(DataError, match=r"'plain' has one class \(1\).*add images of a second class"):
        evaluate(options(tmp_path, cache), encoder=RandomConvolution())


def test_small_test_sets_are_named_with_what_one_image_is_worth(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "plain", CLASSES, unchanged)
    write(tmp_path, "few", ("1", "3"), inverted, count=15)
    found = evaluate(options(tmp_path, cache, "plain", "few"), encoder=RandomConvolution())
    plain, few = found.test_samples
    assert plain >= 30 > few
    (named,) = [w for w in found.warnings if "fewer than 30" in w]
    assert named.startswith(f"domain few: {few} test images") and named.endswith(f"{1 / few:.1%}")


def warnings_of(folder: Path, cache: Path, **changes: Any) -> tuple[str, ...]:
    return read_domains(options(folder, cache, **changes), RandomConvolution(), lambda *_: None).warnings


def test_copies_are_counted_whatever_their_name_and_format(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "plain", ("1", "3"), unchanged)
    assert warnings_of(tmp_path, cache) == ()
    folder = tmp_path / "plain" / "1"
    names = (f"copy{number}.png" for number in range(1000))
    train_name, test_name = (next(n for n in names if is_test(f"plain/1/{n}") == tested) for tested in (False, True))
    original = next(p for p in sorted(folder.iterdir()) if not is_test(f"plain/1/{p.name}"))
    Image.open(original).save(folder / train_name, compress_level=0)
    total = 2 * PER_CLASS + 1
    assert warnings_of(tmp_path, cache) == (
        f"domain plain: 1 of {total} files are copies of another file and tell nothing new",
    )
    (folder / test_name).write_bytes(original.read_bytes())
    copied, leaked = warnings_of(tmp_path, cache)
    assert copied.startswith(f"domain plain: 2 of {total + 1} files are copies")
    assert ": 1 of " in leaked and "test files are copies of training files" in leaked


@pytest.mark.parametrize("command", [["eval", "--specs", "8"], ["bench", "ood"]], ids=" ".join)
def test_warnings_are_printed_and_in_the_json(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, change in (("plain", unchanged), ("inverted", inverted)):
        write(tmp_path / "data", name, ("1", "3"), change)
    first = min((tmp_path / "data" / "plain" / "1").iterdir())
    first.with_name("copy.png").write_bytes(first.read_bytes())
    for module in ("protocol", "ood"):
        monkeypatch.setattr(f"device.evaluation.{module}.open_encoder", lambda _: (RandomConvolution(), None))
    monkeypatch.setenv("EDGEEAR_CACHE", str(tmp_path / "cache"))
    given = ["--data", str(tmp_path / "data"), "--encoder", "e.onnx", "--quiet", "--json", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, *given])
    printed = capsys.readouterr().err.splitlines()
    assert caught.value.code == 0
    assert [f"warning: {text}" for text in json.loads((tmp_path / "r.json").read_text())["warnings"]] == printed
    assert f"warning: domain plain: 1 of {2 * PER_CLASS + 1} files are copies" in "\n".join(printed)


def test_classes_without_a_labelled_or_a_test_image_are_listed(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, "plain", ("1", "3"), unchanged)
    trained = [n for n in (f"{number}.png" for number in range(100)) if not is_test(f"plain/4/{n}")][:3]
    picture = next((tmp_path / "plain" / "1").iterdir())
    for label, content in (("4", picture.read_bytes()), ("7", b"no picture")):
        (tmp_path / "plain" / label).mkdir()
        for name in trained:
            (tmp_path / "plain" / label / name).write_bytes(content)
    found = warnings_of(tmp_path, cache, on_bad="skip")
    assert "domain plain: 1 classes have no labelled image that can be read: 7" in found
    assert any("no test image" in w and w.endswith(": 4, 7") for w in found)


def test_a_missing_domain_is_refused_by_name(digits: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="winter"):
        evaluate(options(digits, cache, "plain", "winter"), encoder=RandomConvolution())


def test_nan_features_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NaN"):
        evaluate(options(digits, tmp_path / "c.sqlite", "plain"), encoder=Poisoned())


@pytest.mark.parametrize(("prefer", "price"), [("smallest", "bytes"), ("fastest", "latency_ms")])
def test_a_preference_picks_a_head_of_lower_price_among_equals(
    prefer: str, price: str, digits: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(search.PREFERENCES, prefer, (0.5, search.PREFERENCES[prefer][1]))  # much counts as equal
    key = {"bytes": "bytes", "latency_ms": "latency_ms_predicted"}[price]
    best, thrifty = (
        getattr(
            evaluate(options(digits, cache, "plain", prefer=p, specs=60), encoder=RandomConvolution()).growth[0], key
        )
        for p in ("best", prefer)
    )
    assert thrifty < best


def test_an_unknown_preference_names_those_there_are(digits: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match="best, fastest, smallest"):
        evaluate(options(digits, cache, "plain", prefer="prettiest"), encoder=RandomConvolution())


def test_halving_is_told_in_the_explanation(digits: Path, cache: Path) -> None:
    found = evaluate(options(digits, cache, "plain", halving=3), encoder=RandomConvolution())
    assert "successive halving" in found.growth[0].explanation


def test_a_budget_that_nothing_fits_is_refused(digits: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "crumb", Budget(parameters=1))
    with pytest.raises(EmptyBudget, match="raise the limits"):
        evaluate(options(digits, cache, "plain", budget="crumb"), encoder=RandomConvolution())


@pytest.mark.parametrize(
    "changes", [{"budget": "huge"}, {"shots": 0}, {"seed": -1}, {"specs": 0}, {"classes_per_step": 0}]
)
def test_options_without_sense_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(changes)).split("_")[0]
    with pytest.raises(UsageError, match=name):
        EvalOptions(tmp_path, **changes)


# ------------------------------------------------------------------------------------------ bits and memory


@pytest.fixture(scope="module")
def run(digits: Path, cache: Path, data: EvalData) -> Run:
    one = replace(data, domains=data.domains[:1])
    return learn_domains(options(digits, cache, "plain"), one, RandomConvolution(), lambda *_: None, lambda: 0.0)


def test_a_fingerprint_sees_one_changed_byte_and_one_changed_score(run: Run) -> None:
    system, domain = run.systems[-1], run.data.domains[0]
    own, engine = system.domains[0], OrtEngine(run.encoder)
    before = fingerprint(system, engine, own, domain)
    other = replace(own, head=replace(own.head, onnx=own.head.onnx + b"\0"))
    assert fingerprint(system, OrtEngine(run.encoder), own, domain) == before
    shifted = replace(domain, test={t: x + np.float32(0.01) for t, x in domain.test.items()})
    assert fingerprint(system, engine, own, shifted) != before

    class Same(OrtEngine):
        def scores(self, head: Any, features: Any) -> F32:
            return super().scores(own.head, features)

    assert fingerprint(system, Same(run.encoder), other, domain) != before


def test_memory_of_serving_is_measured_in_a_process_of_its_own(tmp_path: Path, cache: Path, digits: Path) -> None:
    flat = model([node("Flatten", ["image"], "pixels")], {"pixels": (1, 3 * SIZE * SIZE)})
    found = evaluate(options(digits, cache, "plain", encoder=saved(tmp_path, flat)))
    memory = found.peak_rss_mb
    assert memory.inference is not None and memory.inference_missing_because is None
    assert memory.learning is not None and 10 < memory.inference < memory.learning


def test_memory_of_serving_is_null_with_a_reason_without_a_file(run: Run) -> None:
    size, reason = inference_memory(None, run.systems[-1], [])
    assert size is None and reason is not None and "file" in reason


# ------------------------------------------------------------------------------------------------ the stream


def test_wrong_routes_are_counted_with_what_they_cost(run: Run, data: EvalData) -> None:
    truth = [d.test_labels for d in data.domains]
    right, wrong = [t.copy() for t in truth], [t + 1 for t in truth]
    total = sum(len(t) for d, t in zip(data.domains, truth, strict=True) if d.name in run.systems[-1].names)
    routes = [np.full(len(t), k) for k, t in enumerate(truth)]
    routes[0][:5], routes[0][5] = 1, -1  # five served by another's head, one by none
    answered = right[0].copy()
    answered[:3] = wrong[0][:3]
    changed = replace(run, routes=tuple(routes), oracle=(right[0], *wrong[1:]), predictions=((answered, *right[1:]),))
    found = wrong_routes(changed)
    assert found.inputs == 5 and found.share == pytest.approx(5 / total)
    assert found.accuracy_as_routed == pytest.approx(0.4) and found.accuracy_of_own_head == 1.0
    none = wrong_routes(replace(changed, routes=tuple(np.full(len(t), k) for k, t in enumerate(truth))))
    assert (none.inputs, none.share, none.accuracy_as_routed, none.accuracy_of_own_head) == (0, 0.0, None, None)


def judged(p: Callable[[F32], Any]) -> Callable[[System, F32], Judgement]:
    """A verdict whose conditional p-value is `p` of the first coordinate."""

    def judge(_system: System, h: F32) -> Judgement:
        values = np.asarray(p(h[:, 0]), np.float32)
        return Judgement(np.zeros(len(h), np.int64), values, values, values, values < 0, np.full(len(h), -1))

    return judge


def test_delay_counts_from_the_first_new_sample(run: Run, data: EvalData, monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(data.domains[0], test_h=np.ones((9, 1), np.float32))
    new = replace(data.domains[1], test_h=-np.ones((4, 1), np.float32), train_h=-np.ones((4, 1), np.float32))
    monkeypatch.setattr(evaluate_stream, "judge", judged(lambda x: np.where(x > 0, 1.0, 1e-6)))
    # The boldest bet is worth 58 a sample, and a mean of 1e6 is asked for: three are too few, four are enough.
    (step,) = shifts([run.systems[-1]] * 2, [old, new], 0, lambda *_: None)
    assert (step.detected, step.delay_samples, step.early_alarms) == (True, 4, 0)
    assert step.warmup == WARMUP
    same = replace(new, test_h=np.ones((4, 1), np.float32), train_h=np.ones((4, 1), np.float32))
    (step,) = shifts([run.systems[-1]] * 2, [old, same], 0, lambda *_: None)
    assert (step.detected, step.delay_samples) == (False, None)


def test_false_alarms_restart_the_test(run: Run, data: EvalData, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = replace(data.domains[0], test_h=-np.ones((9, 1), np.float32))
    good = replace(data.domains[0], test_h=np.ones((9, 1), np.float32))
    monkeypatch.setattr(evaluate_stream, "judge", judged(lambda x: np.where(x > 0, 1.0, 1e-6)))
    assert false_alarms(run.systems[-1], [bad], 0, lambda *_: None) == QUIET // 4
    assert false_alarms(run.systems[-1], [bad, good], 0, lambda *_: None) == (QUIET // 4) / 2


# ---------------------------------------------------------------------------------------- classes step by step


def test_classes_arrive_step_by_step(digits: Path, cache: Path) -> None:
    found = evaluate(
        options(digits, cache, "plain", classes_per_step=2, step_dimensions=256), encoder=RandomConvolution()
    )
    assert set(json.loads(found.to_json())) >= KEYS
    shown = [name.partition(": ")[2].split("+") for name in found.domains]
    assert [len(names) for names in shown] == [2, 2] and sorted(c for names in shown for c in names) == list(CLASSES)
    accuracy = np.array(found.accuracy_matrix)
    assert accuracy[0, 1] == 0 and accuracy[1].min() > 0.8
    assert found.oracle_route_accuracy >= found.final_accuracy
    assert not found.old_outputs_bit_identical  # the head is refitted, and the result says so
    assert found.growth[1].spec["taps"] == ["hypervector"]


def test_steps_need_exactly_one_domain(digits: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match="3 domains"):
        evaluate(options(digits, cache, classes_per_step=2), encoder=RandomConvolution())


def codes(n: int, width: int, classes: int, seed: int = 0) -> tuple[F32, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    labels[:classes] = np.arange(classes)
    h = rng.normal(size=(n, width)) + 0.7 * rng.normal(size=(classes, width))[labels]
    return h.astype(np.float32), labels.astype(np.int64)


def step_memories(h: F32, y: NDArray[np.int64], m: int) -> tuple[DomainMemory, DomainMemory]:
    """The memories of classes a, b and of classes c, d, learned apart."""
    early = y < 2
    return learn(h[early], y[early], ("a", "b"), m), learn(h[~early], y[~early] - 2, ("c", "d"), m)


def test_two_steps_equal_one_joint_fit() -> None:
    h, y = codes(120, 32, 4)
    stepwise, joint = readout(merge(*step_memories(h, y, 24))), readout(learn(h, y, tuple("abcd"), 24))
    assert stepwise.strength == joint.strength
    np.testing.assert_allclose(stepwise.weight, joint.weight, atol=1e-5)
    np.testing.assert_allclose(stepwise.bias, joint.bias, atol=1e-6)
    np.testing.assert_array_equal(stepwise.scores(h).argmax(axis=1), joint.scores(h).argmax(axis=1))


def test_the_order_of_the_steps_only_renames() -> None:
    h, y = codes(120, 32, 4)
    first, second = step_memories(h, y, 24)
    forth, back = readout(merge(first, second)), readout(merge(second, first))
    np.testing.assert_allclose(forth.scores(h), back.scores(h)[:, [2, 3, 0, 1]], atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(60, 12), (20, 32)])  # more samples than dimensions, and fewer
def test_readout_is_the_ridge_regression_of_the_samples(n: int, m: int) -> None:
    h, y = codes(n, 40, 3)
    fitted = readout(learn(h, y, tuple("abc"), m), [0.1])
    z = h[:, :m].astype(np.float64) - h[:, :m].mean(axis=0)
    targets = np.eye(3)[y] - np.eye(3)[y].mean(axis=0)
    ridge = 0.1 * float(np.square(z).sum()) / n
    expected = np.linalg.solve(z.T @ z + ridge * np.eye(m), z.T @ targets).T
    np.testing.assert_allclose(fitted.weight, expected, atol=1e-4)
    np.testing.assert_allclose(fitted.bias, np.bincount(y) / n, atol=1e-6)


def test_strength_is_the_one_of_least_cross_validation_score() -> None:
    h, y = codes(50, 40, 3, seed=3)
    strengths = (0.01, 0.1, 1.0, 10.0)
    z = h[:, :30].astype(np.float64) - h[:, :30].mean(axis=0)
    targets = np.eye(3)[y] - np.eye(3)[y].mean(axis=0)
    unit = float(np.square(z).sum()) / len(z)
    losses = []
    for strength in strengths:
        hat = z @ np.linalg.solve(z.T @ z + strength * unit * np.eye(30), z.T)
        losses.append(np.square(targets - hat @ targets).sum() / (len(z) - 1 - np.trace(hat)) ** 2)
    assert readout(learn(h, y, tuple("abc"), 30), strengths).strength == strengths[int(np.argmin(losses))]


def test_readout_refuses_what_it_cannot_fit() -> None:
    h, y = codes(4, 8, 2)
    with pytest.raises(DataError, match="at least 2"):
        readout(learn(h[:1], y[:1], ("a", "b"), 4))
    with pytest.raises(UsageError, match="above 0"):
        readout(learn(h, y, ("a", "b"), 4), [0.0])


def test_the_head_of_a_readout_reads_the_hypervector() -> None:
    assert head_spec().inputs == ("hypervector",) and head_spec().closed_form


# ------------------------------------------------------------------------------------------------- bench ood


def test_bench_ood_scores_every_pair_with_every_score(digits: Path, cache: Path) -> None:
    found = bench_ood(
        OodOptions(digits, DOMAINS, cache=cache, policy=SystemPolicy(memory_dimensions=64)), encoder=RandomConvolution()
    )
    assert [(p.known, p.unknown) for p in found.pairs] == [(a, b) for a in DOMAINS for b in DOMAINS if a != b]
    names = set(found.mean)
    assert names >= {"edgeear", "angle", "leverage", "hdff", "concatenated", "nearest_class_mean", "mahalanobis", "knn"}
    for pair in found.pairs:
        assert set(pair.scores) == names
    for name, mean in found.mean.items():
        assert mean.auroc == pytest.approx(np.mean([p.scores[name].auroc for p in found.pairs]))
        assert mean.fpr95 == pytest.approx(np.mean([p.scores[name].fpr95 for p in found.pairs]))
    assert found.pairs[0].scores["edgeear"].auroc > 0.95


def test_bench_ood_and_eval_agree_on_our_score(digits: Path, cache: Path, result: EvalResult) -> None:
    found = bench_ood(
        OodOptions(digits, DOMAINS, cache=cache, policy=SystemPolicy(memory_dimensions=64)), encoder=RandomConvolution()
    )
    assert [p.scores["edgeear"].auroc for p in found.pairs] == [p.auroc for p in result.ood]


def test_bench_ood_needs_a_pair(digits: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        bench_ood(OodOptions(digits, ("plain",), cache=cache), encoder=RandomConvolution())


def test_nearest_mean_is_the_cosine_to_the_nearest_class() -> None:
    x = np.array([[1, 0, 0], [3, 0, 0], [0, 2, 0]], np.float32)
    score = nearest_mean(x, np.array([0, 0, 1]))
    np.testing.assert_allclose(score(np.array([[9, 0, 0], [0, 0, 1], [1, 1, 0]], np.float32)), [0, 1, 1 - 0.5**0.5])


def test_nearest_neighbours_match_brute_force() -> None:
    x, _ = codes(30, 5, 2)
    y, _ = codes(7, 5, 2, seed=1)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    distances = np.sort(np.linalg.norm(b[:, None] - a[None], axis=2), axis=1)
    np.testing.assert_allclose(nearest_neighbours(x, 4)(y), distances[:, 3], atol=1e-3)
    np.testing.assert_allclose(nearest_neighbours(x, 99)(y), distances[:, -1], atol=1e-3)


def test_mahalanobis_weighs_directions_by_their_spread() -> None:
    x = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32) * np.array([10, 1], np.float32)
    wide, narrow = mahalanobis(x)(np.array([[5, 0], [0, 5]], np.float32))
    assert narrow > 2 * wide


def test_maximum_softmax_doubts_what_lies_between_classes() -> None:
    h, y = codes(200, 12, 2)
    middle = (h[y == 0].mean(axis=0) + h[y == 1].mean(axis=0))[None] / 2
    score = maximum_softmax(h, y, 0)
    assert score(middle)[0] > np.median(score(h))
