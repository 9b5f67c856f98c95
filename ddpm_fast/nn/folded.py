"""Self-attention with one head in two projections instead of four."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._check import is_transformed, needs_grad

Folded = tuple[Tensor, Tensor, Tensor, Tensor]


def fold(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, q_bias: Tensor | None, v_bias: Tensor | None, out_bias: Tensor | None
) -> Folded:
    """Weight and bias of one projection for the queries, and of one for the values, computed in float64.

    With rows x of the input, ``(x Wq' + bq)(x Wk' + bk)'`` is ``(x (Wq' Wk) + bq Wk) x'`` and terms that are the same
    in a whole row, which softmax does not see: the rows are their own keys. Softmax's weights sum to 1, so
    ``softmax(...) (x Wv' + bv) Wo' + bo`` is ``softmax(...) (x Wv' Wo' + bv Wo' + bo)``.

    Args:
        q, k, v: ``(D, C)``, as nn.Linear holds them; D is the width of the head.
        out: ``(C, D)``.
        q_bias, v_bias: ``(D,)``, or None; that of the keys has no effect.
        out_bias: ``(C,)``, or None.

    Returns:
        ``(C, C)``, ``(C,)``, ``(C, C)``, ``(C,)`` in the dtype of ``q``, for ``F.linear``.
    """
    wq, wk, wv, wo = (weight.double() for weight in (q, k, v, out))
    bq, bv, bo = (
        weight.new_zeros(weight.shape[0]) if bias is None else bias.double()
        for weight, bias in ((wq, q_bias), (wv, v_bias), (wo, out_bias))
    )
    query_weight, query_bias, value_weight, value_bias = wk.T @ wq, bq @ wk, wo @ wv, wo @ bv + bo
    return query_weight.to(q.dtype), query_bias.to(q.dtype), value_weight.to(q.dtype), value_bias.to(q.dtype)


def attend(rows: Tensor, folded: Folded, scale: float | None = None) -> Tensor:
    """Attention of every row to every row, the output projection included: ``(N, L, C)`` to the same shape.

    ``scale`` is what the products of queries and keys are multiplied with: by default ``C ** -0.5``, right for a head
    of width C.
    """
    query_weight, query_bias, value_weight, value_bias = folded
    queries, values = F.linear(rows, query_weight, query_bias), F.linear(rows, value_weight, value_bias)
    # With a dimension for the one head, without which PyTorch does not take its flash kernel.
    return F.scaled_dot_product_attention(queries[:, None], rows[:, None], values[:, None], scale=scale)[:, 0]


def folding_is_safe(x: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    """Whether folded projections are the same function of ``x`` just now, and changes of the parameters can be seen."""
    return (
        x.dtype == torch.float32
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not needs_grad(x, *parameters)
        and not any(parameter is not None and parameter.is_inference() for parameter in parameters)
        and not is_transformed()
    )
