"""The sampler: a network and a coefficient table, run from noise to images.

sampler.py holds what a user sees, run.py the loop's body, step.py what happens behind the network, network.py
calls the network, noise.py says where a step's noise comes from. arguments.py checks what a Sampler is given.
guidance.py, threshold.py and plms.py hold an equation each.
"""

from ddpm_fast.sampler.sampler import Sampler
from ddpm_fast.sampler.state import SamplerState

__all__ = ["Sampler", "SamplerState"]
