"""PTX functions -> C++ functions. Every statement of PTX becomes one of C++."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from . import ops_arithmetic, ops_memory  # noqa: F401  (they register their opcodes)
from .instruction import Names, Unsupported, cname, ctype, initial, statement
from .parse import Function, Global, Instr, Parsed

# What a translator raises on a form of an instruction that it does not know.
_FAILURES = (Unsupported, KeyError, StopIteration, IndexError, TypeError, ValueError)
_ENDS_BLOCK = ("bra", "brx", "ret", "exit")

_EXPORTS = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int ptx_launch(const char* name, const Launch* launch, u64* stats, char* message) {{
  for (auto& e : ENTRIES)
    if (!strcmp(e.name, name))
      return run_launch(e, *launch, GLOBALS, sizeof GLOBALS / sizeof(Range), stats, message);
  return 2;
}}
EXPORT void* ptx_symbol(const char* name) {{
  {symbols}
  return nullptr;
}}"""


class Translation:
    """The C++ `source` of a module's kernels, and the instructions that are `unsupported`."""

    preamble = ""  # C++ before everything else

    def __init__(self, parsed: Parsed, kernels: Mapping[str, Function]) -> None:
        self.unsupported: list[tuple[str, int, str, str]] = []
        self._parsed = parsed
        helpers = [f for f in parsed.functions.values() if not f.entry]
        variables = list(parsed.globals.values())
        lines = ['#include "ptxrt.h"', self.preamble]
        lines += [_definition(v) for v in variables]
        lines += [f"static void F_{cname(f.name)}(Thread& t, Args A);" for f in helpers]
        for f in [*helpers, *kernels.values()]:
            lines += self._function(f)
        ranges = [f"{{(u64){cname(v.name)}, sizeof {cname(v.name)}, {int(not v.const)}, 0}}" for v in variables]
        lines.append(f"static const Range GLOBALS[] = {{{', '.join(ranges)}}};")
        entries = [f'{{"{name}", K_{cname(name)}}}' for name in kernels]
        lines.append(f"static const Entry ENTRIES[] = {{{', '.join(entries)}}};")
        symbols = [f'if (!strcmp(name, "{v.name}")) return {cname(v.name)};' for v in variables]
        lines.append(_EXPORTS.format(symbols=" ".join(symbols)))
        self.source = "\n".join(lines)

    def _names(self, f: Function) -> Names:
        if f.entry:
            parameters = {name: f"P + {p.offset}" for name, p in f.params.items()}
        else:
            parameters = {name: f"A.p[{k}]" for k, name in enumerate([*f.returns, *f.params])}
        functions = {x.name for x in self._parsed.functions.values() if not x.entry}
        shared = self._parsed.shared_layout(f)[0]
        return Names(parameters, shared, f.local, set(self._parsed.globals), functions)

    def _function(self, f: Function) -> Iterator[str]:
        """A kernel or function; its instructions are counted a basic block at a time."""
        names, sizes = self._names(f), _block_sizes(f)
        kind, parameter = ("K", "const u8* P") if f.entry else ("F", "Args A")
        yield f"static void {kind}_{cname(f.name)}(Thread& t, {parameter}) {{ u32 CC = 0;"
        if f.local_bytes:
            yield f"alignas(16) char L[{f.local_bytes}]; Frame L_(t, L, sizeof L);"
        if f.param_bytes and f.entry:
            frame = f"P_.emplace(t, (char*)P, {f.param_bytes}, false)"
            yield f"std::optional<Frame> P_; if (CHECKED) {frame};"
        for k, x in enumerate(f.code):
            if x.kind in "{}":
                yield x.kind
            elif x.kind == "label":
                yield f"{cname(x.text)}: ;"
            elif x.kind == "reg":
                yield f"{x.text} {', '.join(map(cname, x.ops))};"
            elif x.kind == "param":
                names.params[x.ops[0]] = cname(x.ops[0])
                yield f"alignas(16) u8 {cname(x.ops[0])}[{x.ops[1]}];"
            else:
                count = f"count(t, {sizes[k]}, {x.line}); " if k in sizes else ""
                yield count + self.instruction(f, x, names)
        yield "}"

    def instruction(self, f: Function, x: Instr, names: Names) -> str:
        """The C++ statement of an instruction of a function."""
        try:
            cpp = statement(x, names, f.targets)
        except _FAILURES as error:
            self.unsupported.append((f.name, x.line, x.text, f"{type(error).__name__}: {error}"))
            cpp = f'bad(t, "unsupported {x.text}", {x.line});'
        return f"if ({x.guard[0]}{cname(x.guard[1])}) {cpp}" if x.guard else cpp


def _definition(variable: Global) -> str:
    """A __device__ or __constant__ variable, with its initial value as register bits."""
    kind = ctype(variable.type)
    items = re.findall(r"[^\s,]+", variable.init)
    values = ", ".join(f"({kind})({initial(item, variable.type)})" for item in items) or "0"
    return f"alignas(128) static {kind} {cname(variable.name)}[{variable.count}] = {{{values}}};"


def _block_sizes(f: Function) -> Counter[int]:
    """The index of the first instruction of each basic block -> the instructions in the block."""
    sizes: Counter[int] = Counter()
    start: int | None = None
    for k, x in enumerate(f.code):
        if x.kind == "label":
            start = None
        elif x.kind == "op":
            start = k if start is None else start
            sizes[start] += 1
            if x.text.split(".")[0] in _ENDS_BLOCK:
                start = None
    return sizes
