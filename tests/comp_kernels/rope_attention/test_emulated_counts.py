"""tests/helpers/emulated_counts.py: its arithmetic without an emulator, and a small count with one."""

import subprocess
import sys

import emulated_counts
import pytest
from emulation import needs_emulator, run_compiled


def report(instructions, flops, read, written):
    """What the emulator returns, as far as the table reads it."""
    return {
        "warp_instructions": instructions,
        "tensor_flops": flops,
        "by_class": {"tensor": flops // 4096},
        "global": {"unique_load_sectors": read, "unique_store_sectors": written},
        "shared": {"load": {"wavefronts": 12, "ideal": 10}, "store": {"wavefronts": 5, "ideal": 5}},
    }


def test_table_adds_launches_and_divides_by_both_kernels_of_the_peer():
    launches = [("rotate_kernel", report(757_940, 0, 9_410, 40_000)), ("forward", report(3_000_000, 4096, 200_000, 100_000))]
    text = emulated_counts.table({64: launches, 96: launches}, with_peer=True)
    assert "| warp instructions, rotate_kernel | 757,940 | 757,940 |" in text
    assert "| **warp instructions, ours** | 3,757,940 | 3,757,940 |" in text
    assert "| **warp instructions, ours / theirs** | 1.00 | - |" in text  # nothing was recorded for 96
    assert "sectors, read + written, ours / theirs** | 1.00 | - |" in text
    assert "| bank conflicts (wavefronts) | 4 | 4 |" in text


def test_says_in_one_line_that_there_is_no_emulator(monkeypatch):
    monkeypatch.setattr(emulated_counts, "missing", lambda backend: "ptx_emulator not found")
    monkeypatch.setattr(sys, "argv", ["emulated_counts"])
    with pytest.raises(SystemExit, match=r"^nothing counted: ptx_emulator not found$"):
        emulated_counts.main()


def small_counts(backward):
    case = emulated_counts.AttentionCase("small", [90, 70], head_dim=64, layout=emulated_counts.LAYOUT)
    return emulated_counts.table({64: emulated_counts.count("triton", case, 80, backward)}, with_peer=False)


@pytest.mark.emulated
@needs_emulator
def test_counts_both_launches_of_the_forward_pass():
    text = run_compiled(small_counts, False)
    assert "| warp instructions, rotate_kernel |" in text and "| warp instructions, attention_forward_kernel |" in text
    scores = (2 * 64 + 2 * 64) * 128  # keys in tiles of 64, queries in one tile of 128
    assert f"| **tensor FLOPs, ours** | {4 * scores * 64 * 2:,} |" in text


def test_command_line_knows_its_options():
    command = [sys.executable, emulated_counts.__file__, "--help"]
    assert "--keys-in-loop" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
