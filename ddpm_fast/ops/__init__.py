"""The ops: each file has an op's schema, its autograd and its public function side by side."""

from ddpm_fast.ops.random import randn, random_timesteps

__all__ = ["randn", "random_timesteps"]
