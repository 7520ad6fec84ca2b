"""What the compiler makes of the Triton kernels of rope_attention, for GPUs that need not be present.

    python -m benchmarks.compile_report                         # forward, bfloat16, head dims 64, 72, 128, on sm_80 and sm_90
    python -m benchmarks.compile_report --backward --arch sm_80 sm_90 sm_100 sm_120 gfx942 --dtype bfloat16 float32
    python -m benchmarks.compile_report --full rows.jsonl       # the whole matrix, hours of one core; goes on where it stopped

Per kernel: registers, spills, shared memory, resident blocks per multiprocessor, and the hottest loop of the machine code
(the innermost loop with most matrix instructions): what it consists of and what limits it. The cycles of a loop are a floor,
not a prediction: issue slots, matrix units and exponentials of one quarter of a multiprocessor, with latencies and memory
perfectly hidden.

Launches are recorded as the backend makes them for a packed batch, so what is compiled here is what would run.
Kernels are compiled by the triton package, machine code is read with the tools inside it. Another version of Triton: its folder
(pip install --target FOLDER --no-deps triton==3.6.0) on PYTHONPATH; `benchmarks.triton_versions` does that for all of them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from comp_kernels import rope_attention
from comp_kernels._triton_compile import Launch, compile_launch, record
from comp_kernels.ops.rope_attention.triton_configs import INLINE_HEAD_DIM
from comp_kernels.testing import LAYOUTS, AttentionCase, make_attention_inputs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor; CUDA C++ Programming Guide, compute capabilities; CDNA 3 ISA guide."""

    shared_per_block: int  # bytes
    shared_per_sm: int
    threads_per_sm: int
    matrix_flops: int  # dense 16-bit FLOPs per cycle and multiprocessor
    exponentials: int = 16  # per cycle and multiprocessor


KIB = 1024
CHIPS = {
    "sm_80": Chip(163 * KIB, 164 * KIB, 2048, 2048),
    "sm_86": Chip(99 * KIB, 100 * KIB, 1536, 1024),
    "sm_90": Chip(227 * KIB, 228 * KIB, 2048, 4096),
    "sm_100": Chip(227 * KIB, 228 * KIB, 2048, 8192),
    "sm_120": Chip(99 * KIB, 100 * KIB, 1536, 1024),
    "gfx942": Chip(64 * KIB, 64 * KIB, 2048, 2048),
}

# --- what is launched ------------------------------------------------------------------------------------------------------


def attention_call(dtype: torch.dtype, case: AttentionCase, *, backward: bool = False) -> Callable[[], object]:
    """A call of rope_attention on the inputs of `case`."""
    inputs = make_attention_inputs(case, dtype)
    leaves = [x.requires_grad_(backward) for x in (inputs.q, inputs.k, inputs.v)]  # the tables are fixed, as in most models

    def call():
        out = rope_attention(*leaves, inputs.cos, inputs.sin, inputs.cu_seqlens, backend="triton", **inputs.kwargs)
        if backward:
            torch.autograd.grad(out, leaves, inputs.grad_out)

    return call


# --- what the machine code says --------------------------------------------------------------------------------------------

GROUPS = {  # of SASS opcodes, in this order
    "matrix": r"HMMA|HGMMA|UTC\w*MMA|[IQD]G?MMA",
    "float": r"FFMA|FADD|FMUL|FMNMX|FSETP|FSEL|FSET|HFMA2|HADD2|HMUL2",
    "exponential": r"MUFU",
    "conversion": r"F2F|F2I|I2F|F2FP|I2FP|FRND",
    "shared": r"LDS|STS|LDSM|STSM|MOVM|ATOMS|LDT|LDTM|STTM",
    "copy": r"LDGSTS|UBLKCP|UTMA\w*|LDGDEPBAR",
    "global": r"LDG|STG|LD|ST|ATOMG|RED",
    "spill": r"LDL|STL",
    "shuffle": r"SHFL|VOTE|REDUX|MATCH",
    "barrier": r"BAR|DEPBAR|SYNCS|WARPSYNC|MEMBAR|FENCE|WARPGROUP|ERRBAR",
    "control": r"BRA|EXIT|BSSY|BSYNC|CALL|RET|NOP|JMP|BRX|BREAK",
    "move": r"MOV|SEL|PRMT|S2R|CS2R|S2UR|R2UR|PLOP3|P2R|R2P|LDC|LDCU|ULDC",
    "integer": r".*",
}


@dataclass
class Code:
    """Facts about one compiled kernel."""

    name: str
    arch: str
    num_warps: int
    registers: int
    spills: int  # instructions that store to or load from local memory; on AMD spilled registers
    shared: int  # bytes
    matrix: int  # matrix instructions in the kernel
    loop: Counter = field(default_factory=Counter)  # hottest loop: group -> instructions
    matrix_cycles: float = 0.0  # of the matrix unit, per iteration of that loop and warp

    def blocks_per_sm(self) -> int:
        chip, threads = CHIPS[self.arch], self.num_warps * (64 if self.arch.startswith("gfx") else 32)
        by_registers = 65536 // (max(-(-self.registers // 8) * 8, 24) * threads)
        by_shared = chip.shared_per_sm // (self.shared + KIB)
        return min(by_registers, by_shared, chip.threads_per_sm // threads)

    def loop_floors(self) -> dict[str, float]:
        """Cycles per iteration of the hottest loop and warp that each resource of a multiprocessor's quarter needs."""
        return {
            "matrix": self.matrix_cycles,
            "issue": float(self.loop.total()),
            "exponential": self.loop["exponential"] * 32 / (CHIPS[self.arch].exponentials / 4),
        }


def group(opcode: str) -> str:
    return next(name for name, pattern in GROUPS.items() if re.fullmatch(pattern, opcode.split(".")[0]))


def triton_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, opcode, operands) of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([triton_tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
    return [(int(address, 16), opcode, operands) for address, opcode, operands in line.findall(text)]


def resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([triton_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}


def hottest_loop(instructions: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The innermost loop with most matrix instructions, or else the longest; empty when there is none."""
    position = {address: index for index, (address, _, _) in enumerate(instructions)}
    loops = []
    for index, (_, opcode, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        start = position.get(int(target[1], 16)) if target else None
        if start is not None and start < index:
            loops.append((start, index))
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [instructions[start : end + 1] for start, end in innermost]
    return max(bodies, key=lambda body: (sum(group(op) == "matrix" for _, op, _ in body), len(body)), default=[])


def matrix_flops(opcode: str) -> int:
    """FLOPs of one matrix instruction as one warp issues it (a warpgroup instruction: a quarter of it)."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)  # HGMMA.64x64x16
    if shape:
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
    packed = re.search(r"\.(16)(8)(\d+)", opcode)  # HMMA.16816
    return 2 * 16 * 8 * int(packed[3]) if packed else 0


def matrix_cycles(opcode: str, chip: Chip) -> float:
    """Of the matrix unit of a quarter of a multiprocessor, for one instruction; TF32 at half the rate of 16 bits."""
    return matrix_flops(opcode) / (chip.matrix_flops / 4) * (2 if ".TF32" in opcode else 1)


def read_nvidia(compiled, launch: Launch, arch: str) -> Code:
    cubin = compiled.asm["cubin"]
    instructions = disassemble(cubin)
    loop = hottest_loop(instructions)
    return Code(
        name=launch.name,
        arch=arch,
        num_warps=launch.num_warps,
        registers=resource_usage(cubin)["REG"],
        spills=sum(group(opcode) == "spill" for _, opcode, _ in instructions),
        shared=compiled.metadata.shared,
        matrix=sum(group(opcode) == "matrix" for _, opcode, _ in instructions),
        loop=Counter(group(opcode) for _, opcode, _ in loop),
        matrix_cycles=sum(matrix_cycles(opcode, CHIPS[arch]) for _, opcode, _ in loop if group(opcode) == "matrix"),
    )


def read_amd(compiled, launch: Launch, arch: str) -> Code:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return Code(
        name=launch.name,
        arch=arch,
        num_warps=launch.num_warps,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        shared=compiled.metadata.shared,
        matrix=len(re.findall(r"\bv_s?mfma_", assembly)),
    )


def read_code(launch: Launch, arch: str) -> Code:
    compiled = compile_launch(launch, arch)
    return (read_nvidia if arch.startswith("sm_") else read_amd)(compiled, launch, arch)


# --- the report --------------------------------------------------------------------------------------------------------------

LONG, WINDOWS = (1024, 361), (64,) * 16  # tokens per sequence; in windows keys are rotated in the loop
LAYOUT = "half_hwhw_halfwidth"
HEAD_DIMS = (72, 64, 128, 80, 96, 256)
COLUMNS = (
    "| kernel | arch | dtype | D | layout | warps | registers | spills | shared KiB | blocks/SM "
    "| loop | matrix | other | mix of the others | floor (cycles) |"
)


@dataclass(frozen=True)
class Entry:
    """One call whose kernels are compiled."""

    arch: str
    dtype: str
    head_dim: int
    layout: str | None = LAYOUT
    lengths: tuple[int, ...] = LONG
    backward: bool = False

    def launches(self) -> list[Launch]:
        """One launch per kernel, of those that belong to this entry alone."""
        case = AttentionCase("report", list(self.lengths), heads=2, head_dim=self.head_dim, layout=self.layout)
        recorded = record(attention_call(DTYPES[self.dtype], case, backward=self.backward), self.arch)
        kernels = {launch.name: launch for launch in recorded}
        if self.backward:
            for name in ("attention_forward_kernel", "rotate_kernel"):  # in the entry of the forward pass
                kernels.pop(name, None)
        return list(kernels.values())


def matrix() -> Iterator[Entry]:
    """Architecture x dtype x head dim, forward, windows and backward; every layout at D = 72. What matters most comes first."""
    for dtype in ("bfloat16", "float32", "float16"):
        for archs in (ARCHITECTURES[:2], ARCHITECTURES[2:]):
            for backward in (False, True):
                yield from (Entry(a, dtype, d, backward=backward) for d in HEAD_DIMS for a in archs)
            if dtype == "bfloat16":
                yield from (Entry(a, dtype, d, lengths=WINDOWS) for a in archs for d in HEAD_DIMS if d <= INLINE_HEAD_DIM)
                others = [layout for layout in (*LAYOUTS, None) if layout != LAYOUT]
                yield from (Entry(a, dtype, 72, layout) for a in archs for layout in others)
    yield from (
        Entry(a, "bfloat16", 72, layout, backward=True) for a in ARCHITECTURES for layout in LAYOUTS if layout != LAYOUT
    )


def row(entry: Entry, code: Code) -> str:
    floors = code.loop_floors()
    limit = max(floors, key=floors.__getitem__)
    if code.loop["matrix"]:
        others = [(name, count) for name, count in code.loop.most_common() if name != "matrix"]
        loop = f"{code.loop.total()} | {code.loop['matrix']} | {code.loop.total() - code.loop['matrix']}"
        loop += " | " + ", ".join(f"{name} {count}" for name, count in others)
        floor = ", ".join(f"{name} {cycles:.0f}" for name, cycles in floors.items()) + f": {limit}-bound"
    else:
        loop, floor = f"- | {code.matrix or '-'} | - | -", "-"
    name = code.name.removesuffix("_kernel") + (" (windows)" if entry.lengths == WINDOWS else "")
    return (
        f"| {name} | {code.arch} | {entry.dtype} | {entry.head_dim} | {entry.layout or 'no rope'} | {code.num_warps} "
        f"| {code.registers} | {code.spills} | {code.shared / KIB:.0f} | {code.blocks_per_sm()} | {loop} | {floor} |"
    )


def heading() -> str:
    return COLUMNS + "\n" + "|---" * (COLUMNS.count("|") - 1) + "|"


def compile_matrix(entries: list[Entry], file: Path) -> None:
    """Compile what `file` does not have yet; one JSON object per kernel is appended as soon as it is known."""
    done = {entry for entry, _ in rows_of(file)}
    for entry in entries:
        if entry in done:
            continue
        codes = [read_code(launch, entry.arch) for launch in entry.launches()]
        rows = [json.dumps({"entry": vars(entry), "code": vars(code)}) for code in codes]
        with file.open("a") as stream:
            stream.write("".join(text + "\n" for text in rows))
        print(f"{entry}: {len(rows)} kernels", flush=True)


def rows_of(file: Path) -> Iterator[tuple[Entry, Code]]:
    for line in file.read_text().splitlines() if file.exists() else []:
        value = json.loads(line)
        entry = Entry(**{**value["entry"], "lengths": tuple(value["entry"]["lengths"])})
        yield entry, Code(**{**value["code"], "loop": Counter(value["code"]["loop"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"], choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 72, 128])
    parser.add_argument("--layout", default=LAYOUT, help="of comp_kernels.testing.LAYOUTS, or 'none'")
    parser.add_argument("--windows", action="store_true", help="sequences of 64 tokens: keys rotated in the loop")
    parser.add_argument("--backward", action="store_true", help="the backward kernels too")
    parser.add_argument(
        "--full", type=Path, metavar="FILE", help="the whole matrix instead, kept in FILE, which may be half done"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="compile nothing, print what FILE has")
    arguments = parser.parse_args()

    if arguments.full:
        compile_matrix(list(matrix()), arguments.full)
    if source := arguments.full or arguments.table:
        print("\n".join([heading(), *(row(entry, code) for entry, code in rows_of(source))]))
        return
    lengths = WINDOWS if arguments.windows else LONG
    layout = None if arguments.layout == "none" else arguments.layout
    print(heading())
    for arch in arguments.arch:
        for dtype in arguments.dtype:
            for head_dim in arguments.head_dim:
                for backward in (False, True) if arguments.backward else (False,):
                    entry = Entry(arch, dtype, head_dim, layout, lengths, backward)
                    for launch in entry.launches():
                        print(row(entry, read_code(launch, arch)), flush=True)


if __name__ == "__main__":
    main()
