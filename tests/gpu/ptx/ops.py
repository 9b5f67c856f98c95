"""PTX instruction -> C++ statement. To add an opcode, write a function of an Ins under @op('name') that returns the statement:

    @op('popc')
    def popc(i):
        return i.set(f'__builtin_popcountll({i.val(1)})', 'u32')

i.val(k) is the C++ value of operand k in the instruction's type, i.set(e) assigns e to operand 0. A form that is not
handled raises Unsupported (KeyError and the like count too): it is listed in Module.unsupported and fails when executed."""
from __future__ import annotations

import re
from typing import Callable

from .parse import SIZE, Instr, split_operands

OPS: dict[str, Callable[['Ins'], str]] = {}
FLOATS = ('f32', 'f64', 'f16', 'bf16')
ROUNDING = {'rn': 'RN', 'rz': 'RZ', 'rm': 'RM', 'rp': 'RP', 'rni': 'RN', 'rzi': 'RZ', 'rmi': 'RM', 'rpi': 'RP'}
WIDE = {'u16': 'u32', 's16': 's32', 'u32': 'u64', 's32': 's64'}
C_OP = {'and': '&', 'or': '|', 'xor': '^'}
SPECIAL = {
    '%laneid': '(u32)(t.lin & 31)', '%warpid': '(u32)(t.lin >> 5)', '%nwarpid': '(u32)t.blk->warps', '%smid': '0u', '%nsmid': '1u', '%gridid': '0ull', '%clock': '(u32)t.count->ins', '%clock_hi': '0u',
    '%clock64': 't.count->ins', '%globaltimer': '0ull', '%globaltimer_lo': '0u', '%cluster_ctarank': '(u32)t.blk->rank', '%cluster_nctarank': '(u32)t.blk->cl->blocks.size()', '%is_explicit_cluster': '(u32)(t.blk->cl->blocks.size() > 1)',
    '%lanemask_eq': '(1u << (t.lin & 31))', '%lanemask_lt': 'lanes_below(t)', '%lanemask_le': '(lanes_below(t) * 2 + 1)', '%lanemask_gt': '~(lanes_below(t) * 2 + 1)', '%lanemask_ge': '~lanes_below(t)',
    '%total_smem_size': '(u32)t.blk->smem_bytes', 'WARP_SZ': '32u'}
for _d in 'xyz':
    SPECIAL |= {f'%tid.{_d}': f't.tid.{_d}', f'%ntid.{_d}': f't.blk->dim.{_d}', f'%ctaid.{_d}': f't.blk->bid.{_d}', f'%nctaid.{_d}': f't.blk->grid.{_d}', f'%cluster_nctaid.{_d}': f't.blk->cl->dim.{_d}',
                f'%cluster_ctaid.{_d}': f'(t.blk->bid.{_d} % t.blk->cl->dim.{_d})', f'%clusterid.{_d}': f'(t.blk->bid.{_d} / t.blk->cl->dim.{_d})', f'%nclusterid.{_d}': f'(t.blk->grid.{_d} / t.blk->cl->dim.{_d})'}

# Modifiers that some function below handles, or that change no result here. Any other makes the instruction unsupported.
KNOWN = set(SIZE) | set(ROUNDING) | set('''
    lo hi wide cc sat ftz relu approx full NaN xorsign abs noftz global shared local const param v2 v4 v8 weak relaxed acquire release acq_rel sc volatile mmio cta cluster gpu sys
    gl ca cg cs cv lu wb wt nc to eq ne lt le gt ge ls hs num nan equ neu ltu leu gtu geu and or xor add min max exch cas inc dec popc up down bfly idx ballot any all uni sync aligned l r clamp wrap
    f4e b4e rc8 ecl ecr rc16 shiftamt finite infinite number notanumber normal subnormal async bulk bulk_group commit_group wait_group wait_all read noinc arrive arrive_drop expect_tx init inval test_wait try_wait parity
    proxy mbarrier_init sync_restrict alias fractional range launch_dependents wait warp red m8n8 x1 x2 x4 trans rna evict_last evict_normal evict_first unchanged'''.split())


class Unsupported(Exception):
    pass


def op(*names: str):
    """Register a translator for these opcodes."""
    def add(fn):
        OPS.update(dict.fromkeys(names, fn))
        return fn
    return add


def ctype(t: str) -> str:
    """C++ type that holds the bits of a PTX type."""
    if t == 'pred':
        return 'u32'
    return ('s' if t[0] == 's' and 'x' not in t else 'u') + str(SIZE[t] * 8)


def cname(n: str) -> str:
    """C++ identifier of a PTX one."""
    return re.sub(r'[%.$]', lambda m: {'%': 'R', '.': '_', '$': 'S'}[m[0]], n if n[0] == '%' else 'N' + n)


class Names:
    """What an identifier of a function means: parameter (C++ pointer), shared/local variable (offset), global variable, function."""

    def __init__(self, params: dict[str, str], shared: dict[str, int], local: dict[str, int], globals_: set[str], functions: set[str]):
        self.params, self.shared, self.local, self.globals, self.functions = params, shared, local, globals_, functions


class Ins:
    def __init__(self, ins: Instr, names: Names, targets: dict[str, list[str]]):
        self.full, self.ops, self.line, self.names, self.targets = ins.text, ins.ops, ins.line, names, targets
        parts = ins.text.split('.')
        self.name, self.mods = parts[0], [m if m.startswith(('L1', 'L2', 'mbarrier')) else m.split('::')[0] for m in parts[1:]]
        self.scopes = parts[1:]
        for m in self.mods:
            if (m not in KNOWN and not m.startswith(('L1', 'L2', 'mbarrier'))) or m == 'b128' or (m == 'async' and self.name not in ('cp', 'fence')):
                raise Unsupported(f'modifier .{m}')
        self.types = [m for m in self.mods if m in SIZE]
        self.t = self.types[-1] if self.types else ''
        self.ftz, self.sat = 'ftz' in self.mods, 'sat' in self.mods
        self.isf = self.t in FLOATS

    def has(self, *mods: str) -> bool:
        return any(m in self.mods for m in mods)

    def one(self, *mods: str) -> str:
        """The first modifier out of a set; Unsupported when there is none."""
        for m in self.mods:
            if m in mods:
                return m
        raise Unsupported(self.full)

    def opt(self, *mods: str, default: str | None = None) -> str | None:
        return next((m for m in self.mods if m in mods), default)

    @property
    def bits(self) -> int:
        return SIZE[self.t] * 8

    @property
    def rnd(self) -> str:
        return ROUNDING[self.opt('rn', 'rz', 'rm', 'rp', default='rn')]

    def raw(self, o: int | str) -> str:
        """C++ expression with the bits of an operand."""
        o = (self.ops[o] if isinstance(o, int) else o).strip()
        if o in SPECIAL:
            return SPECIAL[o]
        if o.startswith('!'):
            return f'(u32)!{self.raw(o[1:])}'
        if m := re.fullmatch(r'0[fF]([0-9a-fA-F]{8})', o):
            return f'0x{m[1]}u'
        if m := re.fullmatch(r'0[dD]([0-9a-fA-F]{16})', o):
            return f'0x{m[1]}ull'
        if re.fullmatch(r'-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?', o):
            v = int(re.sub(r'^(-?)0(\d+)$', r'\g<1>0o\2', o.rstrip('U')), 0)
            return f'((s64){v}ll)' if -2**63 < v < 2**63 else f'{v % 2**64}ull'
        if re.fullmatch(r'-?\d+\.\d*([eE][+-]?\d+)?', o):
            return f'ub({o})' if self.t == 'f64' else f'ub({o}f)'
        base, _, off = o.partition('+')
        base, off = base.strip(), off.strip() or '0'
        if base in self.names.local:
            return f'((u64)L + {self.names.local[base]} + {off})'
        if base in self.names.shared:
            return f'({self.names.shared[base]}u + {off})'
        if base in self.names.params:
            return f'((u64)({self.names.params[base]}) + {off})'
        if base in self.names.globals:
            return f'((u64){cname(base)} + {off})'
        if re.fullmatch(r'%?[A-Za-z_$][\w$.]*', o) and not o.startswith(('%env', '%pm')):
            return cname(o)
        raise Unsupported(f'operand {o!r}')

    def val(self, o: int | str, t: str | None = None) -> str:
        """C++ value of an operand in type t (default: the instruction's); .ftz flushes float inputs."""
        t = t or self.t
        r = self.raw(o)
        if t == 'f32':
            return f'fz(f({r}))' if self.ftz else f'f({r})'
        return {'f64': f'd({r})', 'f16': f'h2f({r})', 'bf16': f'b2f({r})', 'pred': f'({r})'}.get(t) or f'({ctype(t)})({r})'

    def pack(self, e: str, t: str | None = None) -> str:
        """Register bits of a C++ value."""
        t = t or self.t
        if t == 'f32':
            return f'ub(fz({e}))' if self.ftz else f'ub((float)({e}))'
        return {'f64': f'ub((double)({e}))', 'f16': f'f2h({e})', 'bf16': f'f2b({e})'}.get(t) or f'({ctype(t)})({e})'

    def set(self, e: str, t: str | None = None) -> str:
        """Assign a C++ value to operand 0, with .sat of floats."""
        if self.sat and (t or self.t) in FLOATS:
            e = f'sat({e})'
        return self.bits_to(0, self.pack(e, t))

    def bits_to(self, k: int, e: str) -> str:
        """Assign register bits to operand k ('_' drops them)."""
        return f'(void)({e});' if self.ops[k] == '_' else f'{cname(self.ops[k])} = {e};'

    def lanes(self, t: str, fn: Callable[[list[str]], str]) -> str:
        """Packed arithmetic: apply fn to the lanes (C++ values of type t) of operands 1.. and pack the results."""
        w = SIZE[t] * 8
        part = lambda sh: fn([f"{dict(f16='h2f', bf16='b2f', f32='f').get(t, f'({ctype(t)})')}((u{w})({self.raw(o)} >> {sh}))" for o in self.ops[1:]])
        packed = self.bits // w
        return self.bits_to(0, ' | '.join(f'(u{self.bits})(u{w})({self.pack(part(k * w), t)}) << {k * w}' for k in range(packed)))

    def addr(self, o: int | str) -> str:
        """C++ expression of [base + offset]; parameters give their host address."""
        m = re.fullmatch(r'\[\s*([^\s+]+?)\s*(?:\+\s*(-?\w+))?\s*\]', self.ops[o] if isinstance(o, int) else o)
        if m[1] in self.names.params:
            return f'(u64)({self.names.params[m[1]]}) + {int(m[2] or "0", 0)}'
        return f'(u64)({self.raw(m[1])}) + ({int(m[2] or "0", 0)})'

    def space(self) -> str:
        return self.opt('global', 'shared', 'local', 'const', 'param', default='generic').upper()

    def strength(self) -> str:
        s = ['STRONG'] if self.has('volatile', 'relaxed', 'acquire', 'release', 'acq_rel', 'mmio') or self.name in ('atom', 'red') else []
        s += ['CTA'] * bool(s and self.has('cta'))
        s += ['READONLY'] * (self.has('nc') and self.name == 'ld')
        return '|'.join(s + ['ACQUIRE'] * self.has('acquire', 'acq_rel') + ['RELEASE'] * self.has('release', 'acq_rel')) or 'WEAK'


def group(o: str) -> list[str]:
    """Members of {a, b} or the operand itself."""
    return split_operands(o[1:-1]) if o.startswith('{') else [o]


# ---- data movement
@op('mov')
def mov(i: Ins) -> str:
    dst, src = group(i.ops[0]), group(i.ops[1])
    if len(dst) > 1:
        b = i.bits // len(dst)
        return f'{{ u64 T_ = {i.raw(1)}; ' + ' '.join(f'{cname(x)} = (u{b})(T_ >> {b * k});' for k, x in enumerate(dst) if x != '_') + ' }'
    if len(src) > 1:
        b = i.bits // len(src)
        return i.bits_to(0, ' | '.join(f'(u64)(u{b})({i.raw(x)}) << {b * k}' for k, x in enumerate(src)))
    return i.bits_to(0, i.raw(1))


@op('ld', 'ldu')
def load(i: Ins) -> str:
    regs, c = group(i.ops[0]), ctype(i.t)
    size, space = SIZE[i.t] * len(regs), i.space()
    get = f'memcpy(V_, (void*)({i.addr(1)}), {size});' if space == 'PARAM' else f'ld(t, {space}, {i.addr(1)}, V_, {size}, {i.line}, {i.strength()});'
    return f'{{ {c} V_[{len(regs)}]; {get} ' + ' '.join(f'{cname(r)} = V_[{k}];' for k, r in enumerate(regs) if r != '_') + ' }'


@op('st')
def store(i: Ins) -> str:
    regs, c = group(i.ops[1]), ctype(i.t)
    size, space = SIZE[i.t] * len(regs), i.space()
    put = f'memcpy((void*)({i.addr(0)}), V_, {size});' if space == 'PARAM' else f'st(t, {space}, {i.addr(0)}, V_, {size}, {i.line}, {i.strength()});'
    return f'{{ {c} V_[{len(regs)}] = {{' + ', '.join(f'({c})({i.raw(r)})' for r in regs) + f'}}; {put} }}'


@op('cvta')
def cvta(i: Ins) -> str:
    if not i.has('shared'):
        return i.bits_to(0, i.raw(1))
    return i.bits_to(0, f'to_shared(t, {i.raw(1)})' if i.has('to') else f'to_generic(t, {i.raw(1)}, {i.line})')


@op('isspacep')
def isspacep(i: Ins) -> str:
    s = i.one('global', 'shared', 'local', 'const', 'param')
    return i.bits_to(0, '0' if s in ('const', 'param') else f"is_space(t, {i.raw(1)}, {s.upper()}, {str('shared::cluster' not in i.scopes).lower()})")


@op('mapa')
def mapa(i: Ins) -> str:
    return i.bits_to(0, f"{'mapa_shared' if i.has('shared') else 'mapa_generic'}(t, {i.raw(1)}, (u32)({i.raw(2)}), {i.line})")


@op('getctarank')
def getctarank(i: Ins) -> str:
    p = f'shared_place(t, {i.raw(1)}, {i.line})' if i.has('shared') else f'find_shared(t, {i.raw(1)})'
    return i.bits_to(0, f'ctarank(t, {p}, {i.line})')


ATOMS = {'add': '{o} + {a}', 'min': 'std::min({o}, {a})', 'max': 'std::max({o}, {a})', 'and': '{o} & {a}', 'or': '{o} | {a}', 'xor': '{o} ^ {a}', 'exch': '{a}', 'cas': '{o} == {a} ? {b} : {o}',
         'inc': '{o} >= {a} ? 0 : {o} + 1', 'dec': '{o} == 0 || {o} > {a} ? {a} : {o} - 1'}


@op('atom', 'red')
def atom(i: Ins) -> str:
    kind, ops, half = i.one(*ATOMS), (['_'] if i.name == 'red' else []) + i.ops, i.t[:-2] if i.t.endswith('x2') else ''
    dst, src, c, out = group(ops[0]), group(ops[2]), f'u{i.bits}', []
    i.ftz = i.t == 'f32' and i.has('global') and kind == 'add'       # as the hardware: f32 adds in global memory flush, in shared not
    for k, a in enumerate(src):
        if half:
            cv, back = ('h2f', 'f2h') if half == 'f16' else ('b2f', 'f2b')
            part = lambda sh: f"(u32){back}({ATOMS[kind].replace('std::min', 'fmn').replace('std::max', 'fmx').format(o=f'{cv}((u16)(o >> {sh}))', a=f'{cv}((u16)({i.raw(a)} >> {sh}))')}) << {sh}"
            e = f'{part(0)} | {part(16)}'
        else:
            old = {'f32': 'fz(f(o))' if i.ftz else 'f(o)', 'f64': 'd(o)', 'f16': 'h2f(o)', 'bf16': 'b2f(o)'}.get(i.t, f'({ctype(i.t)})o')
            e = i.pack(ATOMS[kind].format(o=old, a=i.val(a), b=i.val(ops[3]) if kind == 'cas' else ''))
        d = dst[k] if len(dst) > 1 else dst[0]
        out.append((f'{cname(d)} = ' if d != '_' else '') + f'atomic<{c}>(t, {i.space()}, {i.addr(ops[1])} + {k * SIZE[i.t]}, {i.line}, {i.strength()}, [&]({c} o) -> {c} {{ return {e}; }});')
    return '{ ' + ' '.join(out) + ' }'


# ---- arithmetic
F_NAME = {'add': 'fadd', 'sub': 'fsub', 'mul': 'fmul'}


def fused(i: Ins, t: str, a: list[str]) -> str:
    e = f"ffma<{i.rnd}>({', '.join(a)})" if t in ('f32', 'f64') else f"fma_odd({', '.join(a)})"
    return f'relu({e})' if i.has('relu') else f'sat({e})' if i.sat and t in ('f16', 'bf16') and i.t != t else e


def packed_type(i: Ins) -> str:
    return i.t[:-2] if i.t.endswith('x2') else ''


@op('add', 'sub', 'mul')
def add_sub_mul(i: Ins) -> str:
    if h := packed_type(i):
        fl = lambda x: f'fz({x})' if i.ftz and h == 'f32' else x
        if h in FLOATS:
            return i.lanes(h, lambda a: ('sat' if i.sat else '') + f'({F_NAME[i.name]}<{i.rnd}>({fl(a[0])}, {fl(a[1])}))')
        return i.lanes(h, lambda a: f"{a[0]} {'+-'[i.name == 'sub']} {a[1]}")
    if i.isf:
        return i.set(f'{F_NAME[i.name]}<{i.rnd}>({i.val(1)}, {i.val(2)})')
    if i.name == 'mul':
        return multiply(i)
    u = 'u' + str(i.bits)
    if i.has('cc'):
        return i.bits_to(0, f"{'addx' if i.name == 'add' else 'subx'}<{u}>({i.raw(1)}, {i.raw(2)}, 0, CC)")
    if i.sat:
        return i.bits_to(0, f'{i.name}_sat<s32>({i.raw(1)}, {i.raw(2)})')
    return i.bits_to(0, f"({ctype(i.t)})(({u})({i.raw(1)}) {'+-'[i.name == 'sub']} ({u})({i.raw(2)}))")


@op('addc', 'subc')
def add_carry(i: Ins) -> str:
    return f"{{ u32 C_; {i.bits_to(0, f'{i.name[:3]}x<u{i.bits}>({i.raw(1)}, {i.raw(2)}, CC, C_)')} {'CC = C_;' if i.has('cc') else ''} }}"


def product(i: Ins) -> str:
    """(C++ value, type) of the product part of mul/mad."""
    if i.has('wide'):
        w = ctype(WIDE[i.t])
        return f'({w})(({w}){i.val(1)} * ({w}){i.val(2)})'
    return f'mulhi<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)})' if i.has('hi') else f'(u{i.bits})((u64)({i.raw(1)}) * (u64)({i.raw(2)}))'


def multiply(i: Ins) -> str:
    return i.bits_to(0, product(i))


@op('mad', 'madc')
def mad(i: Ins) -> str:
    if i.isf:
        return fma(i)
    u = f'u{i.bits}'
    if i.name == 'madc' or i.has('cc'):
        carry = 'CC' if i.name == 'madc' else '0'
        return f"{{ u32 C_; {i.bits_to(0, f'addx<{u}>({product(i)}, {i.raw(3)}, {carry}, C_)')} {'CC = C_;' if i.has('cc') else ''} }}"
    if i.has('wide'):
        return i.bits_to(0, f'{product(i)} + {i.val(3, WIDE[i.t])}')
    return i.bits_to(0, f'add_sat<s32>({product(i)}, {i.raw(3)})' if i.sat else f'({ctype(i.t)})(({u}){product(i)} + ({u})({i.raw(3)}))')


@op('mul24', 'mad24')
def mul24(i: Ins) -> str:
    return i.bits_to(0, f"mul24<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)}, {int(i.one('lo', 'hi') == 'hi')})" + (f' + (u32)({i.raw(3)})' if i.name == 'mad24' else ''))


@op('fma')
def fma(i: Ins) -> str:
    if h := packed_type(i):
        return i.lanes(h, lambda a: fused(i, h, [f'fz({x})' if i.ftz and h == 'f32' else x for x in a]))
    return i.set(fused(i, i.t, [i.val(1), i.val(2), i.val(3)]))


@op('div')
def div(i: Ins) -> str:
    if not i.isf:
        return i.bits_to(0, f'idiv<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)})')
    if i.has('approx', 'full'):
        return i.set(f"approx({'div_approx' if i.has('approx') else 'fdiv'}({i.val(1)}, {i.val(2)}), 0x1p-22)")
    return i.set(f'fdiv<{i.rnd}>({i.val(1)}, {i.val(2)})')


@op('rem')
def rem(i: Ins) -> str:
    return i.bits_to(0, f'irem<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)})')


@op('neg', 'abs')
def neg_abs(i: Ins) -> str:
    t = packed_type(i) or i.t
    if t in FLOATS:
        sign = sum(1 << k for k in range(SIZE[t] * 8 - 1, i.bits, SIZE[t] * 8))
        x = f'ub({i.val(1)})' if i.ftz else i.raw(1)
        return i.bits_to(0, f"(u{i.bits})({x}) {'^' if i.name == 'neg' else '&'} {hex(sign if i.name == 'neg' else 2**i.bits - 1 - sign)}ull")
    return i.bits_to(0, f'({ctype(i.t)})({i.val(1)} < 0 ? 0 - (u64){i.val(1)} : {i.val(1)})' if i.name == 'abs' else f'({ctype(i.t)})(0 - (u64){i.val(1)})')


@op('min', 'max')
def min_max(i: Ins) -> str:
    h, name = packed_type(i), {'min': 'fmn', 'max': 'fmx'}[i.name]

    def pick(a: list[str]) -> str:
        x, y = a[:2]
        e = f'{name}(std::abs({x}), std::abs({y}))' if i.has('xorsign') else f'{name}({x}, {y})' if len(a) == 2 else f'{name}({name}({x}, {y}), {a[2]})'
        e = f'xorsign({x}, {y}, ({e}))' if i.has('xorsign') else e
        if i.has('NaN'):
            e = f'nanif({x}, {y}, {e})' if len(a) == 2 else f'nanif({a[2]}, {x}, nanif({x}, {y}, {e}))'
        return e
    if h in FLOATS:
        return i.lanes(h, pick)
    if h:
        return i.lanes(h, lambda a: f'std::{i.name}({a[0]}, {a[1]})')
    if i.isf:
        return i.set(f'({dict(f64="double").get(i.t, "float")})' + pick([i.val(k) for k in range(1, len(i.ops))]))
    e = f'std::{i.name}({i.val(1)}, {i.val(2)})'
    return i.bits_to(0, f'relu({e})' if i.has('relu') else e)


@op('sad')
def sad(i: Ins) -> str:
    a, b = i.val(1), i.val(2)
    return i.bits_to(0, f'(u64)({i.raw(3)}) + ({a} < {b} ? (u64){b} - (u64){a} : (u64){a} - (u64){b})')


@op('dp4a')
def dp4a(i: Ins) -> str:
    return i.bits_to(0, f'dp4a<{i.types[0][0]}8, {i.types[1][0]}8>({i.raw(1)}, {i.raw(2)}, {i.raw(3)})')


@op('sqrt', 'rcp')
def sqrt_rcp(i: Ins) -> str:
    e = f"f{i.name}<{i.rnd}>({i.val(1)})"
    return i.set(f'approx({e}, 0x1p-22)' if i.has('approx') and i.t == 'f32' else e)


UNARY = {'ex2': 'approx(exp2f({}), 0x1p-22)', 'lg2': 'approx(log2f({}), 0x1p-22, 0x1p-22)', 'sin': 'approx(sinf({}), 0, 0x1p-20)', 'cos': 'approx(cosf({}), 0, 0x1p-20)', 'tanh': 'approx(tanhf({}), 0x1p-11)', 'rsqrt': 'approx(1 / sqrtf({}), 0x1p-22)'}


@op(*UNARY)
def unary(i: Ins) -> str:
    if h := packed_type(i):
        return i.lanes(h, lambda a: UNARY[i.name].format(a[0]))
    return i.set(f'1 / sqrt({i.val(1)})' if i.t == 'f64' else UNARY[i.name].format(i.val(1)))


@op('copysign')
def copysign(i: Ins) -> str:
    m = 1 << (i.bits - 1)
    return i.bits_to(0, f'((u{i.bits})({i.raw(2)}) & {m - 1}ull) | ((u{i.bits})({i.raw(1)}) & {m}ull)')


@op('testp')
def testp(i: Ins) -> str:
    v = i.val(1)
    return i.bits_to(0, {'finite': f'std::isfinite({v})', 'infinite': f'std::isinf({v})', 'number': f'{v} == {v}', 'notanumber': f'{v} != {v}', 'normal': f'std::isnormal({v})',
                         'subnormal': f'std::fpclassify({v}) == FP_SUBNORMAL'}[i.mods[0]])


# ---- bits
@op('and', 'or', 'xor')
def logic(i: Ins) -> str:
    return i.bits_to(0, f'{i.raw(1)} {C_OP[i.name]} {i.raw(2)}')


@op('not', 'cnot')
def invert(i: Ins) -> str:
    return i.bits_to(0, f'!{i.raw(1)}' if i.t == 'pred' else f'~{i.val(1)}' if i.name == 'not' else f'{i.val(1)} ? 0 : 1')


@op('shl', 'shr')
def shift(i: Ins) -> str:
    return i.bits_to(0, f'{i.name}<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)})')


@op('shf')
def funnel_shift(i: Ins) -> str:
    n = f'((u32)({i.raw(3)}) & 31)' if i.has('wrap') else f'std::min((u32)({i.raw(3)}), 32u)'
    v = f'((u64)(u32)({i.raw(2)}) << 32 | (u32)({i.raw(1)}))'
    return i.bits_to(0, f'(u32)({v} << {n} >> 32)' if i.has('l') else f'(u32)({v} >> {n})')


@op('bfe', 'bfi')
def bit_field(i: Ins) -> str:
    return i.bits_to(0, f"{i.name}<{ctype(i.t)}>({', '.join(i.raw(k) for k in range(1, len(i.ops)))})")


PRMT_MODES = {'f4e': '3210 4321 5432 6543', 'b4e': '5670 6701 7012 0123', 'rc8': '0000 1111 2222 3333', 'ecl': '3210 3211 3222 3333', 'ecr': '0000 1110 2210 3210', 'rc16': '1010 3232 1010 3232'}


@op('prmt')
def prmt(i: Ins) -> str:
    selector = i.raw(3)
    if mode := i.opt(*PRMT_MODES):
        selector = '(const u32[]){' + ', '.join('0x' + s for s in PRMT_MODES[mode].split()) + f'}}[{selector} & 3]'
    return i.bits_to(0, f'prmt({i.raw(1)}, {i.raw(2)}, {selector})')


@op('lop3')
def lop3(i: Ins) -> str:
    return i.bits_to(0, f'lop3({i.raw(1)}, {i.raw(2)}, {i.raw(3)}, {i.raw(4)})')


@op('popc')
def popc(i: Ins) -> str:
    return i.set(f'__builtin_popcountll({i.val(1)})', 'u32')


@op('clz')
def clz(i: Ins) -> str:
    return i.set(f'{i.val(1)} ? __builtin_clzll({i.val(1)}) - {64 - i.bits} : {i.bits}', 'u32')


@op('brev')
def brev(i: Ins) -> str:
    return i.bits_to(0, f'brev<{ctype(i.t)}>({i.raw(1)})')


@op('bfind')
def bfind(i: Ins) -> str:
    return i.set(f"bfind<{ctype(i.t)}>({i.raw(1)}, {int(i.has('shiftamt'))})", 'u32')


# ---- comparison and selection
COMPARE = {'eq': '==', 'ne': '!=', 'lt': '<', 'le': '<=', 'gt': '>', 'ge': '>=', 'lo': '<', 'ls': '<=', 'hi': '>', 'hs': '>='}


def comparison(i: Ins, a: str, b: str, t: str) -> str:
    c = i.mods[0]
    if t not in FLOATS:
        return f"({a} {COMPARE[c]} {b})" if c not in ('lo', 'ls', 'hi', 'hs') or t[0] != 's' else f'(uns({a}) {COMPARE[c]} uns({b}))'
    ordered = f'({a} == {a} && {b} == {b})'
    if c in ('num', 'nan'):
        return ordered if c == 'num' else f'!{ordered}'
    return f'(!{ordered} || {a} {COMPARE[c[:-1]]} {b})' if c.endswith('u') else f'({ordered} && {a} {COMPARE[c]} {b})'


@op('setp')
def setp(i: Ins) -> str:
    dst, h = i.ops[0].split('|'), packed_type(i)
    third = f' {C_OP[i.one(*C_OP)]} (bool)({i.raw(3)})' if len(i.ops) == 4 else ''
    if h:
        cv = 'h2f' if h == 'f16' else 'b2f'
        e = [comparison(i, *(f'{cv}((u16)({i.raw(k)} >> {sh}))' for k in (1, 2)), h) + third for sh in (0, 16)]
    else:
        c = comparison(i, i.val(1), i.val(2), i.t)
        e = [c + third, '!' + c + third]
    e = ['(u32)(bool)(' + x + ')' for x in e]
    if len(dst) == 1:
        return f'{cname(dst[0])} = {e[0]};'
    return f'{{ u32 P_ = {e[0]}, Q_ = {e[1]}; ' + ' '.join(f'{cname(d)} = {v};' for d, v in zip(dst, 'PQ') if d != '_').replace('= P;', '= P_;').replace('= Q;', '= Q_;') + ' }'


@op('set')
def set_(i: Ins) -> str:
    dt, at = i.types[0], i.types[-1]
    third = f' {C_OP[i.one(*C_OP)]} (bool)({i.raw(3)})' if len(i.ops) == 4 else ''
    if at.endswith('x2'):
        cv, one = ('h2f', '0x3c00') if at == 'f16x2' else ('b2f', '0x3f80')
        one = one if dt == at else '0xffff'
        c = [comparison(i, *(f'{cv}((u16)({i.raw(k)} >> {sh}))' for k in (1, 2)), at[:-2]) + third for sh in (0, 16)]
        return i.bits_to(0, ' | '.join(f'((bool)({e}) ? {one}u : 0u) << {sh}' for e, sh in zip(c, (0, 16))))
    e = comparison(i, i.val(1, at), i.val(2, at), at) + third
    return i.bits_to(0, f'(bool)({e}) ? ' + {'f32': '0x3f800000u', 'f16': '0x3c00u', 'bf16': '0x3f80u', 'u16': '0xffffu', 's16': '0xffffu'}.get(dt, '0xffffffffu') + ' : 0u')


@op('selp')
def selp(i: Ins) -> str:
    return i.bits_to(0, f'{i.raw(3)} ? {i.raw(1)} : {i.raw(2)}')


@op('slct')
def slct(i: Ins) -> str:
    return i.bits_to(0, f'{i.val(3, i.types[-1])} >= 0 ? {i.raw(1)} : {i.raw(2)}')


# ---- conversion
@op('cvt')
def cvt(i: Ins) -> str:
    dt, at = i.types[0], i.types[-1]
    mode = ROUNDING[i.opt(*ROUNDING, default='rn')]
    if i.has('satfinite'):
        raise Unsupported(i.full)
    if dt in ('f16x2', 'bf16x2'):
        half = f'f2h' if dt == 'f16x2' else 'f2b'
        one = lambda k: f"{half}((double){'relu' if i.has('relu') else ''}({i.val(k, 'f32')}), {mode})"
        return i.bits_to(0, f'(u32){one(1)} << 16 | {one(2)}')
    if dt == 'tf32' and i.has('rna'):
        return i.bits_to(0, f'f2tf32({i.val(1, "f32")})')
    a, ftz = i.val(1, at), i.ftz
    if dt not in FLOATS:
        if at in FLOATS:
            i.one('rni', 'rzi', 'rmi', 'rpi')
            return i.bits_to(0, f"({ctype(dt)})f2i<{ctype(dt)}>({'(double)' if at == 'f64' else '(float)'}to_int({a}, {mode}))")
        return i.bits_to(0, f'clamp_to<{ctype(dt)}>({a})' if i.sat else f'({ctype(dt)})({a})')
    if i.has('rni', 'rzi', 'rmi', 'rpi'):
        e = f'to_int({a}, {mode})'
    elif dt in ('f32', 'f64'):
        e = f"fcvt<{'double' if dt == 'f64' else 'float'}, {mode}>({a})"
    else:
        if at not in FLOATS:
            a = f'fcvt<double, {mode}>({a})' if SIZE[at] < 8 else f'int_odd({a})'
        e = f'sat({a})' if i.sat else f'relu({a})' if i.has('relu') else a
        return i.bits_to(0, f"{'f2h' if dt == 'f16' else 'f2b'}((double)({e}), {mode})")
    i.ftz = ftz and dt == 'f32'
    return i.set(e, dt)


# ---- synchronisation and warps
def site(i: Ins) -> str:
    return f'site({i.line})'


@op('bar', 'barrier')
def bar(i: Ins) -> str:
    if i.has('warp'):
        return f'warp_sync(t, {i.raw(0)}, {i.line});'
    if i.has('cluster'):
        if i.has('arrive'):
            return f"sim::cluster_arrive(t, {int(not i.has('relaxed'))}, {site(i)});"
        return f'sim::cluster_wait(t, true, {site(i)});'
    aligned = int(i.name == 'bar' or i.has('aligned'))
    if i.has('red'):
        kind, ops = i.one('popc', 'and', 'or'), i.ops[1:]
        count = ops[1] if len(ops) == 3 else '0'
        r = f'sim::barrier(t, {i.raw(ops[0])}, {i.raw(count)}, true, {i.raw(ops[-1])}, {aligned}, {site(i)})'
        return i.bits_to(0, {'popc': f'{r} & 0xfffffff', 'and': f'{r} >> 30 & 1', 'or': f'{r} >> 31'}[kind])
    count = i.raw(1) if len(i.ops) > 1 else '0'
    return f"sim::barrier(t, {i.raw(0)}, {count}, {int(not i.has('arrive'))}, false, {aligned}, {site(i)});"


@op('shfl')
def shfl(i: Ins) -> str:
    dst, mode = i.ops[0].split('|'), i.one('up', 'down', 'bfly', 'idx')[0]
    r = f"shfl(t, '{mode}', {i.raw(1)}, {i.raw(2)}, {i.raw(3)}, {i.raw(4)}, &P_, {i.line})"
    return f"{{ u32 P_, V_ = {r}; {f'{cname(dst[0])} = V_;' if dst[0] != '_' else ''} {f'{cname(dst[1])} = P_;' if len(dst) > 1 and dst[1] != '_' else ''} }}"


@op('vote')
def vote(i: Ins) -> str:
    b, m = f'ballot(t, {i.raw(2)}, {i.raw(1)}, {i.line})', f'(u32)({i.raw(2)})'
    return i.bits_to(0, {'ballot': b, 'any': f'{b} != 0', 'all': f'{b} == {m}', 'uni': f'vote_uni({b}, {m})'}[i.one('ballot', 'any', 'all', 'uni')])


@op('match')
def match(i: Ins) -> str:
    dst, m = i.ops[0].split('|'), f'(u32)({i.raw(2)})'
    r = f'match_any(t, {m}, (u{i.bits})({i.raw(1)}), {i.line})'
    if i.has('any'):
        return i.bits_to(0, r)
    return f"{{ u32 V_ = {r} == {m} ? {m} : 0; {cname(dst[0])} = V_; {f'{cname(dst[1])} = V_ != 0;' if len(dst) > 1 else ''} }}"


@op('redux')
def redux(i: Ins) -> str:
    kind, t = i.one('add', 'min', 'max', 'and', 'or', 'xor'), ctype(i.t)
    if i.isf:
        return i.set(f"redux_float(t, {i.raw(2)}, {i.val(1)}, {int(i.one('min', 'max') == 'max')}, {int(i.has('abs'))}, {int(i.has('NaN'))}, {i.line})")
    return i.bits_to(0, f"redux<{t}>(t, {i.raw(2)}, {i.val(1)}, {i.line}, []({t} o, {t} a) -> {t} {{ return {ATOMS[kind].format(o='o', a='a')}; }})")


@op('ldmatrix', 'stmatrix')
def matrix(i: Ins) -> str:
    i.one('m8n8'), i.one('b16')
    store = i.name == 'stmatrix'
    regs, n = group(i.ops[int(store)]), int(i.one('x1', 'x2', 'x4')[1])
    init = ', '.join(f'(u32)({i.raw(r)})' for r in regs) if store else ''
    out = '' if store else ' '.join(f'{cname(r)} = R_[{k}];' for k, r in enumerate(regs))
    return f"{{ u32 R_[{n}] = {{{init}}}; matrix(t, {int(store)}, {n}, {int(i.has('trans'))}, {i.addr(int(not store))}, R_, {i.line}); {out} }}"


@op('elect')
def elect(i: Ins) -> str:
    d, p = i.ops[0].split('|')
    return f"{{ u32 M_ = {i.raw(1)}; warp_values(t, M_, 0, {i.line}); {f'{cname(d)} = __builtin_ctz(M_);' if d != '_' else ''} {cname(p)} = (t.lin & 31) == __builtin_ctz(M_); }}"


@op('activemask')
def activemask(i: Ins) -> str:
    return i.bits_to(0, f'sim::active_mask(t, {site(i)})')


# ---- control flow
@op('bra')
def bra(i: Ins) -> str:
    return f'goto {cname(i.ops[0])};'


@op('brx')
def brx(i: Ins) -> str:
    return f'switch ((u32)({i.raw(0)})) {{ ' + ' '.join(f'case {k}: goto {cname(l)};' for k, l in enumerate(i.targets[i.ops[1]])) + f' default: bad(t, "brx.idx out of range", {i.line}); }}'


@op('ret')
def ret(i: Ins) -> str:
    return 'return;'


@op('exit')
def exit_(i: Ins) -> str:
    return 'throw Exit();'


@op('call')
def call(i: Ins) -> str:
    returns = split_operands(i.ops[0][1:-1]) if i.ops[0].startswith('(') else []
    name, *rest = i.ops[1:] if i.ops[0].startswith('(') else i.ops
    if name == '__assertfail':
        return f'bad(t, "device assertion failed", {i.line});'
    args = split_operands(rest[0][1:-1]) if rest else []
    if name not in i.names.functions:
        raise Unsupported(f'call {name}')
    return f"F_{cname(name)}(t, {{{', '.join(i.names.params[a] for a in returns + args)}}});"


@op('fence', 'membar')
def fence(i: Ins) -> str:
    return ';' if i.has('proxy', 'mbarrier_init') else f"fence(t, {int(i.has('cta'))});"


@op('prefetch', 'prefetchu', 'griddepcontrol', 'nanosleep', 'pragma', 'discard', 'applypriority', 'setmaxnreg', 'brkpt', 'pmevent')
def nothing(i: Ins) -> str:
    return ';'


@op('createpolicy')
def createpolicy(i: Ins) -> str:
    return i.bits_to(0, '0ull')


@op('trap')
def trap(i: Ins) -> str:
    return f'bad(t, "trap", {i.line});'


# ---- asynchronous copies
@op('cp')
def cp_async(i: Ins) -> str:
    if not i.has('async') or i.has('tensor', 'reduce', 'prefetch') or 'multicast' in i.full:
        raise Unsupported(i.full)
    if i.has('commit_group'):
        return ';' if i.has('bulk') else 't.group++;'
    if i.has('wait_group', 'wait_all'):
        return ';' if i.has('bulk') else f"cp_finish(t, {i.raw(0) if i.has('wait_group') else -1});"
    if i.has('arrive'):
        return f"mbar_arrive_after_copies(t, {i.addr(0)}, {int(i.has('noinc'))}, {i.line});"
    if i.has('bulk'):
        if 'mbarrier::complete_tx::bytes' in i.mods and i.mods.index('shared') < i.mods.index('global'):
            return f'bulk_load(t, {i.addr(0)}, {i.addr(1)}, {i.raw(2)}, {i.addr(3)}, {i.line});'
        if i.has('bulk_group') and i.mods.index('global') < i.mods.index('shared'):
            return f'bulk_store(t, {i.addr(0)}, {i.addr(1)}, {i.raw(2)}, {i.line});'
        raise Unsupported(i.full)
    n = i.raw(2)
    policy = 'L2::cache_hint' in i.mods
    have_size = len(i.ops) - policy > 3
    size = i.raw(3) if have_size and not i.ops[3].startswith('%p') else n
    size = f'{i.raw(3)} ? 0 : {n}' if have_size and i.ops[3].startswith('%p') else size
    return f'cp_async(t, {i.addr(0)}, {i.addr(1)}, {n}, {size}, {i.line});'


@op('mbarrier')
def mbarrier(i: Ins) -> str:
    a = next(k for k, o in enumerate(i.ops) if o.startswith('['))
    s, where = i.space(), i.addr(a)
    arg = lambda k, default: i.raw(a + k) if len(i.ops) > a + k else default
    if i.has('init'):
        return f'mbar_init(t, {s}, {where}, {arg(1, None)}, {i.line});'
    if i.has('inval'):
        return ';'
    if i.has('test_wait', 'try_wait'):
        return i.bits_to(0, f"mbar_wait(t, {s}, {where}, {arg(1, None)}, {int(i.has('parity'))}, {i.line})")
    if i.has('noComplete') or not i.has('arrive', 'arrive_drop', 'expect_tx'):
        raise Unsupported(i.full)
    if not i.has('arrive', 'arrive_drop'):
        return f'mbar_expect(t, {s}, {where}, {arg(1, None)}, {i.line});'
    n, tx = ('1', arg(1, None)) if i.has('expect_tx') else (arg(1, '1'), '0')
    e = f"mbar_arrive(t, {s}, {where}, {n}, {tx}, {int(i.has('arrive_drop'))}, {i.line})"
    return i.bits_to(0, e) if a else e + ';'
