"""Which modules are self-attention with one head, whoever wrote them: by what they hold, and by what they compute."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..nn.folded import Folded, attend, fold
from ..ops._derived import Derived
from .fused import hooked
from .norms import is_norm
from .patch import Accelerated, original_class
from .pure import PLAIN, Impure, require_pure
from .scope import MISSING

_INTERNAL = frozenset(vars(nn.Module()))
_Projection = nn.Linear | nn.Conv1d | nn.Conv2d


@dataclass(frozen=True)
class _State:
    """What a module's computation depends on besides the values of its parameters.

    Attributes:
        kind: its class.
        settings: its plain attributes.
        objects: the classes of its other attributes.
        shapes: those of its parameters.
    """

    kind: type[nn.Module]
    settings: dict[str, Any]
    objects: dict[str, type]
    shapes: dict[str, torch.Size | None]

    def is_of(self, module: nn.Module) -> bool:
        """Whether nothing has changed."""
        own = module.__dict__
        if (
            original_class(module) is not self.kind
            or "forward" in own
            or module._parameters.keys() != self.shapes.keys()
        ):
            return False
        for name, value in self.settings.items():
            now = own.get(name, MISSING)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for name, kind in self.objects.items():
            if type(own.get(name, MISSING)) is not kind:
                return False
        return all((None if p is None else p.shape) == self.shapes[name] for name, p in module._parameters.items())


@dataclass(frozen=True, eq=False)
class OneHead:
    """How a module computes self-attention.

    Attributes:
        norm: before the projections; None without one.
        projections: to the queries, keys and values (or to all three at once), and of the output.
        scale: what the products of queries and keys are multiplied with.
        unused: the names of arguments that it takes and does not use.
        residual: whether the input is added to the output.
        divisor: what the sum is divided by.
        channels_last: whether its output is, for a contiguous image and for one in channels_last; None where it takes
            no images.
        rows: whether it takes rows ``(N, L, C)``.
        inner: the modules inside it.
        states: its own and theirs.
        folded: from the parameters.
    """

    norm: nn.Module | None
    projections: tuple[_Projection, ...]
    scale: float
    unused: tuple[str, ...] = ()
    residual: bool = False
    divisor: float = 1.0
    channels_last: tuple[bool, bool] | None = (False, True)
    rows: bool = True
    inner: tuple[nn.Module, ...] = ()
    states: tuple[_State, ...] = ()
    folded: Derived[Folded] = field(default_factory=Derived)

    def takes(self, x: Tensor) -> bool:
        channels = self.projections[0].weight.shape[1]
        if x.dim() == 4:
            return self.channels_last is not None and x.shape[1] == channels and x.numel() > 0
        return self.rows and x.dim() == 3 and x.shape[2] == channels and x.numel() > 0

    def is_as_it_was(self, module: nn.Module) -> bool:
        """Whether the module still computes this, as far as its parts and their attributes show."""
        own, *inner = module.modules()
        return (
            len(inner) == len(self.inner)
            and all(a is b for a, b in zip(inner, self.inner, strict=True))
            and all(state.is_of(part) for state, part in zip(self.states, (own, *inner), strict=True))
        )

    def run(self, x: Tensor) -> Tensor:
        """The module's output for an image ``(N, C, H, W)`` or rows ``(N, L, C)``."""
        rows = x if self.norm is None else self.norm(x)
        if x.dim() == 4:
            # Rows whose elements lie apart would make PyTorch take slower kernels.
            rows = rows.permute(0, 2, 3, 1).flatten(1, 2)
        parameters = [p for layer in self.projections for p in (layer.weight, layer.bias)]
        y = attend(rows.contiguous(), self.folded.get(tuple(parameters), _fold), self.scale)
        memory_format = torch.contiguous_format
        if x.dim() == 4:
            y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
            if self.channels_last is not None and self.channels_last[_is_channels_last(x)]:
                memory_format = torch.channels_last
        if self.residual:
            y = torch.add(y, x, out=torch.empty_like(x, memory_format=memory_format))
        else:
            y = y.contiguous(memory_format=memory_format)
        return y if self.divisor == 1 else y.div_(self.divisor)


def _fold(*parameters: Tensor | None) -> Folded:
    weights = [weight.flatten(1) for weight in parameters[::2] if weight is not None]
    biases = list(parameters[1::2])
    if len(weights) == 2:
        weights[:1] = weights[0].chunk(3)
        biases[:1] = (None, None, None) if biases[0] is None else biases[0].chunk(3)
    q, k, v, out = weights
    q_bias, _, v_bias, out_bias = biases
    return fold(q, k, v, out, q_bias, v_bias, out_bias)


def _is_channels_last(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def find_one_head(module: nn.Module) -> OneHead | str:
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
            plan = replace(plan, unused=("temb",))  # which is for a spatial norm
        else:
            _require_plain_attributes(module)
            require_pure(module)
    except Impure as error:
        return str(error)
    found = _try_out(module, plan)
    if found is None:
        return "it does not compute self-attention with one head, its projections and nothing else"
    return replace(found, inner=tuple(module.modules())[1:], states=_states(module), folded=Derived())


# What it holds


def _structure(module: nn.Module) -> OneHead | str:
    if module._parameters or module._buffers:
        return "it has parameters or buffers of its own"
    layers = [inner for inner in module.modules() if inner._parameters or inner._buffers or is_norm(inner)]
    norms = [layer for layer in layers if is_norm(layer)]
    projections = [layer for layer in layers if _is_projection(layer)]
    if len(norms) > 1 or len(projections) not in (2, 4) or len(norms) + len(projections) < len(layers):
        found = ", ".join(original_class(layer).__name__ for layer in layers)
        return f"it holds {found}: not four projections, or two of which one is threefold, and at most one norm"
    *ins, out = projections
    channels, width = out.weight.shape[:2]
    expected = (width if len(ins) == 3 else 3 * width, channels)
    if any(tuple(layer.weight.shape[:2]) != expected for layer in ins):
        return "its projections do not lead from the same channels to one head and back"
    if width < channels:
        return f"a head of {width} for {channels} channels: folded, the projections would take more work"
    return OneHead(norms[0] if norms else None, tuple(projections), width**-0.5)


def _is_projection(layer: nn.Module) -> TypeGuard[_Projection]:
    """Whether a layer is a matrix product over the channels, of plain parameters."""
    if set(layer._parameters) != {"weight", "bias"} or layer._buffers or layer._modules:
        return False
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        plain = {*layer.kernel_size, *layer.stride, layer.groups} == {1} and set(layer.padding) <= {0}
        return plain and type(layer) in (nn.Conv1d, nn.Conv2d)
    return type(layer) is nn.Linear


def _is_diffusers(module: nn.Module) -> bool:
    """Whether it is diffusers' Attention with one of its plain processors, in the library's own code."""
    library: Any = sys.modules.get("diffusers.models.attention_processor")
    processor = module.__dict__.get("processor")
    if library is None or type(module) is not library.Attention:
        return False
    if type(processor) not in (library.AttnProcessor, library.AttnProcessor2_0):
        return False
    functions = (type(module).forward, type(processor).__call__)
    return all(function.__module__ == library.__name__ for function in functions)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without what nn.Module and this package keep."""
    return {name: v for name, v in vars(module).items() if name not in _INTERNAL and "ddpm_fast" not in name}


def _is_plain(value: Any) -> bool:
    return all(isinstance(part, PLAIN) for part in (value if isinstance(value, tuple) else [value]))


def _require_plain_attributes(module: nn.Module) -> None:
    for name, inner in module.named_modules():
        if original_class(inner).__module__.split(".")[0] == "torch":
            continue
        for attribute, value in _attributes(inner).items():
            if not _is_plain(value):
                where = f"{name}.{attribute}" if name else attribute
                raise Impure(f"its {where} is a {type(value).__name__}, of which it is not known what it does")


def _states(module: nn.Module) -> tuple[_State, ...]:
    states = []
    for inner in module.modules():
        attributes = _attributes(inner)
        settings = {name: v for name, v in attributes.items() if _is_plain(v)}
        objects = {name: type(v) for name, v in attributes.items() if name not in settings}
        shapes = {name: None if p is None else p.shape for name, p in inner._parameters.items()}
        states.append(_State(original_class(inner), settings, objects, shapes))
    return tuple(states)


# What it computes


def _stand_in(module: nn.Module, twins: dict[nn.Module, nn.Module], generator: torch.Generator) -> nn.Module:
    """The module in evaluation mode, with weights of our own on the CPU that leave a softmax neither flat nor hard.

    Its norm is the original one. `twins` gets each module's.
    """
    kind = original_class(module)
    twin = twins[module] = kind.__new__(kind)
    twin.__dict__ = module.__dict__.copy()
    twin.__dict__["training"] = False
    twin._parameters = {
        name: None if p is None else nn.Parameter(_weights_like(p, generator)) for name, p in module._parameters.items()
    }
    twin._modules = {
        name: None if inner is None else _stand_in(inner, twins, generator) for name, inner in module._modules.items()
    }
    return twin


def _weights_like(p: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.empty_like(p, dtype=torch.float32, device="cpu").normal_(generator=generator)
    return drawn if p.dim() < 2 else drawn * p[0].numel() ** -0.5


def _try_out(module: nn.Module, plan: OneHead) -> OneHead | None:
    """The plan with all that is to be found out about the module; None if it computes something else."""
    for parameter in list(inspect.signature(module.forward).parameters.values())[1:]:
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and parameter.default is not None:
            return None
    generator = torch.Generator().manual_seed(1)
    twins: dict[nn.Module, nn.Module] = {}
    twin = _stand_in(module, twins, generator)
    norm = None if plan.norm is None else twins[plan.norm]
    projections: Any = tuple(twins[layer] for layer in plan.projections)
    of_twin = replace(plan, norm=norm, projections=projections)
    channels = plan.projections[0].weight.shape[1]
    shapes = (2, channels, 3, 5), (1, channels, 4, 4), (2, 7, channels)
    *images, rows = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    images += [image.contiguous(memory_format=torch.channels_last) for image in images]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        of_images, of_rows = [_output(twin, x) for x in images], _output(twin, rows)
        candidates = list(_candidates(of_twin, twin))
        pairs = list(zip(images, of_images, strict=True))
        fits = [c for c in candidates if all(_agrees(c, x, y) for x, y in pairs)]
        # A norm has its channels elsewhere in rows.
        with_rows = [c for c in fits or candidates if norm is None and _agrees(c, rows, of_rows)]
    best = next(iter(with_rows or fits), None)
    if best is None:
        return None
    return replace(
        plan,
        scale=best.scale,
        divisor=best.divisor,
        residual=best.residual,
        channels_last=(_is_channels_last(of_images[0]), _is_channels_last(of_images[2])) if fits else None,
        rows=bool(with_rows),
    )


def _candidates(plan: OneHead, module: nn.Module) -> Iterator[OneHead]:
    """The plan with every scale and divisor that the module might have: the usual ones, and its own attributes."""
    own = [value for value in vars(module).values() if type(value) is float and value > 0]
    for scale in dict.fromkeys([plan.scale, *own]):
        for divisor in dict.fromkeys([1.0, *own]):
            for residual in (True, False):
                yield replace(plan, scale=scale, divisor=divisor, residual=residual)


def _output(module: nn.Module, x: Tensor) -> Any:
    """What the module makes of an input; None if it does not take it, or changes it."""
    given = x.clone(memory_format=torch.preserve_format)
    try:
        y = module.forward(given)
    except Exception:  # whatever it is, it is not what we look for
        return None
    return y if torch.equal(given, x) else None


def _agrees(plan: OneHead, x: Tensor, want: Any) -> bool:
    if not isinstance(want, Tensor) or want.shape != x.shape or want.dtype != x.dtype:
        return False
    try:
        got = plan.run(x)
    except RuntimeError:  # a norm that does not take images
        return False
    return float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
