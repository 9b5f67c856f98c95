"""What the studies share: measurements are kept in a file, printed as a table and drawn as a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--json", type=Path, required=True, help="the measurements: what is there is not made again")
    made.add_argument("--plot", type=Path, help="draw the measurements into this file")
    return made


def save(rows: list[Row], file: Path) -> None:
    file.write_text(json.dumps(rows, indent=1) + "\n")


def show(
    arguments: argparse.Namespace, table: Callable[[list[Row]], str], draw: Callable[[list[Row], Any], None]
) -> None:
    rows = json.loads(arguments.json.read_text())
    print(table(rows))
    if arguments.plot is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 3.4), dpi=90, layout="constrained")
        axes = figure.subplots()
        draw(rows, axes)
        axes.legend(fontsize=8)
        figure.savefig(arguments.plot)
