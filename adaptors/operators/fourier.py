"""A random Fourier hypervector of the normalised taps: Rahimi & Recht 2007, "Random features for large-scale kernel
machines", with the structured projection of Yu et al. 2016, "Orthogonal random features".

    z = sqrt(2 / width) cos(gain * H S2 H S1 H S0 x + phase), gain = sqrt(2 bandwidth n)

with the orthonormal transform H of n numbers, seeded signs S0 to S2 and seeded phases. Inner products approximate the
kernel exp(-bandwidth |x - y|^2). Without learned layers; `width` is the number of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptors import hadamard
from adaptors.fields import HeadFields
from adaptors.graph import HeadGraph, Transform
from adaptors.operators.base import Axis, Operator, Tensors, axis
from adaptors.plan import Plan, Shape


class Fourier(Operator):
    learned = False

    def complaint(self, f: HeadFields) -> str | None:
        no_kernel = f"operator 'fourier' needs bandwidth > 0, got {f.bandwidth}" if not f.bandwidth > 0 else None
        return super().complaint(f) or no_kernel

    def axes(self, taps: Sequence[tuple[str, ...]], maps: Sequence[str]) -> list[Axis]:
        return [axis("taps", *taps), axis("width", 1024, 2048, 4096, 8192), axis("bandwidth", 0.1, 0.3, 1.0)]

    def module(self, tensors: Tensors, f: HeadFields) -> Any:
        x = tensors.vector()
        n = _size(x.shape[1], f)
        for i in range(3):
            x = tensors.scrambled(x, f"fourier/{i}", n)
        y = x[:, : f.width] * (2.0 * f.bandwidth * n) ** 0.5
        return (y + tensors.phase(f.width)).cos() * (2.0 / f.width) ** 0.5

    def graph(self, graph: HeadGraph, f: HeadFields) -> str:
        """S0, the gain and three times 1/sqrt(n) are in the normalisation."""
        vector, n = graph.width, _size(graph.width, f)
        first, *others = (hadamard.signs(graph.seed, f"fourier/{i}", n) for i in range(3))
        gain = (2.0 * f.bandwidth * n) ** 0.5 / n**1.5
        transform = Transform(graph, n)
        rows, all_rows = transform.rows(vector), transform.a
        x = transform.lay_out(graph.vector(first[:vector] * np.float32(gain)), vector)
        for i, sign in enumerate(others):
            x = transform.apply(x, all_rows if i else rows, all_rows)
            x = graph.node("Mul", x, graph.cast(sign.astype(np.int8).reshape(transform.a, transform.b)))
        x = transform.flatten(transform.apply(x, all_rows, transform.rows(f.width)), f.width)
        words = graph.cast(hadamard.phase_words(graph.seed, f.width))
        graph.code_scale = (2.0 / f.width) ** 0.5
        return graph.node("Cos", graph.node("Add", x, graph.node("Mul", words, graph.number(hadamard.TURN))))

    def plan(self, plan: Plan, f: HeadFields) -> Shape:
        vector, n = plan.vector()[0], _size(plan.width, f)
        plan.lay_out(vector, n)
        for inputs, outputs in ((vector, n), (n, n), (n, f.width)):
            plan.transform(inputs, outputs, n)
        plan.count(node=2, element=2 * n)  # the signs between
        plan.lay_out(f.width, n)
        plan.count(node=2, element=f.width, cosine=f.width)  # the phases
        plan.macs += f.width
        plan.seeded += 2 * n + 2 * f.width
        return (f.width,)

    def kernel(self, gram: Any, f: HeadFields) -> Any:
        size = gram.diagonal()
        return (size + size[:, None] - 2 * gram).clamp_min_(0).mul_(-f.bandwidth).exp_()

    def random_features(self, f: HeadFields) -> float:
        return f.width

    def terms(self, f: HeadFields) -> dict[str, float]:
        kernel = {"log bandwidth": float(np.log(f.bandwidth)), "wide bandwidth": float(f.bandwidth >= 1)}
        return kernel | {"log dimensions": float(np.log2(f.width / 2048))}


def _size(vector: int, f: HeadFields) -> int:
    return hadamard.next_power_of_two(max(vector, f.width))
