"""Which modules and functions are SiLU: found out by what they compute, not by what they are called."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patch import mark, marked

_PROBE = torch.cat([torch.linspace(-30, 30, 121, dtype=torch.float64), torch.tensor([-1e-3, 1e-3, 88.0, -88.0])])


def computes(function: Callable[[Tensor], Any], expected: Callable[[Tensor], Tensor], probe: Tensor) -> bool:
    """Whether a function has `expected`'s values and derivatives on the probe, to float32 rounding.

    Anything that it raises, any other type or shape, and any change of its input count as a no.
    """
    x = probe.clone().requires_grad_()
    reference = probe.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        upstream = torch.linspace(0.5, 1.5, probe.numel(), dtype=probe.dtype).reshape(probe.shape)
        want = expected(reference)
        (want_grad,) = torch.autograd.grad(want, reference, upstream)
        try:
            # Its input is no leaf: an activation that works in place is one too.
            base = x * 1
            got = function(base)
            if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
                return False
            (got_grad,) = torch.autograd.grad(got, x, upstream)
        except Exception:  # whatever it is, it is not what we look for
            return False
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in ((got, want), (got_grad, want_grad)))


def _is_silu(function: Callable[[Tensor], Any]) -> bool:
    probe = _PROBE.float().reshape(1, 5, 5, 5)
    return computes(function, F.silu, probe)


def find_silu_module(module: Any) -> bool:
    """Whether a module is SiLU; one of another class than nn.SiLU is tried out, and marked."""
    if not isinstance(module, nn.Module) or "forward" in module.__dict__:
        return False
    if type(module) is nn.SiLU or marked(module, "silu"):
        return True
    # Of what has weights, today's values would say nothing about tomorrow's.
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or len(module._modules):
        return False
    # On a copy, whose attributes are its own, in case it counts its calls.
    probed = module.__class__.__new__(module.__class__)
    probed.__dict__ = module.__dict__.copy()
    if _is_silu(probed.forward):
        mark(module, "silu", True)
        return True
    return False


def is_silu_module(module: nn.Module) -> bool:
    """What `find_silu_module` found; cheap enough for every forward."""
    return type(module) is nn.SiLU or "_ddpm_fast_silu" in module.__dict__


def find_silu_function(function: Any) -> bool:
    """Whether a function of one tensor is SiLU; one that is not torch's is tried out, and marked.

    Only what is seen to do nothing but arithmetic is called for that.
    """
    if is_silu_function(function):
        return True
    if isinstance(function, types.FunctionType) and _is_arithmetic(function) and _is_silu(function):
        function.__dict__["_ddpm_fast_silu"] = True
        return True
    return False


def is_silu_function(function: Any) -> bool:
    """What `find_silu_function` found."""
    return function is F.silu or getattr(function, "_ddpm_fast_silu", False) is True


_ARITHMETIC = frozenset(
    ["sigmoid", "silu", "exp", "mul", "mul_", "neg", "reciprocal", "div", "add", "functional", "special", "expit", "nn"]
)


def _is_arithmetic(function: types.FunctionType) -> bool:
    code = function.__code__
    if code.co_freevars or code.co_cellvars or any(isinstance(c, types.CodeType) for c in code.co_consts):
        return False
    for name in code.co_names:
        value = function.__globals__.get(name)
        module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if name not in _ARITHMETIC and (not isinstance(module, str) or module.split(".")[0] != "torch"):
            return False
    return True
