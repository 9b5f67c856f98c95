"""What fewer steps cost: seconds against Frechet distance on the shipped checkpoint, as a table and a plot.

    python -m benchmarks.fewer_steps --data /usr/share/datasets/fashion-mnist --json docs/fewer_steps.json
    python -m benchmarks.fewer_steps --plot docs/fewer_steps.png --json docs/fewer_steps.json

The first command measures (what is in the file already is not made again), the second draws what was measured. One
thread draws, and its processor time is counted: another program on the machine changes the caches, but not the clock.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

import ddpm_fast as df
from benchmarks import study
from benchmarks.study import Row
from ddpm_fast.cli.evaluate import real_images
from ddpm_fast.cli.network import open_network
from ddpm_fast.evaluation import evaluate, to_uint8, train_classifier

RUNS = [(solver, steps) for solver in ("ddim", "dpmpp_2m") for steps in (10, 20, 50)]
RUNS += [("ddpm", 50)]
NAMES = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)", "ddpm": "DDPM, ancestral"}
BATCH = 50


def sample(solver: str, steps: int, count: int) -> tuple[torch.Tensor, float]:
    """The samples, and the processor seconds that they took."""
    network = open_network(None)
    sampler = df.Sampler(network.model.eval(), network.schedule, solver=solver, steps=steps)
    batches = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
    sampler.sample((len(batches[0]), *network.shape), seed=1, sample_ids=batches[0])
    start = time.process_time()
    x = [sampler.sample((len(ids), *network.shape), seed=0, sample_ids=ids) for ids in batches]
    return torch.cat(x), time.process_time() - start


def measure(data: Path, count: int, file: Path) -> None:
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    done = {(row["solver"], row["steps"]) for row in rows}
    train, test = real_images("fashion-mnist", data)
    classifier = train_classifier(train)
    for solver, steps in RUNS:
        if (solver, steps) in done:
            continue
        x, seconds = sample(solver, steps, count)
        scores = evaluate(to_uint8(x), train, test, classifier=classifier)
        rows.append(
            {
                "solver": solver,
                "steps": steps,
                "images": count,
                "seconds": seconds,
                "frechet": scores.samples.frechet,
                "frechet_test": scores.test.frechet,
                "confidence": scores.samples.confidence,
            }
        )
        study.save(rows, file)


def table(rows: list[Row]) -> str:
    lines = ["| solver | steps | seconds | ms an image | Frechet distance | confidence |", "| --- " * 6 + "|"]
    for row in rows:
        lines.append(
            f"| {NAMES[row['solver']]} | {row['steps']} | {row['seconds']:.1f} | "
            f"{1e3 * row['seconds'] / row['images']:.0f} | {row['frechet']:.1f} | {row['confidence']:.3f} |"
        )
    images = rows[0]["images"]
    return "\n".join([*lines, "", f"{images} images each; {images} real test images: {rows[0]['frechet_test']:.1f}"])


def draw(rows: list[Row], axes: Any) -> None:
    for solver, name in NAMES.items():
        own = sorted((row for row in rows if row["solver"] == solver), key=lambda row: row["steps"])
        milliseconds = [1e3 * row["seconds"] / row["images"] for row in own]
        axes.plot(milliseconds, [row["frechet"] for row in own], "o-", label=name, markersize=4)
        for row, x in zip(own, milliseconds, strict=True):
            axes.annotate(str(row["steps"]), (x, row["frechet"]), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.axhline(rows[0]["frechet_test"], color="grey", linestyle=":", label="real test images")
    axes.set(xscale="log", yscale="log", xlabel="processor milliseconds an image", ylabel="Frechet distance")


def main() -> None:
    parser = study.parser("fewer_steps", __doc__)
    parser.add_argument("--data", type=Path, help="measure: the folder of Fashion-MNIST's IDX files")
    parser.add_argument("-n", type=int, default=1000, help="images for each solver and number of steps")
    arguments = parser.parse_args()
    if arguments.data is not None:
        measure(arguments.data, arguments.n, arguments.json)
    study.show(arguments, table, draw)


if __name__ == "__main__":
    main()
