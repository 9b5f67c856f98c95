"""The sampling loop as a CUDA graph: what can be seen of it without a GPU. tests/gpu/test_device.py replays one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.sampler import graph
from ddpm_fast.sampler.graph import GraphedSteps, graphed, obstacle
from ddpm_fast.sampler.run import Run

SCHEDULE = df.NoiseSchedule.linear(100)
SHAPE = (2, 3, 8, 8)


def model(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
    offset = sum(value.view(-1, 1, 1, 1) for value in kwargs.values()) if kwargs else 0.0
    return 0.1 * x + 0.001 * t.view(-1, 1, 1, 1) + offset


def wide_model(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([model(x, t), model(x, t).sin()], dim=1)


def runs(sampler: df.Sampler, **kwargs: Any) -> Run:
    arguments: dict[str, Any] = dict.fromkeys(
        ("sample_ids", "x_T", "noise", "generator", "model_kwargs", "uncond_kwargs", "out")
    )
    arguments |= {"seed": 7} | kwargs
    return sampler._run(SHAPE, **arguments, inpainting=(None, None, "before", 1))


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "learned variance": {"variance": "learned_range", "model": wide_model},
    "ddim": {"solver": "ddim", "eta": 0.5, "steps": 10},
    "euler_ancestral": {"solver": "euler_ancestral", "steps": 10},
    "threshold": {"threshold": 0.9},
    "scaled time": {"time_input": "scaled"},
    "diffusers": {"reference": "diffusers", "solver": "ddim", "steps": 10},
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_what_is_captured_makes_the_loops_steps(options: dict[str, Any]) -> None:
    """The step that a graph records, called with a number in memory that counts up, gives the images of the loop."""
    options = dict(options)
    sampler = df.Sampler(options.pop("model", model), SCHEDULE, **options)
    run, number = runs(sampler), torch.zeros(1, dtype=torch.int64)
    for _ in range(sampler.steps):
        run.make(number)
        number += 1
    assert torch.equal(run.x, sampler.sample(SHAPE, seed=7))


def test_guidance_is_captured_too() -> None:
    sampler = df.Sampler(model, SCHEDULE, guidance_scale=2.0)
    kwargs = {"model_kwargs": {"y": torch.ones(2)}, "uncond_kwargs": {"y": torch.zeros(2)}}
    run, number = runs(sampler, **kwargs), torch.zeros(1, dtype=torch.int64)
    for _ in range(sampler.steps):
        run.make(number)
        number += 1
    assert torch.equal(run.x, sampler.sample(SHAPE, seed=7, **kwargs))


@contextlib.contextmanager
def no_device(capture_error: str | None = None) -> Iterator[list[str]]:
    """torch.cuda's part played by lists: what is recorded is what a replay repeats."""
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")
            replays[0]()

    replays: list[Any] = []

    @contextlib.contextmanager
    def record(recorded: Graph) -> Iterator[None]:
        if capture_error is not None:
            raise RuntimeError(capture_error)
        events.append("capture")
        with mock.patch.object(GraphedSteps, "_once", lambda steps: replays.append(lambda: once(steps))):
            yield

    once = GraphedSteps._once
    nothing = mock.MagicMock()
    with (
        mock.patch.object(torch.cuda, "CUDAGraph", Graph),
        mock.patch.object(torch.cuda, "graph", record),
        mock.patch.multiple(torch.cuda, current_stream=nothing, Stream=nothing, stream=nothing, device=nothing),
        mock.patch.object(graph, "obstacle", return_value=None),
    ):
        yield events


def test_one_step_is_made_one_captured_and_the_rest_replayed() -> None:
    with no_device() as events:
        got = df.Sampler(model, SCHEDULE, steps=5, cuda_graph=True).sample(SHAPE, seed=7)
    assert events == ["capture", *["replay"] * 4]
    assert torch.equal(got, df.Sampler(model, SCHEDULE, steps=5).sample(SHAPE, seed=7))


def test_a_model_that_cannot_be_captured_runs_without_a_graph_and_says_so_once() -> None:
    with no_device("operation not permitted when stream is capturing"):
        with pytest.warns(
            RuntimeWarning, match="cannot be captured in a CUDA graph, and runs without: operation"
        ) as seen:
            got = df.Sampler(model, SCHEDULE, steps=5).sample(SHAPE, seed=7)
        assert len(seen) == 1
        with pytest.raises(RuntimeError, match="not permitted"):
            df.Sampler(model, SCHEDULE, steps=5, cuda_graph=True).sample(SHAPE, seed=7)
    assert torch.equal(got, df.Sampler(model, SCHEDULE, steps=5).sample(SHAPE, seed=7))


def test_states_are_not_made_by_a_graph() -> None:
    with no_device() as events:
        states = list(df.Sampler(model, SCHEDULE, steps=5).stream(SHAPE, seed=7))
    assert len(states) == 5
    assert not events


def test_where_a_graph_is_not_possible_it_is_an_error_to_insist() -> None:
    with pytest.raises(ValueError, match="cuda_graph=True is not possible here: the samples are on cpu"):
        df.Sampler(model, SCHEDULE, cuda_graph=True).sample(SHAPE)
    with pytest.raises(ValueError, match="cuda_graph must be 'auto', True or False, got 'yes'"):
        df.Sampler(model, SCHEDULE, cuda_graph="yes")  # type: ignore[arg-type]


class Device:
    """A run's state, as `obstacle` looks at it, on a GPU that is not there."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "kwargs", "message"),
    [
        ({}, {}, None),
        ({"solver": "plms", "steps": 10}, {}, "keeps something of the step before"),
        ({"solver": "heun", "steps": 10}, {}, "keeps something of the step before"),
        ({"self_condition": True}, {}, "keeps something of the step before"),
        ({"denoised_fn": torch.tanh}, {}, "may do anything"),
        ({"cond_fn": lambda x, t: x}, {}, "may do anything"),
        ({}, {"noise": lambda draw, t, shape: torch.zeros(shape)}, "does not come from a seed"),
        ({}, {"generator": torch.Generator()}, "does not come from a seed"),
        ({"corrector_steps": 1}, {}, "updates of its own"),
        ({"steps": 2}, {}, "too few"),
    ],
    ids=[
        "none",
        "plms",
        "heun",
        "self_condition",
        "denoised_fn",
        "cond_fn",
        "noise",
        "generator",
        "corrector",
        "two steps",
    ],
)
def test_obstacles(options: dict[str, Any], kwargs: dict[str, Any], message: str | None) -> None:
    run = runs(df.Sampler(model, SCHEDULE, **options), **kwargs)
    run.x = Device()  # type: ignore[assignment]
    reason = obstacle(run)
    assert (reason is None) == (message is None)
    assert message is None or (reason is not None and message in reason)


def test_auto_takes_no_graph_on_the_cpu() -> None:
    run = runs(df.Sampler(nn.Identity(), SCHEDULE))
    assert graphed(run, "auto") is None
    assert graphed(run, False) is None
