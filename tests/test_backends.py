"""Which backend a call uses."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

import ddpm_fast as df
from ddpm_fast import backends, selftest


def test_the_extension_is_there() -> None:
    assert df.available_backends() == ["reference", "cpu"]
    assert backends.missing["cpu"] is None


def test_the_best_backend_is_chosen_and_float64_is_the_references() -> None:
    assert backends.choose(torch.empty(1)) == "cpu"
    assert backends.choose(torch.empty(1, dtype=torch.bfloat16)) == "cpu"
    assert backends.choose(torch.empty(1, dtype=torch.float64)) == "reference"
    assert backends.choose(torch.empty(1, device="meta")) == "reference"


def test_use_backend_nests_and_restores_after_an_error() -> None:
    with df.use_backend("reference"):
        with contextlib.suppress(RuntimeError), df.use_backend("cpu"):
            assert backends.choose(torch.empty(1)) == "cpu"
            raise RuntimeError("inside")
        assert backends.choose(torch.empty(1)) == "reference"
    assert backends.choose(torch.empty(1)) == "cpu"


def test_an_unknown_backend_is_named() -> None:
    with (
        pytest.raises(ValueError, match="'nonsense' is not available; available are"),
        df.use_backend("nonsense"),
    ):
        pass


def test_a_forced_backend_refuses_what_it_does_not_take() -> None:
    with df.use_backend("cpu"), pytest.raises(ValueError, match="takes float32, float16 and bfloat16"):
        df.randn((1, 4), dtype=torch.float64)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_check_of_the_noise_passes_where_it_is_right(name: str) -> None:
    assert backends.check_noise(getattr(torch.ops.ddpm_fast.normal, name), torch.device("cpu")) is None


def test_the_check_of_the_noise_sees_one_wrong_bit_and_names_an_error() -> None:
    def one_bit(out: torch.Tensor, *arguments: Any) -> None:
        torch.ops.ddpm_fast.normal.reference(out, *arguments)
        out.view(torch.int32)[0, 5] ^= 1

    def broken(*arguments: Any) -> None:
        raise RuntimeError("no kernel image is available")

    assert backends.check_noise(one_bit, torch.device("cpu")) == "its self-check gave wrong noise"
    assert backends.check_noise(broken, torch.device("cpu")) == "its self-check failed: no kernel image is available"


def test_the_check_of_the_ops_names_what_is_wrong_whatever_the_caller_has_switched_on() -> None:
    cpu = torch.device("cpu")
    wrong = mock.patch.object(selftest, "q_sample", lambda x0, *arguments, **options: (x0, x0))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert backends.check_ops("cpu", cpu) is None
        with wrong:
            reason = backends.check_ops("cpu", cpu)
    assert reason is not None
    assert reason.startswith("its self-test failed: noising gave an error of ")


def test_a_gpu_backend_with_a_wrong_op_is_not_used() -> None:
    class OnGpu:
        is_cpu, is_cuda, dtype, device = False, True, torch.float32, torch.device("cuda")

    tensor: Any = OnGpu()
    with (
        mock.patch.dict(backends.missing, cuda=None, triton="none here"),
        mock.patch.object(backends, "_checked", set()),
        mock.patch.object(backends, "check_noise", return_value=None),
        mock.patch.object(backends, "check_ops", return_value="its self-test failed: norm_act gave an error of 3e-01"),
        pytest.warns(RuntimeWarning, match="does not use its backend 'cuda': its self-test failed: norm_act"),
    ):
        assert backends.choose(tensor) == "reference"


def test_a_gpu_backend_that_fails_its_check_is_not_used_and_says_so_once() -> None:
    class OnGpu:
        is_cpu, is_cuda, dtype, device = False, True, torch.float32, torch.device("cuda")

    tensor: Any = OnGpu()
    verdicts = {torch.ops.ddpm_fast.normal.cuda: "its self-check gave wrong noise"}
    with (
        mock.patch.dict(backends.missing, cuda=None, triton=None),
        mock.patch.object(backends, "_checked", set()),
        mock.patch.object(backends, "check_noise", lambda kernel, device: verdicts.get(kernel)),
        mock.patch.object(backends, "check_ops", return_value=None),
    ):
        with pytest.warns(RuntimeWarning, match="does not use its backend 'cuda': its self-check gave wrong noise"):
            assert backends.choose(tensor) == "triton"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.choose(tensor) == "triton"
        assert "cuda" not in df.available_backends()
        with (
            pytest.raises(ValueError, match=r"'cuda' is not available \(its self-check gave wrong noise\)"),
            df.use_backend("cuda"),
        ):
            pass
