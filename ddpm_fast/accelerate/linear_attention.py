"""Linear attention modules: which forwards compute it, read off their source, and their forward on the fused op."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..ops._check import is_transformed, needs_grad
from ..ops.linear_attention import is_projecting_faster, linear_attention, projected_linear_attention
from . import forms, source
from .fused import hooked, is_plain_projection, is_plain_sequential, run
from .patch import Accelerated, is_accelerated, mark, marked, original_class, subclass, swap

# The forwards that compute linear attention, as their authors write them.
_EINOPS = """
def forward(self, x):
    {residual}
    b, c, h, w = x.shape
    {norm}
    qkv = self.to_qkv(x).chunk(3, dim=1)
    q, k, v = map(lambda t: rearrange(t, "b (h c) x y -> b h c (x y)", h=self.heads), qkv)
    {memory}
    q = q.softmax(dim=-2)
    k = k.softmax(dim=-1)
    q = q * self.scale
    context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
    out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
    out = rearrange(out, "b h c (x y) -> b (h c) x y", h=self.heads, x=h, y=w)
    {result}
"""
_MEMORY = """
    mk, mv = map(lambda t: repeat(t, "h c n -> b h c n", b=b), self.memory)
    k, v = map(partial(torch.cat, dim=-1), ((mk, k), (mv, v)))
"""
_NORM = "x = self.norm(x)"
_PLAIN = "return self.to_out(out)"


def _einops(residual: str = "", norm: str = "", memory: str = "", result: str = _PLAIN) -> str:
    return _EINOPS.format(residual=residual, norm=norm, memory=memory.strip(), result=result)


_FORMS = [
    forms.parse_form(text)
    for text in (
        # The annotated article; lucidrains' guided_diffusion and classifier_free_guidance.
        _einops(),
        # lucidrains' denoising_diffusion_pytorch and repaint.
        _einops(norm=_NORM, memory=_MEMORY),
        # examples/annotated.py, without einops.
        """
def forward(self, x):
    n, _, height, width = x.shape
    q, k, v = self.to_qkv(x).reshape(n, 3, self.heads, -1, height * width).unbind(1)
    q = q.softmax(dim=-2) * self.scale
    context = k.softmax(dim=-1) @ v.transpose(-2, -1)
    return self.to_out((context.transpose(-2, -1) @ q).reshape(n, -1, height, width))
""",
    )
]
# lucidrains' simple_diffusion.
_RESIDUAL_FORM = forms.parse_form(
    _einops(residual="residual = x", norm=_NORM, result="return self.to_out(out) + residual")
)


class _Roles(NamedTuple):
    """The attributes of self that a forward uses, by what they are for; whether it adds its input to its output."""

    to_qkv: str
    to_out: str
    heads: str
    scale: str
    residual: bool
    norm: str | None = None
    memory: str | None = None


class FusedLinearAttention(Accelerated, nn.Module):
    """A module whose forward was found to be linear attention between two convolutions, on the fused op.

    Its submodules are called as before, but for its projections where they are plain 1x1 convolutions that nobody looks
    at: those go into the op where it is faster with them. The fused op keeps channels_last, where the original's
    reshaping makes the input of its last convolution contiguous.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        roles: _Roles = self.__dict__["_ddpm_fast_roles"]
        if len(args) != 1 or kwargs or not _takes(self, roles, args[0]):
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        h = x if roles.norm is None else getattr(self, roles.norm)(x)
        memory = None if roles.memory is None else getattr(self, roles.memory)
        heads, scale = getattr(self, roles.heads), getattr(self, roles.scale)
        to_qkv, to_out = getattr(self, roles.to_qkv), getattr(self, roles.to_out)
        last, *rest = to_out if is_plain_sequential(to_out) and len(to_out) and not hooked(to_out) else (to_out,)
        if _projects(to_qkv, last, heads, h):
            y = projected_linear_attention(
                h, to_qkv.weight, last.weight, last.bias, heads=heads, memory=memory, scale=scale
            )
            y = run(rest, y)
        else:
            y = to_out(linear_attention(to_qkv(h), heads, memory=memory, scale=scale))
        return y + x if roles.residual else y


def _projects(to_qkv: nn.Module, last: nn.Module, heads: int, x: Any) -> bool:
    """Whether the projections go into the op."""
    if not (is_plain_projection(to_qkv) and to_qkv.bias is None and is_plain_projection(last)):
        return False
    if type(x) is not Tensor or not all(_is_like(p, x) for p in (to_qkv.weight, last.weight, last.bias)):
        return False
    rows, channels = to_qkv.weight.shape[:2]
    return (
        x.dim() == 4
        and x.shape[1] == channels
        and rows % (3 * heads) == 0
        and last.weight.shape[1] == rows // 3
        and is_projecting_faster(channels, last.weight.shape[0], rows // (3 * heads), x.shape[2] * x.shape[3])
    )


def _is_like(parameter: Tensor | None, x: Tensor) -> bool:
    if parameter is None:
        return True
    return type(parameter) is nn.Parameter and parameter.dtype == x.dtype and parameter.device == x.device


def _takes(module: nn.Module, roles: _Roles, x: Any) -> bool:
    """Whether the op has a kernel for this input, no gradient is needed and nothing else is at work."""
    if type(x) is not Tensor or x.dim() != 4 or x.numel() == 0 or x.dtype != torch.float32 or not x.is_cpu:
        return False
    if torch.is_grad_enabled() and needs_grad(x, *module.parameters()):
        return False
    if torch.is_autocast_enabled("cpu") or is_transformed():
        return False
    memory = None if roles.memory is None else getattr(module, roles.memory)
    return (
        (memory is None or (memory.dtype == torch.float32 and memory.is_cpu))
        and (backends.choose(x) == "cpu" or backends.forced() == "reference")
        and type(getattr(module, roles.scale)) is float
    )


def is_called_linear(module: nn.Module) -> bool:
    return original_class(module).__name__.endswith("LinearAttention")


def accelerate_linear_attention(module: nn.Module) -> str | None:
    """Puts a module on the fused op; why not, where its forward is not known to be linear attention."""
    roles = _roles_of(module)
    if not isinstance(roles, _Roles):
        return roles
    try:
        swap(module, subclass(FusedLinearAttention, type(module)))
    except TypeError as error:
        return f"its class cannot be extended: {error}"
    mark(module, "roles", roles)
    return None


def note(module: FusedLinearAttention) -> str:
    """How a module runs."""
    roles: _Roles = marked(module, "roles")
    memory = "" if roles.memory is None else ", with a memory"
    return f"linear attention, {getattr(module, roles.heads)} heads{memory}"


def _roles_of(module: nn.Module) -> _Roles | str:
    """How a module computes linear attention, or why it cannot be put on the fused op."""
    forward = getattr(type(module), "forward", None)  # a scripted module's cannot be had
    if "forward" in module.__dict__ or is_accelerated(module) or not isinstance(forward, types.FunctionType):
        return "its forward was replaced"
    unknown = "its forward is none of those that are known to be linear attention"
    if "softmax" not in forward.__code__.co_names:  # most modules; saves reading their source
        return unknown
    try:
        for form in (*_FORMS, _RESIDUAL_FORM):
            names = forms.match(form, forward, module)
            if names is not None:
                roles = _Roles(**names, residual=form is _RESIDUAL_FORM)
                return _why_not(module, roles) or roles
    except source.Unreadable as error:
        return f"its forward not looked at: {error}"
    return unknown


def _why_not(module: nn.Module, roles: _Roles) -> str | None:
    for name in (roles.to_qkv, roles.to_out, roles.norm):
        if name is not None and not isinstance(module._modules.get(name), nn.Module):
            return f"its {name} is no module"
    heads, scale = module.__dict__.get(roles.heads), module.__dict__.get(roles.scale)
    if type(heads) is not int or type(scale) is not float:
        return f"its {roles.heads} is no int, or its {roles.scale} no float"
    if roles.memory is not None and not isinstance(module._parameters.get(roles.memory), nn.Parameter):
        return f"its {roles.memory} is no parameter"
    return None
