"""Views: augmentation as a function of name and pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from device.images.views import view
from edgeear.errors import UsageError
from edgeear.types import U8


def scene() -> U8:
    """Smooth, so that a crop changes it little, and lopsided, so that a flip shows."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([x * 3, y * 4, 100 + x], axis=-1).astype(np.uint8)


def test_plain_changes_nothing_and_flip_mirrors() -> None:
    assert np.array_equal(view(scene(), "plain"), scene())
    assert np.array_equal(view(scene(), "flip"), scene()[:, ::-1])
    assert np.array_equal(view(view(scene(), "flip"), "flip"), scene())


def test_crops_are_functions_of_name_and_pixels() -> None:
    first = view(scene(), "crop1")
    strided = np.asfortranarray(scene())
    assert np.array_equal(first, view(strided, "crop1"))
    assert not np.array_equal(first, view(scene(), "crop2"))
    other = scene()
    other[0, 0, 0] ^= 1
    assert not np.array_equal(first, view(other, "crop1"))


def test_crops_are_mild_and_some_are_flipped() -> None:
    crops = [view(scene(), f"crop{number}") for number in range(1, 41)]
    assert all(crop.shape == scene().shape and crop.dtype == np.uint8 for crop in crops)
    means = np.array([crop.mean() for crop in crops]) / scene().mean()
    assert 0.6 < means.min() < 0.95 and 1.05 < means.max() < 1.4
    rising = [float(crop[:, 32:, 0].mean()) > float(crop[:, :32, 0].mean()) for crop in crops]
    assert 8 < sum(rising) < 32


@pytest.mark.parametrize("name", ["", "crop", "crop0", "crop01", "crop10000", "Flip", "crop1\n", "crop-1"])
def test_unknown_views_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="view"):
        view(scene(), name)


@pytest.mark.parametrize("frame", [scene().astype(np.float32), scene()[..., 0], scene()[..., :2]])
def test_a_view_wants_a_frame(frame: NDArray[Any]) -> None:
    with pytest.raises(UsageError, match="frame"):
        view(frame, "flip")
