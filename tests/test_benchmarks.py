"""The benchmarks' harness: what it reports, and that nothing wrong is given a speed-up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

import benchmarks
import ddpm_fast
from benchmarks import report
from benchmarks.harness import QUICK, Case, FloorTarget, Moment, Target, measure, summary

pytest_plugins = ["pytester"]

TINY = """
    import pytest, torch
    from benchmarks.harness import Case, Target

    def check():
        assert {condition}, "the answer is wrong"
        return 0.0

    def test_case(measure):
        x, out = torch.randn(256), torch.empty(256)
        measure(
            Case(
                what="addition",
                shape=(256,),
                ours=lambda: torch.add(x, x, out=out),
                peers={{"one by one": lambda: [float(v) + float(v) for v in x[:64]]}},
                floors={{"copy_": lambda: out.copy_(x)}},
                check=check,
                target=Target(1.5, 2.0),
            )
        )
"""


def run(pytester: pytest.Pytester, condition: str, *arguments: str) -> pytest.RunResult:
    return run_source(pytester, TINY.format(condition=condition), *arguments)


def run_source(pytester: pytest.Pytester, source: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(test_tiny=source)
    options = (
        "-p",
        "no:hypothesispytest",
        "-p",
        "benchmarks.conftest",
        "--benchmark-only",
        "--quick",
        "--threads",
        "1",
    )
    return pytester.runpytest_inprocess(*options, *arguments)


def case(**changes: object) -> Case:
    nothing = lambda: None  # noqa: E731
    arguments = {"what": "case", "shape": (1,), "ours": nothing, "check": lambda: 0.0, **changes}
    return Case(**{"peers": {"a": nothing, "b": nothing}, "floors": {"f": nothing}, **arguments})


def test_the_ratio_is_the_median_of_the_rounds_ratios_against_the_fastest_peer() -> None:
    # A machine that becomes slower and slower: the ratio of the medians would be 8 / 2 = 4.
    times = {"ours": [1.0, 2.0, 4.0], "a": [3.0, 8.0, 12.0], "b": [9.0, 9.0, 9.0], "f": [0.5, 0.5, 1.0]}
    result = summary(times, case())
    assert result["fastest_peer"] == "a"
    assert result["ratio"] == 3.0
    assert result["floors"] == 4.0
    assert result["times"]["ours"] == {"p20": pytest.approx(1.4), "p50": 2.0, "p80": pytest.approx(3.2)}


def test_times_are_those_of_a_step() -> None:
    times = {"ours": [10.0] * 3, "a": [30.0] * 3, "b": [40.0] * 3, "f": [5.0] * 3}
    result = summary(times, case(steps=10))
    assert result["times"]["ours"]["p50"] == 1.0
    assert result["ratio"] == 3.0


def test_a_case_is_timed_and_shown(pytester: pytest.Pytester) -> None:
    result = run(pytester, "True", "--benchmark-json", "results.json", "--csv", "rows.csv")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["CPU: *", "our kernels: *", "threads: 1", "| addition *| passed |"])

    (benchmark,) = json.loads((pytester.path / "results.json").read_text())["benchmarks"]
    row = benchmark["extra_info"]["row"]
    # Five rounds of our side in pytest-benchmark's own table too; no time is asserted, only how times become a row.
    assert benchmark["stats"]["rounds"] == row["rounds"]
    assert benchmark["stats"]["median"] == pytest.approx(row["times"]["ours"]["p50"])
    assert set(row["times"]) == {"ours", "one by one", "copy_"}
    assert row["ratio"] > 0
    assert len((pytester.path / "rows.csv").read_text().splitlines()) == 1 + len(row["times"])


def test_nothing_wrong_is_given_a_ratio(pytester: pytest.Pytester) -> None:
    result = run(pytester, "False", "--benchmark-json", "results.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["| addition *|  * | FAILED |", "FAILED addition*: the answer is wrong"])
    (line,) = [line for line in result.outlines if line.startswith("| addition")]
    fields = dict(zip(report._COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
    assert (fields["ratio"], fields["ours p50 (p20-p80)"], fields["others p50"], fields["x floor"]) == ("", "", "", "")
    assert not (pytester.path / "results.json").exists()  # nothing was timed


def names(folder: Path, prefix: str = "") -> set[str]:
    return {path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}[!_]*.py")}


def test_an_op_has_one_name_everywhere() -> None:
    package, here = Path(ddpm_fast.__file__).parent, Path(__file__).parent
    ops = names(package / "ops")
    assert names(package / "backends" / "reference") == ops
    assert ops <= names(here / "ops", "test_")
    assert ops <= names(Path(benchmarks.__file__).parent, "bench_")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("bound", ["divergence, fixed_small", "divergence, learned_range", "divergence and gradient", "decoder"]),
        ("target_loss", ["noise drawn again, epsilon", "noise drawn again, v", "noise given, epsilon"]),
        ("quantile", ["quantile of magnitudes"]),
    ],
)
def test_benchmarks_of_small_ops_run(pytester: pytest.Pytester, name: str, rows: list[str]) -> None:
    """The others run for minutes: `python -m benchmarks --quick` runs all."""
    result = run_source(pytester, f"from benchmarks.bench_{name} import *", "-k", "64x1x28x28 and not channels_last")
    assert result.parseoutcomes()["passed"] == len(rows)
    for row in rows:
        result.stdout.fnmatch_lines([f"| *{row}* | 64x1x28x28 *| passed |"])


@pytest.mark.parametrize(
    ("target", "rows", "expected"),
    [
        (Target(2.0, 4.0), [1.9, 2.0, 5.0], ["1.90", "2.00", "5.00", "2.0 / 4.0", "2 of 3", "1 of 3"]),
        (FloorTarget(2.0, 1.5), [1.5, 1.9, 2.1], ["1.50", "1.90", "2.10", "<= 2.0 / 1.5 x floor", "2 of 3", "1 of 3"]),
    ],
    ids=["ratio", "floor"],
)
def test_the_summary_counts_the_rows_that_reach_their_target(
    target: Target | FloorTarget, rows: list[float], expected: list[str]
) -> None:
    key = "ratio" if isinstance(target, Target) else "floors"
    described = [{"what": "w", "threads": 1, "times": {}, "target": vars(target), key: value} for value in rows]
    ((what, threads, *rest),) = report._summary(described)
    assert (what.split()[0], threads) == ("w", "1")
    assert rest == expected


def test_results_are_written_between_the_markers(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pytester, "True", "--benchmark-json", "results.json")
    document = pytester.path / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["report", "results.json", "--into", str(document)])
    report.main()
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "| addition" in text
    assert "old" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.93e-6, "2.93 us"), (9.87e-5, "98.7 us"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (12.0, "12.0 s")],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_without_a_gpu_nothing_is_measured_on_one(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run(pytester, "True", "--device", "cuda", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*--device cuda: torch finds no GPU"])


def test_on_a_gpu_events_time_single_calls_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU of our own, whose time is what it has been given to do: a flush takes 100 s, a call one or three."""
    given: list[str] = []
    seconds = {"flush": 100.0, "ours": 1.0, "peer": 3.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(given)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, later: Event) -> float:
            return 1e3 * sum(seconds[work] for work in given[self.at : later.at])

    monkeypatch.setattr("torch.cuda.Event", Event)

    class Fixture:
        """What is used of pytest-benchmark's: rounds of a set-up, a timed call and a teardown."""

        enabled = True
        stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
        extra_info: ClassVar[dict[str, object]] = {}

        def pedantic(self, run: Any, rounds: int, iterations: int, setup: Any, teardown: Any) -> None:
            for _ in range(rounds):
                assert setup() is None
                start = Moment()
                for _ in range(iterations):
                    run()
                self.stats.stats.data.append(Moment() - start)
                teardown()

    row: dict[str, object] = {}
    one = case(
        ours=lambda: given.append("ours"), peers={"a": lambda: given.append("peer")}, floors={}, target=Target(2.0, 4.0)
    )
    measure(one, Fixture(), QUICK, row, Moment, lambda: given.append("flush"))
    assert row["ratio"] == 3.0
    assert given[-4:] == ["flush", "ours", "flush", "peer"]
