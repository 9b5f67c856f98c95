"""Triton kernels on several architectures: what the compiler emits must be supported and right."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.gpu.ptx.triton import run

ARCHS = pytest.mark.parametrize("arch", [80, 90, 100, 120])


@triton.jit
def elementwise(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n, other=0.0), tl.load(y + i, mask=i < n, other=0.0)
    a32, b32 = a.to(tl.float32), b.to(tl.float32)
    r = (
        tl.where(a32 > b32, tl.exp(-a32 * a32), tl.sigmoid(b32))
        + tl.minimum(a32, b32) * tl.maximum(a32, 0.5)
        + tl.sqrt(tl.abs(a32))
        + tl.cos(b32)
        + tl.log(1 + tl.abs(b32))
        + tl.floor(a32)
        + tl.rsqrt(1 + a32 * a32)
    )
    tl.store(o + i, (r + tl.fma(a32, b32, a32)).to(o.dtype.element_ty), mask=i < n)


@triton.jit
def native(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n, other=0.0), tl.load(y + i, mask=i < n, other=0.0)
    tl.store(o + i, (a + b) * a - b, mask=i < n)


@triton.jit
def integers(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n, other=1), tl.load(y + i, mask=i < n, other=1)
    hi = tl.umulhi(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
    r = (
        a // b
        + a % b
        + (a << 3)
        + (b >> 5)
        + (a ^ b)
        + hi
        + tl.cdiv(tl.abs(a) % 1000, 7)
        + (a.to(tl.int64) * b >> 7).to(tl.int32)
        + a.to(tl.int8).to(tl.int32)
    )
    tl.store(o + i, r, mask=i < n)


@triton.jit
def rows(x, o, C, BLOCK: tl.constexpr):
    r, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + r * C + i, mask=i < C, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    p = e / tl.sum(e, 0)
    tl.store(o + r * C + i, tl.cumsum(p, 0), mask=i < C)
    if r == 0:
        tl.store(o + C * tl.num_programs(0), tl.argmax(v, 0).to(tl.float32))


@triton.jit
def transpose(x, o, M, N, BM: tl.constexpr, BN: tl.constexpr):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    v = tl.load(x + m[:, None] * N + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)
    tl.store(o + n[:, None] * M + m[None, :], tl.trans(v), mask=(n[:, None] < N) & (m[None, :] < M))


@triton.jit
def noise(o, s, seed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.randn(seed, i)
    tl.store(o + i, z, mask=i < n)
    tl.atomic_add(s, tl.sum(tl.where(i < n, z, 0.0), 0))


@triton.jit
def pipelined(x, o, n, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], tl.float32)
    for k in tl.range(0, n, BLOCK, num_stages=3):
        acc += tl.load(x + k + tl.arange(0, BLOCK))
    tl.store(o + tl.arange(0, BLOCK), acc)


@triton.jit
def histogram(x, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(o + tl.load(x + i, mask=i < n, other=0), 1, mask=i < n)


@ARCHS
@pytest.mark.parametrize("dt", [torch.float32, torch.float16, torch.bfloat16])
def test_elementwise(arch: int, dt: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y, o = torch.randn(1000).to(dt), torch.randn(1000).to(dt), torch.full((1000,), float("nan"), dtype=dt)
    run(elementwise, (4,), x, y, o, 1000, BLOCK=256, target=arch, readonly=(0, 1))
    a, b = x.double(), y.double()
    r = (
        torch.where(a > b, torch.exp(-a * a), torch.sigmoid(b))
        + torch.minimum(a, b) * a.clamp(min=0.5)
        + a.abs().sqrt()
        + b.cos()
        + torch.log(1 + b.abs())
        + a.floor()
        + 1 / (1 + a * a).sqrt()
        + a * b
        + a
    )
    assert torch.allclose(o.double(), r, atol={torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dt])
    o = torch.full_like(x, float("nan"))
    run(native, (4,), x, y, o, 1000, BLOCK=256, target=arch)
    assert torch.allclose(
        o.double(), (a + b) * a - b, atol={torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dt]
    )


@ARCHS
def test_integers(arch: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-(2**31), 2**31, (1000,), generator=g).to(torch.int32) for _ in range(2))
    y[:500] %= 77
    y[y == 0] = 3
    o = torch.zeros_like(x)
    run(integers, (4,), x, y, o, 1000, BLOCK=256, target=arch)
    a, b = x.numpy().astype(object), y.numpy().astype(object)
    trunc = [abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1) for p, q in zip(a, b, strict=False)]

    def i8(v):
        return (v + 128) % 256 - 128

    want = [
        q
        + (p - q * d)
        + (p << 3)
        + (d >> 5)
        + (p ^ d)
        + ((p % 2**32) * (d % 2**32) >> 32)
        - (-(abs(p) % 1000 if p != -(2**31) else -(2**31 % 1000)) // 7)
        + (p * d >> 7)
        + i8(p)
        for q, p, d in zip(trunc, a, b, strict=False)
    ]
    assert [int(v) % 2**32 for v in o] == [v % 2**32 for v in want]


@ARCHS
def test_reductions_and_layouts(arch: int) -> None:
    torch.manual_seed(1)
    x, o = torch.randn(5, 700), torch.zeros(5 * 700 + 1)
    run(rows, (5,), x, o, 700, BLOCK=1024, target=arch)
    assert torch.allclose(o[:-1].view(5, 700), x.softmax(1).cumsum(1), atol=1e-5)
    assert int(o[-1]) == int(x[0].argmax())
    for dt in (torch.float32, torch.bfloat16):
        x = torch.randn(70, 45).to(dt)
        o = torch.zeros(45, 70, dtype=dt)
        run(transpose, (3, 2), x, o, 70, 45, BM=32, BN=32, target=arch)
        assert torch.equal(o, x.t())


@ARCHS
def test_noise_atomics_pipelines(arch: int) -> None:
    o, s = torch.full((5000,), float("nan")), torch.zeros(1)
    run(noise, (5,), o, s, 42, 5000, BLOCK=1024, target=arch)
    assert abs(o.mean()) < 0.05
    assert abs(o.std() - 1) < 0.05
    assert torch.allclose(s[0], o.sum(), atol=1e-2)
    x, o = torch.randn(4096), torch.zeros(512)
    run(pipelined, (1,), x, o, 4096, BLOCK=512, target=arch)
    assert torch.allclose(o, x.view(8, 512).sum(0), atol=1e-5)
    x, o = torch.randint(0, 10, (1000,), dtype=torch.int32), torch.zeros(10, dtype=torch.int32)
    run(histogram, (4,), x, o, 1000, BLOCK=256, target=arch)
    assert np.array_equal(o.numpy(), np.bincount(x.numpy(), minlength=10))
