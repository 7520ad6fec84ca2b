"""What a run leaves behind while it runs: metrics.jsonl (one record per line, exact on resume), TensorBoard, a progress bar."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm


class MetricsLog:
    """Appends records to metrics.jsonl and mirrors training records to TensorBoard.

    A record reaches the file in one write, where the disk takes it whole, so a killed process leaves at most one torn last
    line. `keep_bytes` cuts off what came after a checkpoint, torn line included.
    """

    def __init__(self, path: Path, tensorboard: Path | None, *, keep_bytes: int | None = None, purge_step: int | None = None):
        self.path = path
        if keep_bytes is not None:
            _truncate(path, keep_bytes)
        self._file = path.open("ab", buffering=0)
        self._writer = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(tensorboard), purge_step=purge_step)

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        while line:  # a disk that is nearly full takes a part, and the next write says why
            line = line[self._file.write(line) :]
        if self._writer is not None and record["event"] in ("train", "evaluation"):
            for name, value in _scalars(record):
                self._writer.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def num_bytes(self) -> int:
        """Length of the file once everything so far is on disk: what a checkpoint notes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_records(path: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Records of metrics.jsonl: of one event ("train", "evaluation", "skipped", "note") or all, without a torn last line."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            records.append(json.loads(line))
    return [r for r in records if event is None or r["event"] == event]


def _truncate(path: Path, num_bytes: int) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size < num_bytes:
        raise RuntimeError(f"{path} has {size} bytes, the checkpoint was made when it had {num_bytes}; it was changed since")
    if size:
        os.truncate(path, num_bytes)


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value


class Progress:
    """One bar over all stages: loss, images/s, tokens/s, step time, time left. Without a terminal it prints once a minute."""

    def __init__(self, total: int, done: int, *, enabled: bool):
        interval = 0.5 if sys.stderr.isatty() else 60
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            disable=not enabled,
            dynamic_ncols=True,
            mininterval=interval,
            smoothing=0.05,
        )

    def update(self, stage: str, record: dict[str, Any]) -> None:
        self._bar.set_description(stage, refresh=False)
        values = {"loss": f"{record['loss']:.3f}"}
        if "alignment_loss" in record:
            values["align"] = f"{record['alignment_loss']:.3f}"
        values["img/s"] = f"{record['images_per_s']:.1f}"
        values["tok/s"] = f"{record['tokens_per_s']:.0f}"
        if "mfu" in record:
            values["mfu"] = f"{100 * record['mfu']:.0f}%"
        values["s/step"] = f"{record['step_time']:.2f}"
        self._bar.set_postfix(values, refresh=False)
        self.advance()

    def advance(self) -> None:
        """One step, whatever came of it."""
        self._bar.update(1)

    def print(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def table(header: list[str], rows: list[list[str]]) -> str:
    """Text table: first column left, others right aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
