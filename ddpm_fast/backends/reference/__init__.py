"""The specification: every op in plain PyTorch, for any device and any dtype up to float64.

Each float32 operation below is rounded on its own; `torch.addcmul`, `add(alpha=)` and `lerp` fuse on some processors
and are not used.
"""
