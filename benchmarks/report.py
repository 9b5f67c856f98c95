"""The table of results, printed after a run and written into a document from a saved one.

python -m benchmarks.report results.json                               prints it
python -m benchmarks.report results.json --into docs/performance.md    replaces what stands between the two markers
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_fast import backends

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

Row = dict[str, Any]


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    if backends.missing["cpu"] is None:
        from ddpm_fast._C import cpu_isa

        isa = cpu_isa()
    else:
        isa = "none: the extension is not built, everything runs on the reference backend"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "CPU": f"{model}, {cores} cores",
        "our kernels": isa,
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "diffusers": importlib.metadata.version("diffusers"),
        "Python": platform.python_version(),
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
    }


def render(rows: Sequence[Row], header: dict[str, str]) -> str:
    """Machine, summary and table, in Markdown that reads well as it is."""
    rows = sorted(rows, key=lambda row: row["threads"])
    threads = dict.fromkeys(str(row["threads"]) for row in rows)
    lines = [f"{name}: {value}" for name, value in {**header, "threads": ", ".join(threads)}.items()]
    failed = [row for row in rows if "failure" in row]
    slower = [f"{' '.join(cells(row)[:4])} ({row['ratio']:.2f})" for row in rows if row.get("ratio", 1.0) < 1.0]
    parts = ["  \n".join(lines)]
    if summary := _summary(rows):
        parts.append(aligned(_SUMMARY, summary))
    parts.append(aligned(_COLUMNS, map(cells, rows)))
    parts.append(f"Slower than the fastest peer: {'; '.join(slower) or 'none'}.")
    parts += [f"FAILED {' '.join(cells(row)[:4])}: {row['failure']}" for row in failed]
    return "\n\n".join(parts) + "\n"


_COLUMNS = (
    "what",
    "shape",
    "layout",
    "dtype",
    "threads",
    "ours p50 (p20-p80)",
    "others p50",
    "ratio",
    "at least / aim",
    "x floor",
    "error",
    "check",
)


def cells(row: Row) -> list[str]:
    what = row["what"] + (f", {row['note']}" if row["note"] else "")
    fixed = [what, "x".join(map(str, row["shape"])), row["layout"], row["dtype"], str(row["threads"])]
    if "times" not in row:
        failed = "failure" in row
        return [*fixed, "", "", "", _target(row), "", "" if failed else _error(row), "FAILED" if failed else "passed"]
    times = dict(row["times"])
    ours = times.pop("ours")
    return [
        *fixed,
        f"{duration(ours['p50'])} ({duration(ours['p20'])}-{duration(ours['p80'])})",
        ", ".join(f"{name} {duration(time['p50'])}" for name, time in times.items()),
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        _target(row),
        f"{row['floors']:.2f}" if "floors" in row else "",
        _error(row),
        "passed",
    ]


_SUMMARY = ("what", "threads", "lowest ratio", "median", "highest", "at least / aim", "rows at least", "rows at aim")


def _summary(rows: Iterable[Row]) -> list[list[str]]:
    """A line for each kind of row that has a target."""
    groups: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if "target" in row and "times" in row:
            groups.setdefault(row["what"], {}).setdefault(row["threads"], []).append(row)
    lines = []
    for what, threads, members in ((what, n, m) for what, group in groups.items() for n, m in group.items()):
        target = members[0]["target"]
        floor = "at_most" in target
        ratios = [row["floors" if floor else "ratio"] for row in members]
        low, aim = target["at_most"] if floor else target["at_least"], target["aim"]
        at_least, at_aim = (sum(r <= bound if floor else r >= bound for r in ratios) for bound in (low, aim))
        lines.append(
            [
                what + (" (x floor)" if floor else ""),
                str(threads),
                *(f"{value:.2f}" for value in (min(ratios), statistics.median(ratios), max(ratios))),
                _target(members[0]),
                f"{at_least} of {len(ratios)}",
                f"{at_aim} of {len(ratios)}",
            ]
        )
    return lines


def _target(row: Row) -> str:
    target = row.get("target")
    if target is None:
        return ""
    if "at_most" in target:
        return f"<= {target['at_most']} / {target['aim']} x floor"
    return f"{target['at_least']} / {target['aim']}"


def _error(row: Row) -> str:
    return f"{row['error']:.1e}" if row["error"] else "0"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("us", 1e6), ("ms", 1e3), ("s", 1.0)):
        value = seconds * factor
        if value < 1000 or unit == "s":
            return f"{value:.{max(0, 2 - max(0, math.floor(math.log10(value))))}f} {unit}"
    raise AssertionError


def aligned(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns of one width."""
    lines = [header, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Shows saved results.")
    parser.add_argument("results", type=Path, help="what pytest benchmarks/ --benchmark-json=FILE wrote")
    parser.add_argument("--into", type=Path, help="a document with the two markers to write them into")
    arguments = parser.parse_args()
    saved = json.loads(arguments.results.read_text())
    rows = [b["extra_info"]["row"] for b in saved["benchmarks"] if "row" in b["extra_info"]]
    text = render(rows, saved["machine_info"]["ddpm_fast"])
    if arguments.into is None:
        print(text)
        return
    document = arguments.into.read_text()
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        parser.error(f"{arguments.into} must hold the lines {BEGIN} and {END} once each")
    before, rest = document.split(BEGIN)
    arguments.into.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
