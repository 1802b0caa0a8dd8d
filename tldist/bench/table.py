"""The figures of a bench: rows as plain data, a table for people, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tldist.bench.timing import Timing

ONNX = "onnxruntime"
"""The name of the package's own row."""


@dataclass(frozen=True)
class Row:
    """One variant at one batch size.

    Attributes:
        batch: images that run at once.
        variant: ``onnxruntime``, or a variant of PyTorch.
        median_ms, p99_ms: milliseconds of a call, images in and outputs back on the host.
        images_per_second: batch / median.
        ratio: how many times as fast as PyTorch eager; None where that did not run.
        first_seconds: the first call, with planning and compiling.
        calls: how many were measured.
        error: largest difference from PyTorch's stored answers, relative to their largest value.
        tolerance: that ``error`` is held to.
        failed: why it did not run; the figures are None then.
    """

    batch: int
    variant: str
    median_ms: float | None = None
    p99_ms: float | None = None
    images_per_second: float | None = None
    ratio: float | None = None
    first_seconds: float | None = None
    calls: int = 0
    error: float | None = None
    tolerance: float | None = None
    failed: str = ""

    @property
    def wrong(self) -> bool:
        """Whether it ran and gave something else than the model's answers."""
        return self.tolerance is not None and not (self.error is not None and self.error <= self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "wrong": self.wrong}


def make_rows(
    batch: int, timings: Mapping[str, Timing], expected: np.ndarray, tolerances: Mapping[str, float]
) -> list[Row]:
    """The rows of one batch size.

    Args:
        batch: N.
        timings: by variant.
        expected: the model's answers to the images, (N, D).
        tolerances: by variant, relative to the largest value of ``expected``.
    """
    eager = timings.get("eager")
    base = eager.median if eager and not eager.failed else None
    return [_row(batch, name, timing, expected, tolerances[name], base) for name, timing in timings.items()]


def _row(
    batch: int, name: str, timing: Timing, expected: np.ndarray, tolerance: float, base: float | None
) -> Row:
    if timing.failed:
        return Row(batch, name, failed=timing.failed)
    return Row(
        batch,
        name,
        median_ms=1e3 * timing.median,
        p99_ms=1e3 * timing.p99,
        images_per_second=batch / timing.median,
        ratio=base / timing.median if base else None,
        first_seconds=timing.first,
        calls=len(timing.calls),
        error=_relative_error(expected, timing.output),
        tolerance=tolerance,
    )


def _relative_error(expected: np.ndarray, found: np.ndarray | None) -> float | None:
    """None where nothing can be compared: another shape, NaN, infinity."""
    if found is None or found.shape != expected.shape or not np.isfinite(found).all():
        return None
    return float(np.abs(found.astype(np.float64) - expected).max() / (np.abs(expected).max() or 1.0))


def speed_up(rows: Sequence[Row]) -> float | None:
    """Geometric mean over the batch sizes of how many times as fast as eager ONNX Runtime is."""
    ratios = [row.ratio for row in rows if row.variant == ONNX and row.ratio]
    return float(np.exp(np.log(ratios).mean())) if ratios else None


def to_text(rows: Sequence[Row]) -> str:
    """A table, batch size by batch size, the fastest first, and a line for each that failed or is wrong."""
    head = ["batch", "variant", "median ms", "p99 ms", "images/s", "times eager", "first s", "calls", "error"]
    ran = sorted((row for row in rows if not row.failed), key=lambda row: (row.batch, row.median_ms or 0))
    cells = [head, *(_cells(row) for row in ran)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    lines += [f"batch {row.batch}: {row.variant} did not run: {row.failed}" for row in rows if row.failed]
    lines += [f"batch {row.batch}: {row.variant} {_wrong(row)}" for row in ran if row.wrong]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    return [
        str(row.batch),
        row.variant,
        f"{row.median_ms:.2f}",
        f"{row.p99_ms:.2f}",
        f"{row.images_per_second:.1f}",
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        f"{row.first_seconds:.2f}",
        str(row.calls),
        "-" if row.error is None else f"{row.error:.1e}",
    ]


def _wrong(row: Row) -> str:
    if row.error is None:
        return "gives NaN, infinity or another shape: its time says nothing"
    return f"is off by {row.error:.1e} (tolerance {row.tolerance:.1e}): its time says nothing"


def draw(rows: Sequence[Row]) -> str:
    """Bars as SVG: how many times as fast as eager, or images per second where eager did not run. What
    failed or is wrong has none."""
    from tldist.pictures import as_file, bars  # needs matplotlib; the table does without

    shown = [row for row in rows if not row.failed and not row.wrong]
    compared = any(row.ratio for row in shown)
    names = [f"{row.batch}: {row.variant.replace('channels_last', 'NHWC')}" for row in shown]  # short
    values = [(row.ratio if compared else row.images_per_second) or 0.0 for row in shown]
    label = "batch size: times as fast as PyTorch eager" if compared else "batch size: images per second"
    return as_file(bars(names, values, [0.0] * len(values), label))
