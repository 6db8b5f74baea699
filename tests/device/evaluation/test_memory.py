"""Measuring the memory of a serving process: it ends whatever happens to that process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from device.encoder.session import OnnxEncoder, pooled_taps
from device.evaluation import memory
from edgeear.space import HypervectorSpace
from edgeear.system import System
from tests.support.tiny_models import saved, sound


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return saved(tmp_path, sound())


def system_of(encoder: Path) -> System:
    opened = OnnxEncoder(encoder)
    return System(opened.digest, HypervectorSpace(pooled_taps(opened)))


def interpreter(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_serving_process_is_measured(encoder: Path) -> None:
    found, reason = memory.inference_memory(encoder, system_of(encoder), [])
    assert reason is None and found is not None and 20 < found < 500


@pytest.mark.parametrize(
    "script", ["kill -9 $$", "exec 0<&-; kill -9 $$", "head -c 10 >/dev/null; kill -9 $$", "exit 3"]
)
def test_a_child_that_dies_at_any_moment_is_a_reason(
    script: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is larger than a pipe holds, so the parent is writing when the child dies."""
    system = system_of(encoder)
    interpreter(tmp_path, script, monkeypatch)
    found, reason = memory.inference_memory(encoder, system, [Path("x" * 200)] * 10_000)
    assert found is None and reason is not None and "the process that measures it failed (exit code" in reason


def test_a_child_that_never_answers_is_a_reason(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = system_of(encoder)
    interpreter(tmp_path, "exec sleep 600", monkeypatch)
    monkeypatch.setattr(memory, "TIMEOUT_S", 0.3)
    found, reason = memory.inference_memory(encoder, system, [])
    assert found is None and reason is not None and "timed out" in reason


def test_a_broken_job_names_the_fault(encoder: Path, tmp_path: Path) -> None:
    system = system_of(encoder)
    encoder.unlink()
    found, reason = memory.inference_memory(encoder, system, [])
    assert found is None and reason is not None and "not a file" in reason
