"""rope_attention's CPU kernels that multiply pairs of 16 bits, on processors without AVX512_BF16 and AMX: in software."""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import test_rope_attention_cpu as every_set
import torch

import comp_kernels as ck
from comp_kernels import _native
from comp_kernels._sources import CSRC, CXX_FLAGS, PAIRS_FLAGS
from comp_kernels.testing import ATTENTION_CASES, AttentionCase, check_huge_logits, check_median_error, check_rope_attention

ROOT = CSRC.parent
SOFTWARE = ROOT / "tests" / "emulated_cpu" / "software_pairs.h"
NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
build = runpy.run_path(str(ROOT / "setup.py"))
COMPILER = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]


def why_not() -> str | None:
    """What is missing here to build and run the kernels, or None."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    if platform.machine() not in ("x86_64", "AMD64") or flags is None or not set(flags[1].split()) >= NEEDED:
        return "the stand-ins are written in AVX-512, which /proc/cpuinfo does not show"
    if shutil.which(COMPILER[0]) is None:
        return "there is no C++ compiler (c++, g++ or CXX)"
    if not all(build["accepts"](COMPILER, flags) for flags in PAIRS_FLAGS.values()):
        return "the compiler does not know AVX512_BF16 and AMX, so that the library has no kernels for them either"
    return None


def compile_library() -> Path:
    """The sets with their instructions in software; compiled again when anything it is made of has changed."""
    # -O1: half the time of -O3; what it lacks is that products and sums become one instruction, with one rounding
    common = [*COMPILER, *CXX_FLAGS, "-O1", "-fexpensive-optimizations", "-DCOMP_KERNELS_HAS_PAIRS"]
    cpu = [CSRC / "common" / "cpu", CSRC / "rope_attention" / "cpu"]
    sources = [*cpu[0].glob("*.cpp"), *cpu[1].glob("*.cpp"), SOFTWARE.parent / "software_isa.cpp"]
    jobs = [(source, "all", []) for source in sorted(sources) if source.name != "isa.cpp"]
    for isa, flags in PAIRS_FLAGS.items():
        flags = [flag for flag in flags if not flag.startswith(("-mavx512bf16", "-mamx"))]
        flags += ["-include", str(SOFTWARE), f"-DCOMP_KERNELS_ISA={isa}"]
        jobs += [(source, isa, flags) for source in sorted((cpu[1] / "kernels").glob("*.cpp"))]
    headers = [*CSRC.glob("include/**/*.h"), *cpu[0].glob("*.h"), *cpu[1].glob("**/*.h"), SOFTWARE]
    made_of = [*headers, *(source for source, _, _ in jobs)]
    text = b"".join(path.read_bytes() for path in sorted(made_of)) + repr((common, jobs)).encode()
    folder = ROOT / "build" / f"software-pairs-{hashlib.sha256(text).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "library.so"
    with open(folder / "lock", "w") as lock:  # pytest's other processes wait for the one that compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            objects = [folder / f"{source.stem}.{isa}.o" for source, isa, _ in jobs]
            build["run_all"](
                [[*common, *flags, "-c", str(source), "-o", str(to)] for (source, _, flags), to in zip(jobs, objects)]
            )
            unfinished = folder / "unfinished.so"
            build["run_all"]([[*COMPILER, "-shared", *map(str, objects), "-o", str(unfinished)]])
            unfinished.replace(library)
    return library


@pytest.fixture(scope="module")
def library():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return _native.with_torch_threads(ctypes.CDLL(str(compile_library())))


@pytest.fixture(params=PAIRS_FLAGS, autouse=True)
def isa(request, library, monkeypatch):
    """Within, this library takes the place of the usual one, and such a set is in use."""
    monkeypatch.setenv("COMP_KERNELS_CPU_ISA", request.param)
    monkeypatch.setattr(_native, "_cpu", lambda: library)
    _native.cpu_function.cache_clear()
    yield request.param
    _native.cpu_function.cache_clear()


@pytest.fixture
def dtype(isa):
    """What the set multiplies."""
    return {"amx_fp16": torch.float16, "amx_bf16x3": torch.float32}.get(isa, torch.bfloat16)


def test_it_is_these_kernels_that_run(isa):
    assert _native.cpu().comp_kernels_cpu_isa().decode() == f"{isa} (in software)"
    with pytest.raises(RuntimeError, match="this library has nothing but the sets that multiply pairs"):
        check_rope_attention(ATTENTION_CASES["dim_2"], torch.float64, "cpu")


@pytest.mark.parametrize("name", [name for name in ATTENTION_CASES if name != "logits_of_1e4"])
def test_error_budget(name, dtype):
    check_rope_attention(ATTENTION_CASES[name], dtype, "cpu")


@pytest.mark.parametrize("head_dim", (64, 72, 80, 128))
def test_many_blocks_of_queries_and_keys(head_dim, dtype):
    """Lengths around the blocks of tiles (32 x 256) and of vectors, odd ones; two heads share their keys."""
    lengths, lengths_k = [0, 1, 63, 97, 143, 289], [5, 333, 0, 129, 257, 17]
    case = AttentionCase("blocks", lengths, head_dim=head_dim, kv_heads=1, lengths_k=lengths_k, seed=3)
    check_rope_attention(case, dtype, "cpu")


@pytest.mark.parametrize("isa", ["amx_bf16x3"], indirect=True)
@pytest.mark.parametrize("name", ("awkward", "dim_72", "dim_10", "layout_interleaved", "gqa", "cross"))
def test_float16_is_split_like_float32(name):
    check_rope_attention(ATTENTION_CASES[name], torch.float16, "cpu")


@pytest.mark.parametrize("isa", ["amx_fp16"], indirect=True)
@pytest.mark.parametrize("lengths, split", (([159], False), ([160], True), ([40] * 9 + [200], False), ([40, 200], True)))
def test_float32_is_split_where_queries_have_many_keys(lengths, split):
    """Within a set that has it without being called it: both passes, or neither, for the scores must be the same."""
    refusal = pytest.raises(RuntimeError, match="nothing but the sets that multiply pairs")
    with contextlib.nullcontext() if split else refusal:
        check_rope_attention(AttentionCase("lengths", lengths), torch.float32, "cpu")


@pytest.mark.parametrize("isa", ["amx_bf16x3"], indirect=True)
def test_numbers_at_the_ends_of_float32():
    """The largest stay finite. Below 2^-110 or so terms become denormal numbers, which tiles take for zero: of 2^-115 ten bits
    are left, where float32 has 24."""
    q, k = torch.zeros(2, 40, 1, 64)
    v = torch.full((40, 1, 64), torch.finfo(torch.float32).max)
    torch.testing.assert_close(ck.rope_attention(q, k, v / 64, backend="cpu"), v / 64, rtol=1e-6, atol=0)
    k[0], q[..., 0] = 0, 1e3
    k[0, :, 0] = 1  # one key has all the weight
    v[1:] = 1.0
    torch.testing.assert_close(ck.rope_attention(q, k, v, backend="cpu"), v[:1].expand_as(v), rtol=0, atol=0)
    v = 2.0**-115 * (1 + torch.rand(40, 1, 64))
    out = ck.rope_attention(q, k, v, backend="cpu")
    torch.testing.assert_close(out, v[:1].expand_as(v), rtol=2.0**-9, atol=0)


@pytest.mark.parametrize("head_dim", (64, 72))
def test_negative_scale(head_dim, dtype):
    case = AttentionCase("scale", [41, 150], heads=4, kv_heads=2, head_dim=head_dim, scale=-0.3)
    check_rope_attention(case, dtype, "cpu")


def test_large_logits(dtype):
    check_median_error(AttentionCase("large", [160, 9], heads=4, magnitude=50.0), dtype, "cpu")
    check_huge_logits(dtype, "cpu")


@pytest.mark.parametrize("head_dim", (16, 72, 88, 128))
def test_scores_learn_nothing_where_one_key_has_all_the_weight(head_dim, dtype):
    """dP and delta are summed in the same order, in each of the sets its own."""
    every_set.test_scores_learn_nothing_where_one_key_has_all_the_weight(dtype, head_dim)


def test_same_bits_again_and_with_two_threads(dtype):
    every_set.test_same_bits_again_and_with_two_threads("dim_72", dtype)


@pytest.mark.parametrize("magnitude", (0.01, 0.1))
def test_small_logits(dtype, magnitude):
    every_set.test_small_logits(dtype, magnitude)


@pytest.mark.parametrize("levels", every_set.LEVELS)
def test_scores_that_grow_from_key_to_key(dtype, levels):
    every_set.test_scores_that_grow_from_key_to_key(dtype, levels)


def test_huge_logits_of_one_query(dtype):
    every_set.test_huge_logits_of_one_query(dtype)


@pytest.mark.parametrize("key", (10, 100, 299))
def test_nan_in_a_late_key(dtype, key):
    every_set.test_nan_in_a_late_key(dtype, key)


def test_nan_in_one_sequence_stays_there(dtype):
    every_set.test_nan_in_one_sequence_stays_there(dtype)
