"""The truth about a GPU in minutes: is everything right there, how fast is it, what do its kernels take.

    python -m benchmarks.gpu_session --out session [--minutes 10] [--parts checks,attention] [--baseline OTHER.so]
    python -m benchmarks.gpu_session --out session --dry-run    # the same path on the CPU, tiny cases: its times say nothing

Every part runs in a process of its own with its own time limit, the most important first; one that fails or hangs does not stop
the next. Results are written as they come, one JSON object per line, to OUT/results.jsonl, so a killed run loses nothing; at
the end OUT/report.md is a page of them, with plots beside it (`--page` makes it of what is there).

--baseline: another build of the CUDA library, timed in turn with this one.

Times are medians of CUDA events in microseconds, candidates in turn, the L2 cache overwritten before each call.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .page import write_page
from .parts import PARTS, run_part, run_parts
from .session import Session, environment


def main() -> None:
    parts = "\n".join(f"    {name:12}{part.what}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session",
        description=f"{__doc__}\nParts:\n\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("session"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, in this order")
    parser.add_argument("--baseline", type=Path, help="another libcomp_kernels_cuda.so, timed in turn with this one")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU, nothing compiled")
    parser.add_argument("--page", action="store_true", help="only make the page of OUT/results.jsonl")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if arguments.page:
        print(write_page(arguments.out))
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu_session measures on a GPU and torch sees none; --dry-run goes through it on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    session = Session(arguments.out, arguments.part or "session", arguments.dry_run, arguments.baseline)
    if arguments.part:
        with torch.compiler.set_stance("force_eager" if arguments.dry_run else "default"):
            run_part(session)
        return
    session.say(**environment(arguments.dry_run))
    failed = run_parts(names, session, arguments.minutes, arguments.baseline)
    print(write_page(arguments.out))
    if failed:
        raise SystemExit(f"{failed} part(s) did not finish, see {arguments.out / 'report.md'}")


if __name__ == "__main__":
    main()
