"""Self-attention with one head in two projections instead of four."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Folded = tuple[Tensor, Tensor, Tensor, Tensor]


def fold(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, q_bias: Tensor | None, v_bias: Tensor | None, out_bias: Tensor | None
) -> Folded:
    """Weight and bias of one projection for the queries, and of one for the values, computed in float64.

    With rows x of the input, ``(x Wq' + bq)(x Wk' + bk)'`` is ``(x (Wq' Wk) + bq Wk) x'`` and terms that are the same
    in a whole row, which softmax does not see: the rows are their own keys. Softmax's weights sum to 1, so
    ``softmax(...) (x Wv' + bv) Wo' + bo`` is ``softmax(...) (x Wv' Wo' + bv Wo' + bo)``.

    Args:
        q, k, v, out: ``(C, C)``, as nn.Linear holds them.
        q_bias, v_bias, out_bias: ``(C,)``, or None; that of the keys has no effect.

    Returns:
        ``(C, C)``, ``(C,)``, ``(C, C)``, ``(C,)`` in the dtype of ``q``, for ``F.linear``.
    """
    zero = q.new_zeros(q.shape[0])
    wq, wk, wv, wo = (weight.double() for weight in (q, k, v, out))
    bq, bv, bo = (zero.double() if bias is None else bias.double() for bias in (q_bias, v_bias, out_bias))
    query_weight, query_bias, value_weight, value_bias = wk.T @ wq, bq @ wk, wo @ wv, wo @ bv + bo
    return query_weight.to(q.dtype), query_bias.to(q.dtype), value_weight.to(q.dtype), value_bias.to(q.dtype)


def attend(rows: Tensor, folded: Folded) -> Tensor:
    """Attention of every row to every row, the output projection included: ``(N, L, C)`` to the same shape."""
    query_weight, query_bias, value_weight, value_bias = folded
    queries, values = F.linear(rows, query_weight, query_bias), F.linear(rows, value_weight, value_bias)
    # With a dimension for the one head, without which PyTorch does not take its flash kernel.
    return F.scaled_dot_product_attention(queries[:, None], rows[:, None], values[:, None])[:, 0]
