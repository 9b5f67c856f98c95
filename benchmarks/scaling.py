"""What a run costs against batch, resolution, steps and threads, with the shipped architecture, and a model of it.

    python -m benchmarks.scaling --json docs/scaling.json --plot docs/scaling.png

A step takes a + b * (images * pixels) seconds, a and b fitted to the smallest squares of relative errors for each
number of threads; a run is its steps. `ddpm-fast sample --estimate` needs no model: it times the run's own first steps.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

import ddpm_fast as df
from benchmarks import study
from benchmarks.study import Row
from ddpm_fast.cli.network import open_network

BATCHES = [(samples, 28) for samples in (1, 2, 4, 8, 16, 32)]
SIDES = [(4, side) for side in (16, 20, 40, 56)]
STEPS = 4


def measure(seconds: float) -> list[Row]:
    """Seconds a step, the median of several runs, which take turns so that a slow minute meets all of them."""
    network = open_network(None)
    sampler = df.Sampler(network.model.eval(), network.schedule, steps=STEPS)
    threads = [n for n in (1, 2, 4, 8) if n <= torch.get_num_threads()]
    cases = [(count, samples, side) for count in threads for samples, side in BATCHES + SIDES]
    times: dict[tuple[int, int, int], list[float]] = {case: [] for case in cases}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[cases[-1]]) < 3:
        for count, samples, side in cases:
            torch.set_num_threads(count)
            begun = time.perf_counter()
            sampler.sample((samples, 1, side, side), seed=0)
            times[count, samples, side].append((time.perf_counter() - begun) / STEPS)
    return [
        {"threads": count, "samples": samples, "side": side, "seconds": median(times[count, samples, side])}
        for count, samples, side in cases
    ]


def fit(rows: list[Row]) -> tuple[float, float]:
    """a and b, in seconds and in seconds a pixel."""
    x = torch.tensor([[1.0, row["samples"] * row["side"] ** 2] for row in rows], dtype=torch.float64)
    y = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    a, b = torch.linalg.lstsq(x / y[:, None], torch.ones_like(y)[:, None]).solution.flatten().tolist()
    return a, b


def table(rows: list[Row]) -> str:
    lines = ["| threads | images | side | ms a step | ms an image | model, ms |", "| --- " * 6 + "|"]
    for count in sorted({row["threads"] for row in rows}):
        own = [row for row in rows if row["threads"] == count]
        a, b = fit(own)
        for row in own:
            model = 1e3 * (a + b * row["samples"] * row["side"] ** 2)
            samples, step = row["samples"], 1e3 * row["seconds"]
            lines.append(f"| {count} | {samples} | {row['side']} | {step:.1f} | {step / samples:.2f} | {model:.1f} |")
        lines.append(f"| {count} | | | {1e3 * a:.2f} + {1e6 * b:.3f} x thousand pixels | | |")
    return "\n".join(lines)


def draw(rows: list[Row], axes: Any) -> None:
    for count in sorted({row["threads"] for row in rows}):
        own = [row for row in rows if row["threads"] == count]
        a, b = fit(own)
        for marker, name, chosen in (
            ("o", "28x28, more images", [row for row in own if row["side"] == 28]),
            ("s", "4 images, larger", [row for row in own if row["side"] != 28]),
        ):
            pixels = [row["samples"] * row["side"] ** 2 for row in chosen]
            times = [1e3 * row["seconds"] for row in chosen]
            axes.plot(pixels, times, marker, color=f"C{count - 1}", label=f"{name}, threads: {count}", markersize=4)
        ends = sorted(row["samples"] * row["side"] ** 2 for row in own)
        axes.plot(ends, [1e3 * (a + b * n) for n in ends], color=f"C{count - 1}", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="images x pixels", ylabel="ms a step")


def main() -> None:
    parser = study.parser("scaling", __doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="how long to measure")
    arguments = parser.parse_args()
    if not arguments.json.exists():
        study.save(measure(arguments.seconds), arguments.json)
    study.show(arguments, table, draw)


if __name__ == "__main__":
    main()
