"""The attention modules: which of them are self-attention with one head, and their forward with folded projections."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.blocks import SelfAttention
from ..nn.folded import Folded, attend, fold, folding_is_safe
from ..ops._derived import Derived
from .fused import hooked
from .norms import is_norm
from .patch import Accelerated, mark, marked, original_class, subclass, swap
from .pure import PLAIN, Impure, require_pure

_INTERNAL = frozenset(vars(nn.Module()))
_FORMATS = (torch.contiguous_format, torch.channels_last)
_FOLDED = "one head: its four projections are two"
_OTHER = "it does not compute self-attention with one head, its projections and nothing else"


@dataclass(frozen=True)
class Fold:
    """How a module computes self-attention.

    Attributes:
        norm: the path of the norm before the projections, None without one.
        projections: the paths of the queries', keys' and values' projection (or of the one for all three), and of the
            output's.
        unused: the names of arguments that it takes and does not use.
        scale: what the products of queries and keys are multiplied with.
        residual: whether the input is added to the output.
        divisor: what the sum is divided by.
        formats: the memory format of the output, for a contiguous image and for one in channels_last; for rows
            ``(N, L, C)`` it is contiguous. Empty where the module takes no images.
        rows: whether it takes rows.
        state: everything else that its computation depends on, as `_state` gives it.
    """

    norm: str | None
    projections: tuple[str, ...]
    unused: tuple[str, ...] = ()
    scale: float = 1.0
    residual: bool = False
    divisor: float = 1.0
    formats: tuple[torch.memory_format, ...] = ()
    rows: bool = False
    state: Any = None


class FoldedAttention(Accelerated, nn.Module):
    """A module that was found to be self-attention with one head, on two projections where no gradient is needed.

    The original runs in training mode, with gradients, hooks on its inner modules or arguments besides the input, for
    other dtypes, devices and shapes, and as soon as anything about it is not as it was.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            x = args[0] if args else None
            if type(x) is Tensor and self._can_fold(x, args, kwargs):
                return _run(self, marked(self, "fold"), x, marked(self, "folded"))
        return super().forward(*args, **kwargs)

    def _can_fold(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        plan: Fold = marked(self, "fold")
        if any(argument is not None for argument in args[1:]) or any(
            value is not None and name not in plan.unused for name, value in kwargs.items()
        ):
            return False
        if (x.dim(), bool(x.numel())) not in ((4, bool(plan.formats)), (3, plan.rows)):
            return False
        for module in self.modules():
            if module.training or (module is not self and hooked(module)):
                return False
        parameters = list(self.parameters())
        return (
            _state(self) == plan.state
            and x.shape[1 if x.dim() == 4 else 2] == _weights(self, plan)[0].shape[1]
            and all(_is_plain(parameter, x) for parameter in parameters)
            and folding_is_safe(x, parameters)
        )


def _is_plain(parameter: Tensor, x: Tensor) -> bool:
    return type(parameter) is nn.Parameter and parameter.dtype == x.dtype and parameter.device == x.device


def _weights(module: nn.Module, plan: Fold) -> list[Tensor]:
    return [module.get_submodule(path).weight for path in plan.projections]  # type: ignore[misc]


def _fold(weights: list[Tensor], biases: list[Tensor | None]) -> Folded:
    matrices = [weight.flatten(1) for weight in weights]
    if len(matrices) == 2:
        matrices[:1] = matrices[0].chunk(3)
        biases = [*((None,) * 3 if biases[0] is None else biases[0].chunk(3)), biases[1]]
    q, k, v, out = matrices
    return fold(q, k, v, out, biases[0], biases[2], biases[3])


def _folded(module: nn.Module, plan: Fold, derived: Derived[Folded]) -> Folded:
    weights = _weights(module, plan)
    biases: list[Tensor | None] = [module.get_submodule(path).bias for path in plan.projections]  # type: ignore[misc]
    count = len(weights)
    return derived.get((*weights, *biases), lambda *tensors: _fold(list(tensors[:count]), list(tensors[count:])))


def _attended(module: nn.Module, plan: Fold, x: Tensor, derived: Derived[Folded]) -> Tensor:
    """The output projection's result, of the shape of the input."""
    h = x if plan.norm is None else module.get_submodule(plan.norm)(x)
    folded = _folded(module, plan, derived)
    if x.dim() == 3:
        return attend(h.contiguous(), folded, plan.scale)
    n, c, height, width = x.shape
    # Rows whose elements lie apart would make PyTorch take slower kernels.
    rows = h.permute(0, 2, 3, 1).reshape(n, height * width, c).contiguous()
    return attend(rows, folded, plan.scale).reshape(n, height, width, c).permute(0, 3, 1, 2)


def _run(module: nn.Module, plan: Fold, x: Tensor, derived: Derived[Folded]) -> Tensor:
    y = _attended(module, plan, x, derived)
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = plan.formats[last] if x.dim() == 4 else torch.contiguous_format
    if plan.residual:
        y = torch.add(y, x, out=torch.empty_like(x, memory_format=memory_format))
    else:
        y = y.contiguous(memory_format=memory_format)
    return y if plan.divisor == 1 else y.div_(plan.divisor)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is called attention, has parameters, and holds no other such module."""
    return _is_called_attention(module) and not any(
        _is_called_attention(inner) for inner in module.modules() if inner is not module
    )


def _is_called_attention(module: nn.Module) -> bool:
    name = original_class(module).__name__.lower()
    return ("attention" in name or "attn" in name) and next(module.parameters(), None) is not None


def accelerate_attentions(model: nn.Module) -> None:
    """Folds the projections of attention with one head, and leaves a note on the other attention modules."""
    for module in model.modules():
        if not is_attention(module) or isinstance(module, SelfAttention):
            continue
        plan = _plan(module)
        if isinstance(plan, Fold):
            try:
                swap(module, subclass(FoldedAttention, type(module)))
                mark(module, "fold", plan)
                mark(module, "folded", Derived())
                continue
            except TypeError as error:
                plan = f"its class cannot be extended: {error}"
        mark(module, "note", plan)


def attention_note(module: nn.Module, untouched: str) -> tuple[bool, str]:
    """Whether an attention module has its projections folded; how, or why not."""
    if isinstance(module, SelfAttention):
        one = module.num_heads == 1 and module.folds
        return one, _FOLDED if one else f"{module.num_heads} heads" if module.folds else "its folds is False"
    if isinstance(module, FoldedAttention):
        return True, _FOLDED
    return False, marked(module, "note", untouched)


# What is found out once


def _plan(module: nn.Module) -> Fold | str:
    """How a module computes self-attention with one head; or why it is left as it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its forward cannot be replaced"
    if isinstance(module, Accelerated):
        return "its methods are rewritten for a norm"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for name in ("heads", "num_heads", "n_heads"):
        heads = module.__dict__.get(name)
        if isinstance(heads, int) and heads > 1:
            return f"{heads} heads: folded, their projections would take more work"
    plan = _structure(module)
    if isinstance(plan, str):
        return plan
    for name, inner in module.named_modules():
        if inner is not module and hooked(inner):
            return f"a hook on {name!r} sees a value that would not be computed"
    try:
        if _is_diffusers(module):
            plan = replace(plan, unused=("temb",))  # that of a spatial norm
        else:
            _require_settings(module)
            require_pure(module)
    except Impure as error:
        return str(error)
    found = _try_out(module, plan)
    return _OTHER if found is None else replace(found, state=_state(module))


def _structure(module: nn.Module) -> Fold | str:
    layers = {
        name: inner
        for name, inner in module.named_modules()
        if inner is module or inner._parameters or inner._buffers or is_norm(inner)
    }
    norms = [name for name, inner in layers.items() if is_norm(inner)]
    paths = tuple(name for name, inner in layers.items() if _is_projection(inner))
    others = [f"{name or 'the module itself'}" for name in layers if name not in norms and name not in paths and name]
    if module._parameters or module._buffers:
        return "it has parameters of its own"
    if others or len(norms) > 1 or len(paths) not in (2, 4):
        found = ", ".join(type(module.get_submodule(name)).__name__ for name in (*norms, *paths, *others))
        return f"it holds {found}, and not four projections (or two, one of them threefold) and at most one norm"
    *ins, out = (module.get_submodule(path).weight.flatten(1).shape for path in paths)  # type: ignore[operator]
    channels, width = out
    if any(tuple(shape) != ((3 * width if len(ins) == 1 else width), channels) for shape in ins):
        return "its projections are not of the same channels to one head and back"
    if width < channels:
        return f"a head of {width} for {channels} channels: folded, the projections would take more work"
    return Fold(norms[0] if norms else None, paths, scale=width**-0.5)


def _is_projection(module: nn.Module) -> bool:
    """Whether a module is a matrix product over the channels, of a plain parameter."""
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    if type(module) is nn.Linear:
        return True
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and type(module) in (nn.Conv1d, nn.Conv2d)
        and {*module.kernel_size, *module.stride, module.groups} == {1}
        and set(module.padding) <= {0}
    )


def _is_diffusers(module: nn.Module) -> bool:
    """Whether it is diffusers' Attention with one of the plain processors, in the library's own code."""
    library: Any = sys.modules.get("diffusers.models.attention_processor")
    processor = module.__dict__.get("processor")
    if library is None or type(module) is not library.Attention:
        return False
    if type(processor) not in (library.AttnProcessor, library.AttnProcessor2_0):
        return False
    functions = (type(module).forward, type(processor).__call__)
    return all(function.__module__ == library.__name__ for function in functions)


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without what nn.Module and this package keep."""
    return {name: v for name, v in vars(module).items() if name not in _INTERNAL and "ddpm_fast" not in name}


def _require_settings(module: nn.Module) -> None:
    for name, inner in module.named_modules():
        if original_class(inner).__module__.split(".")[0] == "torch":
            continue
        for attribute, value in _settings(inner).items():
            parts = value if isinstance(value, (tuple, list)) else [value]
            if not all(isinstance(part, PLAIN) for part in parts):
                where = f"{name}.{attribute}" if name else attribute
                raise Impure(f"its attribute {where} is a {type(value).__name__}, which may change what it computes")


def _state(module: nn.Module) -> list[Any]:
    """What a module's computation depends on besides its parameters' values; equal as long as nothing has changed."""
    return [
        (
            original_class(inner),
            {name: v if isinstance(v, (*PLAIN, tuple, list)) else type(v) for name, v in _settings(inner).items()},
            {name: None if p is None else tuple(p.shape) for name, p in inner._parameters.items()},
        )
        for inner in module.modules()
    ]


# What it computes


def _stand_in(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The module in evaluation mode, with weights of our own on the CPU that leave a softmax neither flat nor hard."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = module.__dict__.copy()
    twin.__dict__["training"] = False
    twin._parameters = {
        name: p
        if p is None
        else nn.Parameter(
            torch.empty_like(p, dtype=torch.float32, device="cpu").normal_(generator=generator)
            * (1.0 if p.dim() < 2 else p[0].numel() ** -0.5)
        )
        for name, p in module._parameters.items()
    }
    twin._modules = {name: None if m is None else _stand_in(m, generator) for name, m in module._modules.items()}
    return twin


def _try_out(module: nn.Module, plan: Fold) -> Fold | None:
    """The plan with what is to be found out about the module; None if it computes something else."""
    for parameter in list(inspect.signature(module.forward).parameters.values())[1:]:
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and parameter.default is not None:
            return None
    generator = torch.Generator().manual_seed(1)
    twin = _stand_in(module, generator)
    channels = _weights(twin, plan)[0].shape[1]
    images = [
        torch.randn(shape, generator=generator, device="cpu") for shape in ((2, channels, 3, 5), (1, channels, 4, 4))
    ]
    images += [image.contiguous(memory_format=torch.channels_last) for image in images]
    rows = torch.randn(2, 7, channels, generator=generator, device="cpu")
    state, derived = _state(twin), Derived[Folded]()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        outputs = [_output(twin, x) for x in (*images, rows)]
        if _state(twin) != state:
            return None
        of_images, of_rows = outputs[:-1], outputs[-1]
        fits = [
            candidate
            for candidate in _candidates(twin, plan)
            if all(_agrees(twin, candidate, x, y, derived) for x, y in zip(images, of_images, strict=True))
        ]
        with_rows = [
            candidate
            for candidate in fits or _candidates(twin, plan)
            if plan.norm is None and _agrees(twin, candidate, rows, of_rows, derived)
        ]
    if not fits and not with_rows:
        return None
    formats = tuple(_format(y) for y in (of_images[0], of_images[2])) if fits else ()
    return replace((with_rows or fits)[0], formats=formats, rows=bool(with_rows))


def _candidates(module: nn.Module, plan: Fold) -> Iterator[Fold]:
    """The plan with every scale and divisor that the module might have: the usual ones, and its own attributes."""
    own = [value for value in vars(module).values() if type(value) is float and value > 0]
    for scale in dict.fromkeys([plan.scale, *own]):
        for divisor in dict.fromkeys([1.0, *own]):
            for residual in (True, False):
                yield replace(plan, scale=scale, divisor=divisor, residual=residual, formats=_FORMATS)


def _output(module: nn.Module, x: Tensor) -> Any:
    """What the module makes of an input; None if it does not take it, or changes it."""
    given = x.clone(memory_format=torch.preserve_format)
    try:
        y = module.forward(given)
    except Exception:  # whatever it is, it is not what we look for
        return None
    return y if torch.equal(given, x) else None


def _agrees(module: nn.Module, plan: Fold, x: Tensor, want: Any, derived: Derived[Folded]) -> bool:
    if not isinstance(want, Tensor) or want.shape != x.shape or want.dtype != x.dtype:
        return False
    difference = (_run(module, plan, x, derived) - want).abs().max()
    return float(difference) <= 1e-4 * float(want.abs().max())


def _format(image: Tensor) -> torch.memory_format:
    return _FORMATS[image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()]
