"""The memory of a training step, which docs/training.md promises to be less than eager PyTorch's."""

from __future__ import annotations

import pytest

from benchmarks.training import PEERS, eager_network, network
from benchmarks.training_memory import peak_in_a_process, saved_by_norms


def test_norms_and_activations_keep_at_least_30_percent_less() -> None:
    shape = (4, 1, 28, 28)
    ours = saved_by_norms(network(), shape)
    for layout in ("contiguous", "channels_last"):
        assert ours <= 0.7 * saved_by_norms(eager_network(layout), shape)


@pytest.mark.slow
def test_a_whole_steps_peak_is_below_eagers() -> None:
    ours = peak_in_a_process("ours")
    assert all(ours < peak_in_a_process(name) for name in PEERS)
