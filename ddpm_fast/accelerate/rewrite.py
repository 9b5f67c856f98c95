"""Rewrites a method so that a norm, its scale and shift, and its activation become one call.

Only those expressions change, and the method does what its author wrote in every other respect. A norm's result that
goes into a variable is held back,

    h = self.norm(h)                            scale_0 = shift_0 = None
    if scale_shift is not None:                 if scale_shift is not None:
        scale, shift = scale_shift      ->          scale, shift = scale_shift
        h = h * (scale + 1) + shift                 scale_0 = scale; shift_0 = shift
    h = self.act(h)                             h = norm_act(self.norm, h, self.act, scale_0, shift_0)

until its activation comes. Where anything else comes first, the norm is called just before it. So is it before any
statement that could change the norm's input in place, and wherever branches, loops or handlers leave open what a
variable holds: what cannot be proved stays as it was.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from .patterns import Activated, Normed, Patterns, normed
from .scope import SCOPED, names, walk_here

NORM_ACT = "_ddpm_fast_norm_act"
EMBEDDED = "_ddpm_fast_embedded"
DIVIDED = "_ddpm_fast_divided"

# Calls that may stand between a norm and its activation: they do not write into a tensor.
_VIEWS = ["chunk", "split", "unbind", "rearrange", "view", "reshape", "unsqueeze", "squeeze", "flatten", "expand"]
_CASTS = ["contiguous", "to", "type", "type_as", "float", "half"]
_LOOKS = ["exists", "len", "isinstance", "hasattr", "size", "dim"]
_HARMLESS = frozenset([*_VIEWS, *_CASTS, *_LOOKS])


@dataclass(frozen=True)
class Fused:
    """A call in a rewritten method, by its expressions; `norm` may be a Sequential that starts with both."""

    norm: ast.expr
    act: ast.expr | None = None
    modulated: bool = False
    embedded: bool = False


# What sees a function's variables by other means than their names.
_SEE_NAMES = frozenset(["locals", "eval", "exec"])

Key = tuple[str, str]  # a variable, and the expression of the norm whose result it holds


@dataclass
class _Held:
    """A variable that holds a norm's input in place of its result; how far its scale and shift have been seen."""

    key: Key
    norm: ast.expr
    scaled: bool = False
    shifted: bool = False

    def join(self, other: _Held) -> _Held:
        return _Held(self.key, self.norm, self.scaled or other.scaled, self.shifted or other.shifted)


State = dict[str, _Held]


@dataclass
class _Facts:
    """What one pass finds out about the variables, for the next."""

    worth: set[Key] = field(default_factory=set)  # reached an activation or a scale
    modulated: set[Key] = field(default_factory=set)
    embedded: set[Key] = field(default_factory=set)


def rewrite(tree: ast.FunctionDef, patterns: Patterns) -> tuple[ast.FunctionDef, list[Fused]] | None:
    """The method with its norms fused, and the calls that do it; None if there is nothing to fuse."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Yield, ast.YieldFrom)) or (isinstance(node, ast.Name) and node.id in _SEE_NAMES):
            return None
    facts: _Facts | None = None
    for _ in range(6):
        rewriter = _Rewriter(tree, patterns, facts)
        body = rewriter.method(copy.deepcopy(tree.body))
        if rewriter.found == facts:
            if not rewriter.calls:
                return None
            new = copy.copy(tree)
            new.body = body
            return ast.fix_missing_locations(new), rewriter.calls
        facts = rewriter.found
    return None


class _Rewriter:
    """One pass over a method. Without facts it holds back every norm; with them, those that were worth it."""

    def __init__(self, tree: ast.FunctionDef, patterns: Patterns, facts: _Facts | None) -> None:
        self._tree = tree
        self.patterns = patterns
        self._facts = facts
        self._numbers: dict[Key, int] = {}
        self._protected = 0  # within how many try statements
        self.found = _Facts()
        self.calls: list[Fused] = []

    def method(self, body: list[ast.stmt]) -> list[ast.stmt]:
        new, state = self._block(body, {}, loop=False)
        return new + self._settle(state or {})

    # Statements

    def _block(self, statements: list[ast.stmt], state: State, loop: bool) -> tuple[list[ast.stmt], State | None]:
        """The new statements, and what is held back after them; None if nothing comes after them."""
        new: list[ast.stmt] = []
        i = 0
        while i < len(statements):
            folded = self._embedding(statements[i : i + 2], state) if i + 1 < len(statements) else None
            if folded is not None:
                new += folded
                i += 2
                continue
            more, after = self._statement(statements[i], state, loop)
            new += more
            i += 1
            if after is None:
                return new + statements[i:], None  # what cannot be reached
            state = after
        return new, state

    def _statement(self, node: ast.stmt, state: State, loop: bool) -> tuple[list[ast.stmt], State | None]:
        if isinstance(node, ast.If):
            return self._if(node, state, loop)
        if isinstance(node, (ast.For, ast.While, ast.With)):
            before = self._settle(state)
            for name in ("iter", "test"):
                if hasattr(node, name):
                    setattr(node, name, self._expression(getattr(node, name), {}))
            if isinstance(node, ast.With):
                # A context that swallows exceptions is a kind of try.
                swallows = not all(self.patterns.is_torch_call(item.context_expr) for item in node.items)
                self._protected += swallows
                node.body = self._closed(node.body, loop)
                self._protected -= swallows
            else:
                node.body, node.orelse = self._closed(node.body, True), self._closed(node.orelse, loop)
            return [*before, node], {}
        if isinstance(node, ast.Try):
            before = self._settle(state)
            self._protected += 1
            node.body, node.orelse = self._closed(node.body, loop), self._closed(node.orelse, loop)
            node.finalbody = self._closed(node.finalbody, loop)
            for handler in node.handlers:
                handler.body = self._closed(handler.body, loop)
            self._protected -= 1
            return [*before, node], {}
        if isinstance(node, (ast.Break, ast.Continue)):
            return [*self._settle(state), node], None
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.Raise, ast.Assert)):
            return self._simple(node, state, loop)
        if isinstance(node, ast.Pass):
            return [node], state
        return [*self._settle(state), node], {}

    def _closed(self, statements: list[ast.stmt], loop: bool) -> list[ast.stmt]:
        new, state = self._block(statements, {}, loop)
        return new + self._settle(state or {})

    def _if(self, node: ast.If, state: State, loop: bool) -> tuple[list[ast.stmt], State | None]:
        before = self._settle_for(state, node.test)
        node.test = self._expression(node.test, {})
        node.body, yes = self._block(node.body, _copy(state), loop)
        node.orelse, no = self._block(node.orelse, _copy(state), loop)
        if yes is None or no is None:
            return [*before, node], no if yes is None else yes
        joined: State = {}
        for name in [*yes, *(n for n in no if n not in yes)]:
            a, b = yes.get(name), no.get(name)
            if a is not None and b is not None and a.key == b.key:
                joined[name] = a.join(b)
                continue
            if a is not None:
                node.body += self._settle({name: a})
            if b is not None:
                node.orelse += self._settle({name: b})
        return [*before, node], joined

    def _simple(self, node: ast.stmt, state: State, loop: bool) -> tuple[list[ast.stmt], State | None]:
        done = self._hold(node, state)
        if done is None:
            done = self._modulate(node, state)
        if done is not None:
            return done, state
        before: list[ast.stmt] = []
        consumed: State = {}
        loads, stores = names(node, ast.Load), names(node, ast.Store)
        ends = isinstance(node, (ast.Return, ast.Raise))
        for name, held in list(state.items()):
            if loads[name] and self._consumes(node, name, held, loop):
                consumed[name] = held
            elif loads[name] or isinstance(node, ast.AugAssign) or (not ends and not _is_harmless(node)):
                before += self._settle({name: held})
            elif not stores[name]:
                continue
            del state[name]
        node = self._expression(node, consumed)
        return [*before, node], None if ends else state

    def _hold(self, node: ast.stmt, state: State) -> list[ast.stmt] | None:
        """`v = norm(x)`, perhaps with a scale and shift: holds it back."""
        target = _target(node)
        if target is None or target in self.patterns.scope.captured or self._protected:
            return None
        value: ast.expr = node.value  # type: ignore[attr-defined]
        found = normed(value, self.patterns.is_norm_call)
        if found is None or not all(part is None or _is_harmless(part) for part in found[1:]):
            return None
        call: Any = found.core
        key = (target, ast.dump(call.func))
        if self._facts is not None and key not in self._facts.worth:
            return None
        argument = call.args[0]
        new = self._settle_for(state, argument, found.scale, found.shift)
        state.pop(target, None)
        if not (isinstance(argument, ast.Name) and argument.id == target):
            new.append(_assign(target, self._expression(argument, {}), node))
        held = state[target] = _Held(key, call.func)
        new += self._parts(held, found, node, reset=True)
        return new

    def _modulate(self, node: ast.stmt, state: State) -> list[ast.stmt] | None:
        """`v = v * (1 + scale) + shift` on a variable held back."""
        target = _target(node)
        if target is None or target not in state:
            return None
        held = state[target]
        found = normed(node.value, _is_name(target))  # type: ignore[attr-defined]
        if found is None or (found.scale is None and found.shift is None) or not self._fits(held, found):
            return None
        others = [part for part in found[1:] if part is not None]
        if any(names(part, ast.Load)[name] for part in others for name in state) or not all(
            _is_harmless(part) for part in others
        ):
            return None
        return self._parts(held, found, node, reset=False)

    def _fits(self, held: _Held, found: Normed) -> bool:
        """Whether a scale or shift may still follow what there is: a scale first, a shift last."""
        if found.scale is not None and (held.scaled or held.shifted):
            return False
        return found.shift is None or not held.shifted

    def _parts(self, held: _Held, found: Normed, at: ast.stmt, reset: bool) -> list[ast.stmt]:
        """Assignments of the scale and shift to the variables kept for them."""
        new: list[ast.stmt] = []
        if found.scale is not None or found.shift is not None:
            self.found.modulated.add(held.key)
            held.scaled = held.scaled or found.scale is not None
            held.shifted = held.shifted or found.shift is not None
            if found.scale is not None:
                self.found.worth.add(held.key)
        for kind, part in (("scale", found.scale), ("shift", found.shift)):
            if part is not None:
                new.append(_assign(self._variable(held.key, kind), self._expression(part, {}), at))
            elif reset and self._facts is not None and held.key in self._facts.modulated:
                new.append(_assign(self._variable(held.key, kind), ast.Constant(None), at))
        if reset and self._facts is not None and held.key in self._facts.embedded:
            new.append(_assign(self._variable(held.key, "embedding"), ast.Constant(None), at))
        return new

    def _embedding(self, pair: list[ast.stmt], state: State) -> list[ast.stmt] | None:
        """`v = v + e` (perhaps under an if), then `v = norm(v)`: the addition goes into the norm's pass."""
        if self._protected:
            return None
        first, second = pair
        conditional = first if isinstance(first, ast.If) else None
        addition = first
        if conditional is not None:
            if conditional.orelse or len(conditional.body) != 1:
                return None
            addition = conditional.body[0]
        target = _target(addition)
        if target is None or _target(second) != target or target in state or names(first, ast.Load)[target] != 1:
            return None
        value: ast.expr = addition.value  # type: ignore[attr-defined]
        if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add):
            return None
        mine = _is_name(target)
        if not mine(value.left) and not mine(value.right):
            return None
        added = value.right if mine(value.left) else value.left
        call: Any = second.value  # type: ignore[attr-defined]
        if conditional is None and self.patterns.is_sequential_call(call) and mine(call.args[0]) and not state:
            self.calls.append(Fused(call.func, embedded=True))
            arguments = [call.func, call.args[0], self._expression(added, {})]
            return [_assign(target, ast.Call(ast.Name(EMBEDDED, ast.Load()), arguments, []), second)]
        found = normed(call, self.patterns.is_norm_call)
        if found is None or not mine(found.core.args[0]):  # type: ignore[attr-defined]
            return None
        held = self._hold(second, state)
        if held is None:
            return None
        key = state[target].key
        self.found.embedded.add(key)
        self.found.worth.add(key)
        others = {name: other for name, other in state.items() if name != target}
        before = self._settle_for(others, added, None if conditional is None else conditional.test)
        for name in [name for name in state if name != target and name not in others]:
            del state[name]
        variable = self._variable(key, "embedding")
        kept: ast.stmt = _assign(variable, self._expression(added, {}), addition)
        if conditional is not None:
            conditional.test = self._expression(conditional.test, {})
            conditional.body = [kept]
            kept = conditional
        return [*before, *held, kept]

    # Expressions

    def _consumes(self, node: ast.stmt, name: str, held: _Held, loop: bool) -> bool:
        """Whether a statement uses a variable held back in its activation, and never again."""
        if isinstance(node, (ast.AugAssign, ast.Raise, ast.Assert)) or name in self.patterns.scope.captured:
            return False
        mine = _is_name(name)
        hits = []
        for inner in walk_here(node):
            if isinstance(inner, ast.expr):
                found = self.patterns.activated(inner, lambda e: normed(e, mine) is not None)
                if found is not None:
                    hits.append((inner, found))
        if len(hits) != 1:
            return False
        ((hit, found),) = hits
        parts = normed(found.inner, mine)
        assert parts is not None
        if not self._fits(held, parts) or any(p is not None and names(p, ast.Load)[name] for p in parts[1:]):
            return False
        if names(hit, ast.Load)[name] != names(node, ast.Load)[name]:
            return False
        # The norm is now called here, so nothing that could change its input may come before, in this statement.
        around = {id(inner) for inner in ast.walk(node) if any(child is hit for child in ast.walk(inner))}
        for inner in ast.walk(node):
            if (
                isinstance(inner, ast.Call)
                and id(inner) not in around
                and not any(inner is child for child in ast.walk(hit))
                and not _is_harmless_call(inner)
                and (inner.lineno, inner.col_offset) < (hit.lineno, hit.col_offset)
            ):
                return False
        if any(part is not None and not _is_harmless(part) for part in parts[1:]):
            return False
        if isinstance(node, ast.Return) or names(node, ast.Store)[name]:
            return True
        end = (node.end_lineno or 0, node.end_col_offset or 0)
        return not loop and not any(
            isinstance(other, ast.Name) and other.id == name and (other.lineno, other.col_offset) >= end
            for other in ast.walk(self._tree)
        )

    def _expression(self, node: Any, consumed: State) -> Any:
        """The node with its norms and activations fused, and with the variables in `consumed` used up."""
        return _Expressions(self, consumed).visit(node)

    def fuse_call(self, found: Normed, act: Activated | None) -> ast.expr:
        """A norm's call, what is done to its result, and the activation, as one call."""
        call: Any = found.core
        modulated = found.scale is not None or found.shift is not None
        self.calls.append(Fused(call.func, act and act.act, modulated))
        return _norm_act(call.func, self._expression(call.args[0], {}), act, [*found[1:], None])

    def fuse_held(self, name: str, held: _Held, found: Normed, act: Activated | None) -> ast.expr:
        """The call in which a variable held back becomes what it should be."""
        facts = self._facts or _Facts()
        if found.scale is not None or found.shift is not None:
            self.found.modulated.add(held.key)
        self.found.worth.add(held.key)
        modulated, embedded = held.key in facts.modulated, held.key in facts.embedded
        self.calls.append(Fused(held.norm, act and act.act, modulated, embedded))
        parts = [
            found.scale or (self._variable(held.key, "scale") if modulated else None),
            found.shift or (self._variable(held.key, "shift") if modulated else None),
            self._variable(held.key, "embedding") if embedded else None,
        ]
        return _norm_act(
            held.norm, _load(name), act, [_load(part) if isinstance(part, str) else part for part in parts]
        )

    # The variables held back

    def _settle(self, state: State) -> list[ast.stmt]:
        """Calls the norm for each of the variables."""
        new: list[ast.stmt] = []
        for name, held in state.items():
            value: ast.expr
            if self._facts is not None and held.key in self._facts.modulated | self._facts.embedded:
                worth = held.key in self.found.worth
                value = self.fuse_held(name, held, Normed(_load(name), None, None), None)
                if not worth:  # this alone would not be worth it
                    self.found.worth.discard(held.key)
            else:
                value = ast.Call(copy.deepcopy(held.norm), [_load(name)], [])
            new.append(_assign(name, value, held.norm))
        return new

    def _settle_for(self, state: State, *nodes: ast.expr | None) -> list[ast.stmt]:
        """The same for those that the expressions need, or could change; they are no longer held."""
        parts = [node for node in nodes if node is not None]
        changes = not all(_is_harmless(part) for part in parts)
        wanted = {n: h for n, h in state.items() if changes or any(names(p, ast.Load)[n] for p in parts)}
        for name in wanted:
            del state[name]
        return self._settle(wanted)

    def _variable(self, key: Key, kind: str) -> str:
        return f"_ddpm_fast_{kind}_{self._numbers.setdefault(key, len(self._numbers))}"


class _Expressions(ast.NodeTransformer):
    """Replaces norms and their activations in an expression, or in the expressions of a simple statement."""

    def __init__(self, rewriter: _Rewriter, consumed: State) -> None:
        self._rewriter = rewriter
        self._consumed = consumed

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, SCOPED):
            return node
        if isinstance(node, ast.expr):
            act = self._rewriter.patterns.activated(node, lambda e: normed(e, self._is_core) is not None)
            found = normed(node if act is None else act.inner, self._is_core)
            if found is not None and (act is not None or found.scale is not None):
                fused = self._fuse(found, act)
                return ast.copy_location(fused, node)
        if _is_sum_by_attribute(node):
            sum_and_factor = [self.visit(node.left), node.right]
            return ast.copy_location(ast.Call(_load(DIVIDED), sum_and_factor, []), node)
        return self.generic_visit(node)

    def _is_core(self, node: ast.expr) -> bool:
        return (isinstance(node, ast.Name) and node.id in self._consumed) or self._rewriter.patterns.is_norm_call(node)

    def _fuse(self, found: Normed, act: Activated | None) -> ast.expr:
        parts = [None if part is None else self.visit(part) for part in found[1:]]
        found = Normed(found.core, *parts)
        if isinstance(found.core, ast.Name):
            return self._rewriter.fuse_held(found.core.id, self._consumed[found.core.id], found, act)
        return self._rewriter.fuse_call(found, act)


def _norm_act(norm: ast.expr, value: ast.expr, act: Activated | None, parts: list[ast.expr | None]) -> ast.expr:
    arguments = [copy.deepcopy(norm), value, *(part or ast.Constant(None) for part in parts)]
    arguments.insert(2, ast.Constant(None) if act is None else act.act)
    while isinstance(arguments[-1], ast.Constant) and arguments[-1].value is None:
        arguments.pop()  # the defaults
    return ast.Call(_load(NORM_ACT), arguments, [])


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _assign(name: str, value: ast.expr, at: ast.AST) -> ast.Assign:
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), at)


def _is_name(name: str) -> Callable[[ast.expr], bool]:
    return lambda node: isinstance(node, ast.Name) and node.id == name


def _target(node: ast.stmt) -> str | None:
    """The variable, if the statement is `variable = ...`."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _is_sum_by_attribute(node: ast.AST) -> TypeGuard[ast.BinOp]:
    """Whether it is `(a + b) / c.d`, as blocks end whose output can be scaled."""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and isinstance(node.left, ast.BinOp)
        and isinstance(node.left.op, ast.Add)
        and isinstance(node.right, ast.Attribute)
        and isinstance(node.right.value, ast.Name)
    )


def _is_harmless_call(node: ast.Call) -> bool:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    return name in _HARMLESS and not any(k.arg in (None, "out") for k in node.keywords)


def _is_harmless(node: ast.AST) -> bool:
    """Whether what is below writes into nothing but local variables."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and not _is_harmless_call(inner):
            return False
        if isinstance(inner, ast.NamedExpr):
            return False
        if isinstance(inner, (ast.Attribute, ast.Subscript)) and not isinstance(inner.ctx, ast.Load):
            return False
    return True


def _copy(state: State) -> State:
    return {name: held.join(held) for name, held in state.items()}
