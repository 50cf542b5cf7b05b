"""Helpers of all benchmarks: medians, the machine's own rate, tables and charts."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path("build/benchmarks")


def median_s(run: Callable[[], object], budget_s: float = 3.0, least: int = 5, most: int = 31) -> float:
    """The median time of a call after a warm-up call, over as many calls as fit the budget, within limits."""
    run()
    times: list[float] = []
    while len(times) < least or (sum(times) < budget_s and len(times) < most):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def matrix_product_gflops() -> float:
    """The machine's float32 rate: the better median of torch's and NumPy's matrix products."""
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    x, y = a.numpy(), b.numpy()
    best_s = min(median_s(lambda: a @ b, 2.0), median_s(lambda: np.matmul(x, y), 2.0))
    return 2 * size**3 / best_s / 1e9


def machine() -> dict[str, Any]:
    """The hardware and software of the measurement."""
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    return {
        "processor": model,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def report(name: str, heading: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Print a table for people and write it as JSON for machines."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    print(f"\n{heading}\n{machine()}")
    for line in [columns, *cells]:
        print(
            "  ".join(
                text.rjust(width) if i else text.ljust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            )
        )
    (RESULTS / name).parent.mkdir(parents=True, exist_ok=True)
    content = {"heading": heading, "machine": machine(), "rows": list(rows), **more}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"{RESULTS / name}.json", file=sys.stderr)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def bars(name: str, heading: str, unit: str, series: Mapping[str, Mapping[str, float]]) -> None:
    """Draw horizontal bars, a group for each key of the inner mappings, and write them as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(group for values in series.values() for group in values))
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.28 * len(series) * len(groups)), layout="constrained")
    height = 0.8 / len(series)
    for index, (label, values) in enumerate(series.items()):
        at = [groups.index(group) + index * height for group in values]
        drawn = axes.barh(at, list(values.values()), height, label=label)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(heading, fontsize=10)
    if len(series) > 1:
        axes.legend(fontsize=8)
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    print(f"{RESULTS / name}.png", file=sys.stderr)
