"""Counter-based normals: Philox4x32-10 words, and the float32 arithmetic from two words to two normals.

docs/noise.md is the contract. Words are held in int64 tensors, values 0 .. 2^32 - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four random words for each counter.

    Args:
        counter: four int64 tensors of words, broadcastable.
        seed: int64, one element; its two halves are the key.
    """
    key_low, key_high = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    for _ in range(10):
        product0, product1 = (
            c0 * 0xD2511F53,
            c2 * 0xCD9E8D57,
        )  # modulo 2^64: the bits are those of the unsigned product
        c0 = ((product1 >> 32) & _MASK) ^ c1 ^ key_low
        c1 = product1 & _MASK
        c2 = ((product0 >> 32) & _MASK) ^ c3 ^ key_high
        c3 = product0 & _MASK
        key_low, key_high = (key_low + 0x9E3779B9) & _MASK, (key_high + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _signed(word: Tensor) -> Tensor:
    return word.to(torch.int32)  # keeps the low 32 bits


def _horner(x: Tensor, coefficients: tuple[str, ...]) -> Tensor:
    value = torch.full_like(x, float.fromhex(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = value * x + float.fromhex(coefficient)
    return value


_LOG = (
    "0x1.177b0ep-2", "0x1.41e0f8p-2", "0x1.1fbd08p-2", "0x1.4f121ep-2", "0x1.99d41ap-2",
    "0x1.0019e4p-1", "0x1.5554b8p-1", "0x1.ffffd6p-1", "2",
)  # fmt: skip
_SIN = ("-0x1.330c96p+6", "0x1.468064p+6", "-0x1.4abc24p+5", "0x1.921fb6p+2")
_COS = ("-0x1.4e6694p+6", "0x1.03b034p+6", "-0x1.3bd39ep+4", "1")


def normal_pair(r0: Tensor, r1: Tensor) -> tuple[Tensor, Tensor]:
    """Two words to two standard normals by Box and Muller's transform, in float32."""
    u = (_signed(r0).float() * 2.0**-31).abs().clamp(min=2.0**-33)
    b = u.view(torch.int32)
    k = (b - 0x3F2AAAAB) & -0x800000
    f = 1 - (b - k).view(torch.float32)
    squared = k.float() * float.fromhex("-0x1.62e430p-23") + _horner(f, _LOG) * f
    radius = squared.double().sqrt().float()  # torch's float32 root is not correctly rounded on every CPU
    x = _signed(r1 << 1).float() * 2.0**-34
    z = x * x
    sine = _horner(z, _SIN) * x
    cosine = _horner(z, _COS)
    cosine = torch.where(r0 >= 1 << 31, -cosine, cosine)
    a, b = radius * cosine, radius * sine
    swap = r1 >= 1 << 31
    return torch.where(swap, b, a), torch.where(swap, a, b)


def normal(out: Tensor, seed: Tensor, sample_ids: Tensor | None, step: Tensor, stream: int) -> None:
    """Fills `out` (N, ...) with standard normals, in the logical order of each sample's elements."""
    samples, size = out.shape[0], out[0].numel() if out.shape[0] else 0
    if out.numel() == 0:
        return
    device = out.device
    ids = torch.arange(samples, device=device) if sample_ids is None else sample_ids
    blocks = torch.arange((size + 3) // 4, device=device)
    steps = step.reshape(-1, 1)
    counter = (ids.reshape(-1, 1) & _MASK, blocks, steps & _MASK, torch.full_like(steps, stream))
    r0, r1, r2, r3 = philox(counter, seed)
    values = torch.stack((*normal_pair(r0, r1), *normal_pair(r2, r3)), dim=-1)
    out.copy_(values.reshape(samples, -1)[:, :size].reshape(out.shape))
