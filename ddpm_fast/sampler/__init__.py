"""The sampler: a network and a coefficient table, run from noise to images.

sampler.py holds the loop, network.py calls the network, noise.py says where a step's noise comes from, and
threshold.py finds the bound of dynamic thresholding.
"""

from ddpm_fast.sampler.sampler import Sampler, SamplerState

__all__ = ["Sampler", "SamplerState"]
