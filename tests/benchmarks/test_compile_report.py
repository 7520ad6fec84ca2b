"""benchmarks/compile_report.py without a compiler: the matrix, its file that can be continued, reading machine code."""

from collections import Counter

import pytest

from benchmarks import compile_report as report


def code(name="attention_forward_kernel", arch="sm_80", **facts):
    facts = dict(num_warps=4, registers=168, spills=0, shared=40 * 1024, matrix=256) | facts
    return report.Code(name=name, arch=arch, **facts)


def test_matrix_covers_what_it_says():
    entries = list(report.matrix())
    assert len(entries) == len(set(entries))
    for backward in (False, True):
        sizes = {(e.arch, e.dtype, e.head_dim) for e in entries if e.layout == report.LAYOUT and e.backward == backward}
        assert len(sizes) == len(report.ARCHITECTURES) * len(report.DTYPES) * len(report.HEAD_DIMS)
    assert {(e.arch, e.layout) for e in entries} == {(a, x) for a in report.ARCHITECTURES for x in (*report.LAYOUTS, None)}


def test_launches_of_an_entry_are_not_those_of_another():
    def names(**options):
        return {launch.name for launch in report.Entry("sm_80", "bfloat16", 72, **options).launches()}

    assert names() == {"rotate_kernel", "attention_forward_kernel"}
    assert names(backward=True) == {"row_terms_kernel", "query_gradient_kernel", "key_value_gradient_kernel"}
    assert names(lengths=report.WINDOWS) == {"attention_forward_kernel"}


def test_matrix_goes_on_where_it_stopped(tmp_path, monkeypatch):
    entries = list(report.matrix())[:3]
    compiled = []

    def read_code(launch, arch):
        if len(compiled) == 3:
            raise KeyboardInterrupt
        compiled.append(launch.name)
        return code(launch.name, arch, loop=Counter(matrix=8, float=3, integer=4), matrix_cycles=64.0)

    monkeypatch.setattr(report, "read_code", read_code)
    file = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        report.compile_matrix(entries, file)  # stops within the second entry, which is then not in the file
    assert [entry for entry, _ in report.rows_of(file)] == [entries[0]] * 2
    compiled.clear()
    monkeypatch.setattr(report, "read_code", lambda launch, arch: code(launch.name, arch))
    report.compile_matrix(entries, file)
    assert [entry for entry, _ in report.rows_of(file)] == [entry for entry in entries for _ in range(2)]
    first = next(report.rows_of(file))[1]
    assert first.loop == Counter(matrix=8, float=3, integer=4)
    assert "| 15 | 8 | 7 | integer 4, float 3 | matrix 64, issue 15, exponential 0: matrix-bound |" in report.row(
        entries[0], first
    )


def test_occupancy():
    """By registers, by shared memory, by threads: the smallest counts (A100: 65,536 registers, 164 KiB, 2048 threads)."""
    assert code(registers=168, shared=0).blocks_per_sm() == 65536 // (168 * 128)
    assert code(registers=32, shared=40 * 1024).blocks_per_sm() == 164 // 41
    assert code(registers=16, shared=0, num_warps=8).blocks_per_sm() == 2048 // 256


def test_hottest_loop_is_the_innermost_with_most_matrix_instructions():
    listing = [
        (0x00, "MOV", ""),
        (0x10, "HMMA.16816.F32", ""),  # a loop with one
        (0x20, "BRA", " 0x10"),
        (0x30, "IADD3", ""),  # an outer loop
        (0x40, "HMMA.16816.F32", ""),
        (0x50, "HMMA.16816.F32", ""),
        (0x60, "@P0 BRA", " 0x90"),
        (0x70, "BRA", " 0x40"),
        (0x80, "BRA", " 0x30"),
        (0x90, "EXIT", ""),
    ]
    assert report.hottest_loop(listing) == listing[4:8]
    assert report.matrix_flops("HMMA.16816.F32.BF16") == 2 * 16 * 8 * 16
    assert report.matrix_flops("HGMMA.64x128x16.F32.BF16") == 2 * 64 * 128 * 16 // 4
    a100 = report.CHIPS["sm_80"]
    assert report.matrix_cycles("HMMA.16816.F32.BF16", a100) == 8  # 1024 dense multiply-adds per cycle and multiprocessor
    assert report.matrix_cycles("HMMA.1688.F32.TF32", a100) == 8  # half of it
