"""A pytest plugin, for `-p`: the tests of the CUDA backend run its kernels on the host instead of from their PTX.

Everything else is as in `tests.gpu.simulate`: host code, operators, NaNs in new memory. Tests that look into the PTX,
or at what the simulator counts, cannot run with it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu import cuda_library, cuda_runs, simulate
from tests.gpu.host.library import HostLibrary

LIBRARY = "DDPM_FAST_HOST_LIBRARY"  # the environment's name for the file


def pytest_configure(config: pytest.Config) -> None:
    library = HostLibrary(Path(os.environ[LIBRARY]))

    def launch(simulation: simulate._Simulation, launched: cuda_library.FakeLaunch) -> int:
        simulation.note(
            launched.kernel.decode(), launched.grid, launched.block[0], launched.shared, launched.cluster, ({}, None)
        )
        return library.run(launched)

    cuda_library.library = lambda: library  # type: ignore[assignment]
    simulate._Simulation.launch_cuda = launch  # type: ignore[method-assign, assignment]
    cuda_runs.SCHEDULES = ({},)  # type: ignore[attr-defined]  # the operating system's
