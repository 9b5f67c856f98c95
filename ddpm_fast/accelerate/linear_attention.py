"""Linear attention modules: which forwards compute it, read off their source, and their forward on the fused op."""

from __future__ import annotations

import ast
import functools
import sys
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import linear_attention
from ..ops._check import is_transformed, needs_grad
from . import source
from .patch import Accelerated, is_accelerated, mark, marked, original_class, subclass, swap
from .scope import Scope

# The forwards that compute linear attention, as their authors write them. Compared is what they say, not how: local
# names, attributes of self and line breaks may differ. `self.memory`, `self.norm` and `residual` are in some only.
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


_FORM_TEXTS = [
    # The annotated article; lucidrains' guided_diffusion and classifier_free_guidance.
    _einops(),
    # lucidrains' denoising_diffusion_pytorch and repaint.
    _einops(norm=_NORM, memory=_MEMORY),
    # lucidrains' simple_diffusion.
    _einops(residual="residual = x", norm=_NORM, result="return self.to_out(out) + residual"),
    # examples/annotated.py, without einops.
    """
def forward(self, x):
    n, _, height, width = x.shape
    q, k, v = self.to_qkv(x).reshape(n, 3, self.heads, -1, height * width).unbind(1)
    q = q.softmax(dim=-2) * self.scale
    context = k.softmax(dim=-1) @ v.transpose(-2, -1)
    return self.to_out((context.transpose(-2, -1) @ q).reshape(n, -1, height, width))
""",
]


class _Roles(NamedTuple):
    """The attributes of self that a forward uses, by what they are for; None where the form has none."""

    to_qkv: str
    to_out: str
    heads: str
    scale: str
    norm: str | None
    memory: str | None
    residual: bool


class FusedLinearAttention(Accelerated, nn.Module):
    """A module whose forward was found to be linear attention between two convolutions, on the fused op.

    Its submodules are called as before. The fused op keeps channels_last, where the original's reshaping makes the
    input of its last convolution contiguous.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        roles: _Roles = self.__dict__["_ddpm_fast_roles"]
        if len(args) != 1 or kwargs or not _takes(self, roles, args[0]):
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        h = x if roles.norm is None else getattr(self, roles.norm)(x)
        memory = None if roles.memory is None else getattr(self, roles.memory)
        qkv = getattr(self, roles.to_qkv)(h)
        out = linear_attention(qkv, getattr(self, roles.heads), memory=memory, scale=getattr(self, roles.scale))
        y = getattr(self, roles.to_out)(out)
        return y + x if roles.residual else y


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
        and (backends.choose(x) == "cpu" or backends._forced == "reference")
        and type(getattr(module, roles.scale)) is float
    )


def is_linear_attention(module: nn.Module) -> bool:
    """Whether a module is one, or is called so."""
    return isinstance(module, FusedLinearAttention) or original_class(module).__name__.endswith("LinearAttention")


def accelerate_linear_attentions(model: nn.Module) -> None:
    """Puts the linear attention modules on the fused op, and leaves a note on what is only called so."""
    for module in model.modules():
        roles = _roles_of(module)
        reason = None
        if isinstance(roles, _Roles):
            try:
                swap(module, subclass(FusedLinearAttention, type(module)))
                mark(module, "roles", roles)
            except TypeError as error:
                reason = f"its class cannot be extended: {error}"
        elif is_linear_attention(module):
            reason = roles
        if reason is not None:
            mark(module, "attention", reason)


def linear_attention_note(module: nn.Module, untouched: str) -> tuple[bool, str]:
    """Whether a linear attention module runs on the fused op; how, or why not."""
    if not isinstance(module, FusedLinearAttention):
        return False, marked(module, "attention", untouched)
    roles: _Roles = marked(module, "roles")
    memory = "" if roles.memory is None else ", with a memory"
    return True, f"linear attention, {getattr(module, roles.heads)} heads{memory}"


def _roles_of(module: nn.Module) -> _Roles | str:
    """How a module computes linear attention, or why it cannot be put on the fused op."""
    forward = getattr(type(module), "forward", None)  # a scripted module's cannot be had
    if "forward" in module.__dict__ or is_accelerated(module) or not isinstance(forward, types.FunctionType):
        return "its forward was replaced"
    unknown = "its forward is none of those that are known to be linear attention"
    if "softmax" not in forward.__code__.co_names:  # most modules; saves reading their source
        return unknown
    try:
        tree = source.parse(forward)
    except source.Unreadable as error:
        return f"its forward not looked at: {error}"
    scope = Scope(forward, tree, module)
    for form in _FORMS:
        match = _Match(scope)
        if match.same(form, tree):
            names = match.attributes
            roles = _Roles(
                names["to_qkv"],
                names["to_out"],
                names["heads"],
                names["scale"],
                names.get("norm"),
                names.get("memory"),
                "residual" in match.names,
            )
            return _why_not(module, roles) or roles
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


def _tree(text: str) -> ast.FunctionDef:
    (tree,) = ast.parse(text).body
    assert isinstance(tree, ast.FunctionDef)
    return tree


_FORMS = [_tree(text) for text in _FORM_TEXTS]

# What says nothing about what is computed, or is said by other fields.
_IGNORED = frozenset(["ctx", "kind", "type_comment", "type_params", "returns", "annotation", "name"])


def _globals() -> dict[str, Any]:
    """What the forms' free names stand for."""
    einops = sys.modules.get("einops")
    known = {"torch": torch, "map": map, "partial": functools.partial}
    return known | {name: getattr(einops, name) for name in ("rearrange", "repeat") if einops is not None}


class _Match:
    """A comparison of a form with a forward: which names of the one are which of the other.

    Attributes:
        names: the forward's local names, by the form's.
        attributes: the forward's attributes of self, by the form's.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._globals = _globals()
        self.names: dict[str, str] = {}
        self.attributes: dict[str, str] = {}

    def same(self, form: Any, tree: Any) -> bool:
        """Whether two nodes, or lists of them, or what else is in their fields, say the same."""
        if isinstance(form, list):
            return isinstance(tree, list) and len(form) == len(tree) and all(map(self.same, form, tree))
        if isinstance(form, str):
            return isinstance(tree, str) and form.split() == tree.split()  # einops does not mind spaces
        if not isinstance(form, ast.AST):
            return type(form) is type(tree) and bool(form == tree)
        if isinstance(form, ast.expr):
            known = self._known(form)
            if known is not None:
                shadowed = isinstance(tree, ast.Name) and tree.id in self.names.values()
                return isinstance(tree, ast.expr) and not shadowed and self._scope.resolve(tree) is known
        if type(form) is not type(tree):
            return False
        if isinstance(form, ast.Name):
            return self._paired(self.names, form.id, tree.id)
        if isinstance(form, ast.arg):
            return self._paired(self.names, form.arg, tree.arg)
        if isinstance(form, ast.Attribute) and isinstance(form.value, ast.Name) and form.value.id == "self":
            return self.same(form.value, tree.value) and self._paired(self.attributes, form.attr, tree.attr)
        if isinstance(form, ast.FunctionDef) and ast.get_docstring(tree) is not None:
            return self.same(form.args, tree.args) and self.same(form.body, tree.body[1:]) and not tree.decorator_list
        return all(
            self.same(getattr(form, field), getattr(tree, field)) for field in form._fields if field not in _IGNORED
        )

    def _known(self, form: ast.expr) -> Any:
        """The object that an expression of a form stands for, if its names are the forms' free ones."""
        if isinstance(form, ast.Name):
            return self._globals.get(form.id)
        if isinstance(form, ast.Attribute) and isinstance(form.value, ast.Name) and form.value.id == "torch":
            return getattr(torch, form.attr)
        return None

    @staticmethod
    def _paired(pairs: dict[str, str], ours: str, theirs: str) -> bool:
        """Whether two names can be one, and nothing else."""
        if ours in pairs:
            return pairs[ours] == theirs
        if theirs in pairs.values():
            return False
        pairs[ours] = theirs
        return True
