"""What every Triton that a supported torch brings makes of the kernels: they compile, and fit shared memory, registers and
tensor memory of each architecture. No GPU, and no torch of that age: the versions of Triton lie in folders side by side.

    python -m benchmarks.triton_versions                       # every version and architecture, two processes, about 5 minutes
    python -m benchmarks.triton_versions --triton 3.6.0 --arch sm_86 sm_90 --jobs 1
    python -m benchmarks.triton_versions --out rows.jsonl      # and a row per kernel: registers, local and shared memory
    python -m benchmarks.triton_versions --table rows.jsonl    # compile nothing, print which kernels of FILE use local memory
    python -m benchmarks.triton_versions --interpret           # then the tests in the oldest version's interpreter

Launches are recorded as the three operators make them (`calls`: dtypes, layouts, modes, the head dims at which the tables of
configurations change). Of some 2,400 per architecture a few are compiled (`covering`): every tile with the largest head that it
serves, for 16 and for 32 bits, and every other choice that a kernel is compiled for.

Exit code 1, with a line per kernel, when one does not compile or does not fit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.compile_report import CHIPS, DTYPES, KIB, resource_usage
from comp_kernels import alignment_loss, rope_attention, sinkhorn
from comp_kernels._triton_compile import Launch, Pointer, compile_launch, record
from comp_kernels.ops.rope_attention import triton_configs
from comp_kernels.testing import LAYOUTS, AttentionCase, make_attention_inputs

# Triton -> the versions of torch whose CUDA builds bring it.
VERSIONS = {"3.6.0": "2.10, 2.11", "3.7.1": "2.12, 2.13", "3.8.0": "2.14", "3.9.0": "2.15"}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_86", "sm_120")  # sm_89 has the limits and instructions of sm_86
TILES_ONLY = ("sm_100", "sm_86", "sm_120")  # choices that are no tiles are the same code for the others' instructions
ROOT = Path(__file__).parent.parent
DEFAULT_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "comp_kernels" / "triton"
NUMPY = "numpy<2.4"  # for the interpreter of 3.6.0: 2.4 refuses int() of the arrays of one element that it keeps scalars in
INTERPRETED = [
    "tests/comp_kernels/rope_attention/test_rope_attention_triton.py",
    "tests/comp_kernels/sinkhorn/test_sinkhorn.py",
    "tests/comp_kernels/alignment_loss/test_alignment_loss.py",
]
MAX_TENSOR_MEMORY = 512  # columns, of sm_100

# --- what the operators launch ---------------------------------------------------------------------------------------------


def head_dims(arch: str, dtype: torch.dtype) -> list[int]:
    """The largest head dim of each configuration, and 72, which leaves half of a chunk empty."""
    table = triton_configs.FLOAT32 if dtype == torch.float32 else triton_configs.TABLE
    return sorted({72}.union(*(rows[triton_configs.family(arch, dtype)] for rows in table.values())))


def attention_cases(arch: str, dtype: torch.dtype) -> Iterator[AttentionCase]:
    long, windows = [300, 150], [64] * 8
    for head_dim in head_dims(arch, dtype):
        yield AttentionCase("long", long, head_dim=head_dim, layout="half_hwhw_halfwidth")
        if head_dim <= triton_configs.INLINE_HEAD_DIM:
            yield AttentionCase("windows", windows, head_dim=head_dim, layout="half_hwhw_halfwidth")
    for layout in (*LAYOUTS, None):
        yield AttentionCase("layout", long, head_dim=72, layout=layout)
        yield AttentionCase("layout, windows", windows, head_dim=72, layout=layout)
    yield AttentionCase("grouped", long, heads=4, kv_heads=2, head_dim=72)
    yield AttentionCase("cross", long, lengths_k=[70, 200], head_dim=64)
    yield AttentionCase("negative", long, head_dim=64, scale=-1.0)
    yield AttentionCase("narrow", long, head_dim=40, layout="interleaved")


def calls(arch: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(description, call) of calls that between them use what the operators have."""
    for dtype in DTYPES.values():
        for case in attention_cases(arch, dtype):
            for everything in (False, True):
                yield f"{case.name} D={case.head_dim} {case.layout}", attention(case, dtype, everything)
        for rows, tol in itertools.product((8, 20, 300), (None, 0.1)):
            yield f"sinkhorn of {rows} rows, tol {tol}", ot(dtype, rows, tol)
        for side, order, eps in itertools.product((4, 8, 16, 32), ("rows_cols", "cols_rows"), (0.0, 1e-6)):
            yield f"sinkhorn of {side} x {side}, {order}, eps {eps}", small_ot(dtype, side, order, eps)
        for mode, normalize, words in itertools.product(("sinkhorn", "literal", "softmax"), (True, False), (4096, 5001)):
            yield f"alignment_loss {mode} V={words}", loss(dtype, mode, normalize, words)


def attention(case: AttentionCase, dtype: torch.dtype, everything: bool) -> Callable[[], object]:
    """everything: gradients of the tables too, and one that flows into lse."""
    inputs = make_attention_inputs(case, dtype)
    names = inputs.leaves() if everything else ("q", "k", "v")
    leaves = [x.requires_grad_() for name, x in inputs.leaves().items() if name in names]

    def call():
        out, lse = rope_attention(
            inputs.q, inputs.k, inputs.v, inputs.cos, inputs.sin, inputs.cu_seqlens,
            return_lse=True, backend="triton", **inputs.kwargs,
        )  # fmt: skip
        results = (out, lse) if everything else (out,)
        torch.autograd.grad(results, leaves, (inputs.grad_out, inputs.grad_lse)[: len(results)])

    return call


def ot(dtype: torch.dtype, rows: int, tol: float | None) -> Callable[[], object]:
    from comp_kernels.ops.sinkhorn.triton_steps import Steps

    scores = torch.zeros(2, rows, 4096, dtype=dtype)

    def call():
        marginals = dict(row_marginals=torch.ones(rows), col_marginals=torch.full((4090,), rows / 4090))
        for cols, given in ((4096, {}), (4090, marginals)):
            sinkhorn(scores[:, :, :cols], epsilon=0.1, num_iters=2, tol=tol, backend="triton", **given)
        steps = Steps(scores, 1.0)  # over a process group
        steps.column_statistics(torch.zeros(2, rows))
        steps.row_log_sums(torch.zeros(2, 4096))

    return call


def small_ot(dtype: torch.dtype, side: int, order: str, eps: float) -> Callable[[], object]:
    """Many small matrices, and the gradient of their iterations."""
    scores = torch.zeros(64, side, side, dtype=dtype, requires_grad=True)

    def call():
        plan = sinkhorn(scores, epsilon=1.0, num_iters=20, order=order, eps=eps, gradient="unrolled", backend="triton")
        torch.autograd.grad(plan.sum(), scores)

    return call


def loss(dtype: torch.dtype, mode: str, normalize: bool, words: int) -> Callable[[], object]:
    vision, text, prototypes = (torch.zeros(n, 96, dtype=dtype) for n in (64, 64, words))
    vision.requires_grad_()

    def call():
        with torch.no_grad():
            alignment_loss(vision, text, prototypes, mode=mode, normalize=normalize, backend="triton")
        value = alignment_loss(
            vision, text, prototypes, prior=torch.ones(words), mode=mode, normalize=normalize, backend="triton"
        )
        torch.autograd.grad(value, vision)

    return call


# --- which of it is compiled -----------------------------------------------------------------------------------------------


SIZES = ("STRIDE", "stride", "dim", "chunks", "num_pairs", "PAIRS", "PADDED", "TAIL")  # of names of arguments: no choices
TILE = ("BLOCK_M", "BLOCK_N", "BN", "BK", "BB", "ROWS", "PASSES", "INLINE_K")


def choices(launch: Launch) -> dict[str, object]:
    """What was decided for this launch: its compile-time arguments, dtypes, and which tensors are absent."""
    found = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    for name, value in zip(launch.kernel.arg_names, launch.args):
        found[name] = value.dtype if isinstance(value, Pointer) else value is None
    for name, value in launch.constexprs.items():
        found |= {f"{name}.{key}": x for key, x in value._asdict().items()} if hasattr(value, "_asdict") else {name: value}
    return found | {"neighbours": found.get("ROPE.pair_stride") == 1}


def first_pointer(launch: Launch) -> Pointer:
    return next(x for x in launch.args if isinstance(x, Pointer))


def features(launch: Launch) -> Iterator[tuple]:
    """What is to be compiled once: each choice by itself, and the tile for 16 and for 32 bits."""
    found = choices(launch)
    yield from ((launch.name, *item) for item in found.items() if not item[0].endswith(SIZES))
    tile = tuple(found.get(name) for name in (*TILE, "num_warps", "num_stages"))
    yield launch.name, "tile", tile, first_pointer(launch).dtype.itemsize


def covering(launches: Iterable[tuple[str, Launch]], tiles_only: bool = False) -> list[tuple[str, Launch]]:
    """A few of the (description, launch), so that no feature is missed; a tile comes with the largest head that it serves."""
    largest: dict[tuple, int] = {}
    candidates: dict[frozenset, tuple[str, Launch]] = {}
    for description, launch in launches:
        head_dim = choices(launch).get("HEAD.dim", 0)
        found = frozenset(features(launch))
        largest |= {feature: max(head_dim, largest.get(feature, 0)) for feature in found}
        candidates.setdefault(frozenset((*found, head_dim)), (description, launch))
    counted = {}
    for description, launch in candidates.values():
        head_dim = choices(launch).get("HEAD.dim", 0)
        found = frozenset(x for x in features(launch) if (largest[x] == head_dim if x[1] == "tile" else not tiles_only))
        counted.setdefault(found, (description, launch))
    chosen, missing = [], set().union(*counted)
    while missing:
        best = max(counted, key=lambda found: len(found & missing))
        chosen.append(counted[best])
        missing -= best
    return chosen


# --- in a process of one version and architecture --------------------------------------------------------------------------


def compile_row(description: str, launch: Launch, arch: str) -> dict:
    row = dict(arch=arch, kernel=launch.name, call=description, dtype=str(first_pointer(launch).dtype).removeprefix("torch."))
    started = time.process_time()
    try:
        compiled = compile_launch(launch, arch)
    except Exception as error:  # whatever the compiler raises, in any version
        return row | dict(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    usage = resource_usage(compiled.asm["cubin"])
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    row |= dict(registers=usage["REG"], local=usage["STACK"], shared=shared, warps=launch.num_warps)
    row["seconds"] = round(time.process_time() - started, 2)
    if shared > CHIPS[arch].shared_per_block:
        row["error"] = f"needs {shared / KIB:.1f} KiB of shared memory, {arch} has {CHIPS[arch].shared_per_block // KIB}"
    elif tensor_memory > MAX_TENSOR_MEMORY:
        row["error"] = f"needs {tensor_memory} columns of tensor memory, {arch} has {MAX_TENSOR_MEMORY}"
    return row


def work(architectures: list[str]) -> None:
    """Rows as JSON lines, with the Triton that this process finds."""
    import triton

    torch.set_num_threads(1)
    for arch in architectures:
        launches = [(description, launch) for description, call in calls(arch) for launch in record(call, arch)]
        for description, launch in covering(launches, tiles_only=arch in TILES_ONLY):
            print(json.dumps(dict(triton=triton.__version__) | compile_row(description, launch, arch)), flush=True)


# --- all versions ----------------------------------------------------------------------------------------------------------


def install(requirement: str, target: Path) -> None:
    """One package into a folder of its own, where that is not there yet; what is interrupted leaves none."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/packages"]
        subprocess.run([*command, requirement], check=True)
        Path(folder, "packages").rename(target)


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """Of a process that imports from `folders` first, and from this repository."""
    path = os.pathsep.join([*map(str, folders), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables | {"PYTHONPATH": path}


def run(version: str, architectures: list[str], folder: Path) -> list[dict]:
    """The rows of one version, from a process of its own that compiles everything anew."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.triton_versions", "--work", *architectures]
        variables = environment(folder / version, TRITON_CACHE_DIR=cache)
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    messages = [line for line in done.stderr.splitlines() if "Warning" in line]
    if done.returncode != 0 or {row["arch"] for row in rows} != set(architectures):
        messages.append(f"the process ended with {done.returncode}: {done.stderr}")
    found = f"{len(rows)} kernels, {len(failures(rows)) + len(messages)} failures"
    print(f"triton {version}: {found}, {time.monotonic() - started:.0f} s", flush=True)
    whole = dict(triton=version, arch="-", kernel="-", call="the process", dtype="-")
    return rows + [whole | dict(error=message) for message in messages]


def interpret(version: str, folder: Path) -> bool:
    """Whether the tests that run in Triton's interpreter pass with `version`."""
    numpy = folder / "numpy-before-2.4"
    install(NUMPY, numpy)
    # What NumPy 2.4 refuses, NumPy below warns of, and the suite ends at deprecations.
    allowed = ["-W", "ignore:Conversion of an array with ndim > 0 to a scalar is deprecated:DeprecationWarning"]
    chosen = ["-k", "triton and not compile and not trace", "-n", "2", *allowed, *INTERPRETED]
    tests = [sys.executable, "-m", "pytest", *chosen]
    print(f"interpreter of triton {version}", flush=True)
    return subprocess.run(tests, cwd=ROOT, env=environment(numpy, folder / version, TRITON_INTERPRET="1")).returncode == 0


def failures(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "error" in row]


def local_memory(rows: list[dict]) -> list[str]:
    """Bytes of local memory per thread, by version, of the kernels that use any in some version."""
    found: dict[tuple, dict[str, int]] = {}
    for row in rows:
        if "local" in row:
            found.setdefault((row["arch"], row["kernel"], row["dtype"], row["call"]), {})[row["triton"]] = row["local"]
    versions = sorted({version for values in found.values() for version in values})
    lines = [f"| arch | kernel | dtype | call | {' | '.join(versions)} |", "|---" * (4 + len(versions)) + "|"]
    for key, values in sorted(found.items()):
        if any(values.values()):
            cells = (str(values.get(version, "-")) for version in versions)
            lines.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", nargs="+", default=list(VERSIONS), metavar="VERSION", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=2, help="versions at a time (default: 2)")
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help=f"where the versions lie (default: {DEFAULT_FOLDER})"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows to FILE, as JSON lines")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="compile nothing, print the local memory of the rows in FILE"
    )
    parser.add_argument("--interpret", action="store_true", help="run tests in the interpreter of the first version as well")
    parser.add_argument("--work", nargs="+", choices=ARCHITECTURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return 0
    if options.table:
        print("\n".join(local_memory([json.loads(line) for line in options.table.read_text().splitlines()])))
        return 0
    for version in options.triton:
        install(f"triton=={version}", options.folder / version)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda version: run(version, options.arch, options.folder), options.triton)
        rows = [row for result in results for row in result]
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(local_memory(rows)))
    for row in failures(rows):
        print(f"FAILED triton {row['triton']} {row['arch']} {row['kernel']} {row['dtype']} ({row['call']}): {row['error']}")
    passed = not options.interpret or interpret(options.triton[0], options.folder)
    return 0 if passed and not failures(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
