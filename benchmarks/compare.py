"""Two saved runs side by side: python -m benchmarks.compare --base OLD.json NEW.json

A machine is never the same twice, so the last column, how our ratio to the fastest peer changed, says more than the
times: below 1 we lost ground.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.report import Row, aligned, duration


def rows(path: Path) -> dict[str, Row]:
    saved = json.loads(path.read_text())
    return {b["fullname"]: b["extra_info"]["row"] for b in saved["benchmarks"] if "row" in b["extra_info"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Compares two saved runs.")
    parser.add_argument("new", type=Path, help="what pytest benchmarks/ --benchmark-json=FILE wrote")
    parser.add_argument("--base", type=Path, required=True, help="the same of the state to compare with")
    arguments = parser.parse_args()
    base, new = rows(arguments.base), rows(arguments.new)
    lines = []
    for name in base.keys() & new.keys():
        before, after = (duration(row["times"]["ours"]["p50"]) for row in (base[name], new[name]))
        ratios = [row.get("ratio") for row in (base[name], new[name])]
        change = f"{ratios[1] / ratios[0]:.2f}" if None not in ratios else ""
        lines.append([name.removeprefix("benchmarks/"), before, after, change])
    print(aligned(("case", "base", "new", "ratio, new / base"), sorted(lines)))


if __name__ == "__main__":
    main()
