"""Translators of memory accesses, atomics, warp operations, barriers, control flow and asynchronous copies."""

from __future__ import annotations

from .instruction import SPACES, Ins, Unsupported, assign, cname, ctype, from_bits, group, op
from .parse import SIZE, split_operands


# ---- data movement
@op("mov")
def mov(i: Ins) -> str:
    dst, src = group(i.ops[0]), group(i.ops[1])
    if len(dst) > 1:
        b = i.bits // len(dst)
        parts = [assign(x, f"(u{b})(T_ >> {b * k})") for k, x in enumerate(dst)]
        return f"{{ u64 T_ = {i.raw(1)}; {' '.join(parts)} }}"
    if len(src) > 1:
        b = i.bits // len(src)
        return i.bits_to(0, " | ".join(f"(u64)(u{b})({i.raw(x)}) << {b * k}" for k, x in enumerate(src)))
    return i.bits_to(0, i.raw(1))


@op("ld", "ldu")
def load(i: Ins) -> str:
    regs, space = group(i.ops[0]), i.space()
    size = SIZE[i.t] * len(regs)
    if space == "PARAM":
        get = f"memcpy(V_, (void*)({i.addr(1)}), {size});"
    else:
        get = f"ld(t, {space}, {i.addr(1)}, V_, {size}, {i.line}, {i.strength()});"
    values = " ".join(assign(r, f"V_[{k}]") for k, r in enumerate(regs))
    return f"{{ {ctype(i.t)} V_[{len(regs)}]; {get} {values} }}"


@op("st")
def store(i: Ins) -> str:
    regs, c, space = group(i.ops[1]), ctype(i.t), i.space()
    size = SIZE[i.t] * len(regs)
    if space == "PARAM":
        put = f"memcpy((void*)({i.addr(0)}), V_, {size});"
    else:
        put = f"st(t, {space}, {i.addr(0)}, V_, {size}, {i.line}, {i.strength()});"
    values = ", ".join(f"({c})({i.raw(r)})" for r in regs)
    return f"{{ {c} V_[{len(regs)}] = {{{values}}}; {put} }}"


@op("cvta")
def cvta(i: Ins) -> str:
    if not i.has("shared"):
        return i.bits_to(0, i.raw(1))
    return i.bits_to(0, f"to_shared(t, {i.raw(1)})" if i.has("to") else f"to_generic(t, {i.raw(1)}, {i.line})")


@op("isspacep")
def isspacep(i: Ins) -> str:
    space = i.one(*SPACES)
    if space in ("const", "param"):
        return i.bits_to(0, "0")
    own = int("shared::cluster" not in i.scopes)
    return i.bits_to(0, f"is_space(t, {i.raw(1)}, {space.upper()}, {own})")


@op("mapa")
def mapa(i: Ins) -> str:
    fn = "mapa_shared" if i.has("shared") else "mapa_generic"
    return i.bits_to(0, f"{fn}(t, {i.raw(1)}, (u32)({i.raw(2)}), {i.line})")


@op("getctarank")
def getctarank(i: Ins) -> str:
    p = f"shared_place(t, {i.raw(1)}, {i.line})" if i.has("shared") else f"find_shared(t, {i.raw(1)})"
    return i.bits_to(0, f"ctarank(t, {p}, {i.line})")


ATOMS = {
    "add": "{o} + {a}",
    "min": "std::min({o}, {a})",
    "max": "std::max({o}, {a})",
    "and": "{o} & {a}",
    "or": "{o} | {a}",
    "xor": "{o} ^ {a}",
    "exch": "{a}",
    "cas": "{o} == {a} ? {b} : {o}",
    "inc": "{o} >= {a} ? 0 : {o} + 1",
    "dec": "{o} == 0 || {o} > {a} ? {a} : {o} - 1",
}


@op("atom", "red")
def atom(i: Ins) -> str:
    kind, ops = i.one(*ATOMS), (["_"] if i.name == "red" else []) + i.ops
    dst, c = group(ops[0]), f"u{i.bits}"
    # As the hardware does it: f32 adds flush subnormals in global memory, in shared memory they do not.
    i.ftz = i.t == "f32" and i.has("global") and kind == "add"
    out = []
    for k, a in enumerate(group(ops[2])):
        e = _updated_lanes(i, kind, a) if i.packed else _updated(i, kind, a, ops[3] if kind == "cas" else "")
        where = f"{i.space()}, {i.addr(ops[1])} + {k * SIZE[i.t]}, {i.line}, {i.strength()}"
        old = f"atomic<{c}>(t, {where}, [&]({c} o) -> {c} {{ return {e}; }})"
        out.append(assign(dst[k] if len(dst) > 1 else dst[0], old) or f"{old};")
    return "{ " + " ".join(out) + " }"


def _updated(i: Ins, kind: str, a: str, b: str) -> str:
    """The new bits of a memory cell that holds the bits `o`."""
    old = from_bits(i.t, "o")
    return i.pack(ATOMS[kind].format(o=f"fz({old})" if i.ftz else old, a=i.val(a), b=i.val(b) if b else ""))


def _updated_lanes(i: Ins, kind: str, a: str) -> str:
    """As `_updated`, of two packed halves."""
    rule = ATOMS[kind].replace("std::min", "fmn").replace("std::max", "fmx")
    lanes = []
    for shift in (0, 16):
        old, new = (from_bits(i.packed, f"(u16)({bits} >> {shift})") for bits in ("o", i.raw(a)))
        lanes.append(f"(u32)({i.pack(rule.format(o=old, a=new), i.packed)}) << {shift}")
    return " | ".join(lanes)


# ---- synchronisation and warps
def site(i: Ins) -> str:
    return f"site({i.line})"


@op("bar", "barrier")
def bar(i: Ins) -> str:
    if i.has("warp"):
        return f"warp_sync(t, {i.raw(0)}, {i.line});"
    if i.has("cluster"):
        if i.has("arrive"):
            return f"sim::cluster_arrive(t, {int(not i.has('relaxed'))}, {site(i)});"
        return f"sim::cluster_wait(t, true, {site(i)});"
    aligned = int(i.name == "bar" or i.has("aligned"))
    if i.has("red"):
        kind, ops = i.one("popc", "and", "or"), i.ops[1:]
        count = ops[1] if len(ops) == 3 else "0"
        r = f"sim::barrier(t, {i.raw(ops[0])}, {i.raw(count)}, true, {i.raw(ops[-1])}, {aligned}, {site(i)})"
        return i.bits_to(0, {"popc": f"{r} & 0xfffffff", "and": f"{r} >> 30 & 1", "or": f"{r} >> 31"}[kind])
    count = i.raw(1) if len(i.ops) > 1 else "0"
    return f"sim::barrier(t, {i.raw(0)}, {count}, {int(not i.has('arrive'))}, false, {aligned}, {site(i)});"


@op("shfl")
def shfl(i: Ins) -> str:
    dst, *predicate = i.ops[0].split("|")
    mode = i.one("up", "down", "bfly", "idx")[0]
    value = f"shfl(t, '{mode}', {i.raw(1)}, {i.raw(2)}, {i.raw(3)}, {i.raw(4)}, &P_, {i.line})"
    return f"{{ u32 P_, V_ = {value}; {assign(dst, 'V_')} {' '.join(assign(p, 'P_') for p in predicate)} }}"


@op("vote")
def vote(i: Ins) -> str:
    mask = f"(u32)({i.raw(2)})"
    votes = f"ballot(t, {i.raw(2)}, {i.raw(1)}, {i.line})"
    result = {
        "ballot": votes,
        "any": f"{votes} != 0",
        "all": f"{votes} == {mask}",
        "uni": f"vote_uni({votes}, {mask})",
    }
    return i.bits_to(0, result[i.one(*result)])


@op("match")
def match(i: Ins) -> str:
    dst, *predicate = i.ops[0].split("|")
    mask = f"(u32)({i.raw(2)})"
    same = f"match_any(t, {mask}, (u{i.bits})({i.raw(1)}), {i.line})"
    if i.has("any"):
        return i.bits_to(0, same)
    agreed = " ".join(assign(p, "V_ != 0") for p in predicate)
    return f"{{ u32 V_ = {same} == {mask} ? {mask} : 0; {assign(dst, 'V_')} {agreed} }}"


@op("redux")
def redux(i: Ins) -> str:
    kind, t = i.one("add", "min", "max", "and", "or", "xor"), ctype(i.t)
    if i.isf:
        flags = f"{int(i.one('min', 'max') == 'max')}, {int(i.has('abs'))}, {int(i.has('NaN'))}"
        return i.set(f"redux_float(t, {i.raw(2)}, {i.val(1)}, {flags}, {i.line})")
    rule = f"[]({t} o, {t} a) -> {t} {{ return {ATOMS[kind].format(o='o', a='a')}; }}"
    return i.bits_to(0, f"redux<{t}>(t, {i.raw(2)}, {i.val(1)}, {i.line}, {rule})")


@op("ldmatrix", "stmatrix")
def matrix(i: Ins) -> str:
    i.one("m8n8"), i.one("b16")
    store = i.name == "stmatrix"
    regs, n = group(i.ops[int(store)]), int(i.one("x1", "x2", "x4")[1])
    values = ", ".join(f"(u32)({i.raw(r)})" for r in regs) if store else ""
    out = "" if store else " ".join(assign(r, f"R_[{k}]") for k, r in enumerate(regs))
    move = f"matrix(t, {int(store)}, {n}, {int(i.has('trans'))}, {i.addr(int(not store))}, R_, {i.line});"
    return f"{{ u32 R_[{n}] = {{{values}}}; {move} {out} }}"


@op("elect")
def elect(i: Ins) -> str:
    leader, predicate = i.ops[0].split("|")
    meet = f"u32 M_ = {i.raw(1)}; warp_values(t, M_, 0, {i.line});"
    chosen = assign(leader, "__builtin_ctz(M_)") + assign(predicate, "(t.lin & 31) == __builtin_ctz(M_)")
    return f"{{ {meet} {chosen} }}"


@op("activemask")
def activemask(i: Ins) -> str:
    return i.bits_to(0, f"sim::active_mask(t, {site(i)})")


# ---- control flow
@op("bra")
def bra(i: Ins) -> str:
    return f"goto {cname(i.ops[0])};"


@op("brx")
def brx(i: Ins) -> str:
    cases = " ".join(f"case {k}: goto {cname(label)};" for k, label in enumerate(i.targets[i.ops[1]]))
    return f'switch ((u32)({i.raw(0)})) {{ {cases} default: bad(t, "brx.idx out of range", {i.line}); }}'


@op("ret")
def ret(i: Ins) -> str:
    return "return;"


@op("exit")
def exit_(i: Ins) -> str:
    return "throw Exit();"


@op("call")
def call(i: Ins) -> str:
    returns = split_operands(i.ops[0][1:-1]) if i.ops[0].startswith("(") else []
    name, *rest = i.ops[1:] if i.ops[0].startswith("(") else i.ops
    if name == "__assertfail":
        return f'bad(t, "device assertion failed", {i.line});'
    args = split_operands(rest[0][1:-1]) if rest else []
    if name not in i.names.functions:
        raise Unsupported(f"call {name}")
    return f"F_{cname(name)}(t, {{{', '.join(i.names.params[a] for a in returns + args)}}});"


@op("fence", "membar")
def fence(i: Ins) -> str:
    return ";" if i.has("proxy", "mbarrier_init") else f"fence(t, {int(i.has('cta'))});"


@op(
    "prefetch",
    "prefetchu",
    "griddepcontrol",
    "nanosleep",
    "pragma",
    "discard",
    "applypriority",
    "setmaxnreg",
    "brkpt",
    "pmevent",
)
def nothing(i: Ins) -> str:
    return ";"


@op("createpolicy")
def createpolicy(i: Ins) -> str:
    return i.bits_to(0, "0ull")


@op("trap")
def trap(i: Ins) -> str:
    return f'bad(t, "trap", {i.line});'


# ---- asynchronous copies
@op("cp")
def cp_async(i: Ins) -> str:
    if not i.has("async") or i.has("tensor", "reduce", "prefetch") or "multicast" in i.full:
        raise Unsupported(i.full)
    if i.has("commit_group"):
        return ";" if i.has("bulk") else "t.group++;"
    if i.has("wait_group", "wait_all"):
        return ";" if i.has("bulk") else f"cp_finish(t, {i.raw(0) if i.has('wait_group') else -1});"
    if i.has("arrive"):
        return f"mbar_arrive_after_copies(t, {i.addr(0)}, {int(i.has('noinc'))}, {i.line});"
    if i.has("bulk"):
        return _bulk_copy(i)
    n, policy = i.raw(2), "L2::cache_hint" in i.mods
    size = n
    if len(i.ops) - policy > 3:  # the bytes to read, or a predicate to read none
        size = f"{i.raw(3)} ? 0 : {n}" if i.ops[3].startswith("%p") else i.raw(3)
    return f"cp_async(t, {i.addr(0)}, {i.addr(1)}, {n}, {size}, {i.line});"


def _bulk_copy(i: Ins) -> str:
    into_shared = i.mods.index("shared") < i.mods.index("global")
    if into_shared and "mbarrier::complete_tx::bytes" in i.mods:
        return f"bulk_load(t, {i.addr(0)}, {i.addr(1)}, {i.raw(2)}, {i.addr(3)}, {i.line});"
    if not into_shared and i.has("bulk_group"):
        return f"bulk_store(t, {i.addr(0)}, {i.addr(1)}, {i.raw(2)}, {i.line});"
    raise Unsupported(i.full)


@op("mbarrier")
def mbarrier(i: Ins) -> str:
    a = next(k for k, o in enumerate(i.ops) if o.startswith("["))
    place = f"t, {i.space()}, {i.addr(a)}"
    further = [i.raw(o) for o in i.ops[a + 1 :]]
    if i.has("init"):
        return f"mbar_init({place}, {further[0]}, {i.line});"
    if i.has("inval"):
        return ";"
    if i.has("test_wait", "try_wait"):
        return i.bits_to(0, f"mbar_wait({place}, {further[0]}, {int(i.has('parity'))}, {i.line})")
    if i.has("noComplete") or not i.has("arrive", "arrive_drop", "expect_tx"):
        raise Unsupported(i.full)
    if not i.has("arrive", "arrive_drop"):
        return f"mbar_expect({place}, {further[0]}, {i.line});"
    n, tx = ("1", further[0]) if i.has("expect_tx") else (further[0] if further else "1", "0")
    e = f"mbar_arrive({place}, {n}, {tx}, {int(i.has('arrive_drop'))}, {i.line})"
    return i.bits_to(0, e) if a else f"{e};"
