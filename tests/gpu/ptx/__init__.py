"""Executes compiled PTX on the CPU, with checks: ``Module`` for any PTX, ``triton.run`` for a Triton function."""

from .module import Module

__all__ = ["Module"]
