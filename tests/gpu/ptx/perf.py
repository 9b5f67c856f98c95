"""Static + emulated performance card of a kernel, no GPU: floor check and a roofline ESTIMATE (pipe rates never validated on hardware: label it so)."""

import os
import re
import shutil
import subprocess
import tempfile

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "include")
from . import sass

H100 = {"bw": 3.35e12, "eff": 0.90, "sms": 132, "clk": 1.755e9, "cc": (9, 0)}
A100 = {"bw": 1.555e12, "eff": 0.88, "sms": 108, "clk": 1.41e9, "cc": (8, 0)}


def rate(op):  # thread-instructions / clk / SM (CUDA programming guide, throughput table, cc 9.0)
    if op.startswith("MUFU"):
        return 16
    if re.match(r"I2F|F2I|F2F|I2I", op):
        return 16 if "F64" not in op else 16
    if re.match(r"IMAD\.(HI|WIDE)", op):
        return 32
    if re.match(r"(IMAD|LOP3|SHF|IADD3|ISETP|LEA|SEL|PRMT|VIADD|IABS|IMNMX|FSETP|FMNMX|FSEL|F2FP|MOV)", op):
        return 64
    if re.match(r"(LD|ST)S", op):
        return 32
    if re.match(r"SHFL", op):
        return 32
    if re.match(r"D(FMA|MUL|ADD)", op):
        return 64
    return 128


def issue_time(ins, elems_per_pass, dev, body=None):
    """lower bound from one pass of the main loop: issue slots (4 warps/clk) and per-pipe throughput"""
    sel = [i for i in ins if i[2] != "NOP" and (body is None or body[0] <= i[0] <= body[1])]
    pipes = {}
    for i in sel:
        r = rate(i[2])
        pipes[r] = pipes.get(r, 0) + 1
    clk = max(len(sel) / 128, *(n / r for r, n in pipes.items() if r != 128))
    return clk / elems_per_pass / (dev["sms"] * dev["clk"]), len(sel) / elems_per_pass


def main_loop(ins):
    best = None
    for i in ins:
        if i[2].startswith("BRA") and (m := re.search(r"0x([0-9a-f]+)", i[3])) and int(m[1], 16) < i[0]:
            b = (int(m[1], 16), i[0])
            body = [j for j in ins if b[0] <= j[0] <= b[1]]
            if any(j[2].startswith("STG") for j in body) and (best is None or len(body) < best[2]):
                best = (*b, len(body))
    return best


def occ_program(cuda=None):
    cuda = (
        cuda or os.environ.get("CUDA_HOME") or os.path.dirname(os.path.dirname(os.path.realpath(shutil.which("nvcc"))))
    )
    p = os.path.join(tempfile.gettempdir(), "ptxsim-occ")
    if not os.path.exists(p):
        subprocess.run(["g++", "-O1", "-I" + cuda + "/include", HERE + "/occ.cpp", "-o", p], check=True)
    return p


def occ(res, dyn, thr, dev):
    return subprocess.run(
        [
            occ_program(),
            *map(str, dev["cc"]),
            str(res["reg"]),
            str(max(0, res["shared"] - (1024 if dev["cc"][0] >= 9 else 0))),
            str(dyn),
            str(thr),
        ],
        capture_output=True,
        text=True,
    ).stdout.split()


def card(name, cubin, match, floor_B, ld_B, st_B, elems_per_pass, thr, dyn=0, dev=H100, straight=False):
    r = next(v for k, v in sass.res(cubin).items() if re.search(match, k))
    ins = next(v for k, v in sass.sass(cubin).items() if re.search(match, k))
    s = sass.summary(ins)
    lp = None if straight else main_loop(ins)
    t_is, ipe = issue_time(ins, elems_per_pass, dev, lp)
    t_mem = (ld_B + st_B) / (dev["bw"] * dev["eff"])
    o = occ(r, dyn, thr, dev)
    wide = {k: v for k, v in s["mem"].items() if k.startswith(("LDG", "STG"))}
    w128 = sum(v for k, v in wide.items() if ".128" in k)
    print(
        f"{name}: {ld_B + st_B:.2f} B/elem (floor {floor_B}), regs {r['reg']} spills {s['spill']} 128-bit {w128}/{sum(wide.values())} {s['mem']}, occupancy {o[3]}, {ipe:.1f} SASS/elem; t_mem {t_mem * 1e12:.2f} ps/elem, t_issue {t_is * 1e12:.2f} ps/elem -> {'memory' if t_mem > t_is else 'ISSUE'}-bound, {1e-12 / max(t_mem, t_is):.2f} Telem/s"
    )
