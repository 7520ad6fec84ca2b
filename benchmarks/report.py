"""The table of the README and a chart from the JSON of a benchmark run.

pytest benchmarks/ --benchmark-only --benchmark-json=runs/bench.json
python -m benchmarks.report runs/bench.json [more.json ...] --chart docs/benchmarks.png
python -m benchmarks.report runs/bench.json --summary      the table of the README: rope_attention against the best peer
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

LABELS = {
    "vit_s_224": "ViT-S at 224: 8 x 197, 6 x 64",
    "dinov2_l_224": "DINOv2-L at 224: 4 x 257, 16 x 64",
    "aimv2_l_224": "AIMv2-L at 224: 4 x 256, 8 x 128",
    "so400m_384": "SigLIP-So400m at 384: 2 x 729, 16 x 72",
    "native_mix": "So400m, native mix of 33 to 1024, 16 x 72",
    "qwen25vl_windows": "Qwen2.5-VL windows: 48 x 64, 16 x 80",
    "many_small": "many small images of 16 to 144, 16 x 64",
    "one_long_image": "one image of 2304, 16 x 72",
}
SUMMARY_GROUPS = ("forward", "forward+backward")


def load(paths: list[Path]) -> list[dict]:
    """What `measure.compare` left in the files, in order; a later measurement of the same case replaces an earlier one."""
    rows: dict[tuple[str, str], dict] = {}
    for path in paths:
        for entry in json.loads(path.read_text())["benchmarks"]:
            info = entry["extra_info"]
            if "peers_ms" in info:
                rows[info["group"], info["case"]] = info
    return list(rows.values())


def best_peer(row: dict) -> tuple[str, float]:
    """The fastest peer and how many times as long it takes."""
    name = min(row["peers_ms"], key=row["peers_ms"].get)
    return name, row["peers_ms"][name] / row["ms"]


def markdown(rows: list[dict]) -> str:
    """One table per group: ours, rate, share of the peak, speed against each peer (the best one in bold), memory, error."""
    lines: list[str] = []
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        peers = list(dict.fromkeys(name for row in members for name in row["peers_ms"]))
        columns = [
            "case",
            "ms",
            "x floor",
            "GFLOP/s",
            "of FMA peak",
            *(f"vs {name}" for name in peers),
            "MiB (best peer)",
            "max error",
        ]
        lines += [f"### {group}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in members:
            best, _ = best_peer(row)
            cells = [row["case"], f"{row['ms']:.2f}", f"{row['ms'] / row['floor_ms']:.2f}" if "floor_ms" in row else ""]
            cells += [f"{row['gflops']:.0f}", f"{row['peak_share']:.0%}"] if "gflops" in row else ["", ""]
            for name in peers:
                speed = f"{row['peers_ms'][name] / row['ms']:.2f}x" if name in row["peers_ms"] else ""
                cells.append(f"**{speed}**" if name == best else speed)
            cells.append(f"{row['memory_mib']['ours']:.0f} ({row['memory_mib'][best]:.0f})")
            cells.append(f"{row['max_error']:.1e}" if "max_error" in row else "")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    computes = {name: text for row in rows for name, text in row.get("peers_compute", {}).items()}
    lines += [*(f"- {name} computes {text}." for name, text in computes.items()), ""] if computes else []
    machines = dict.fromkeys(f"{row['machine']}, {row['threads']} threads, torch {row['torch']}" for row in rows)
    lines.append("Medians of rounds in which ours and every peer run once, one after another. " + "; ".join(machines) + ".")
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """Speed of rope_attention against the fastest peer of each case, and its share of the peak."""
    found = {(row["group"], row["case"]): row for row in rows}
    lines = [
        "| images x patches, heads x head size | " + " | ".join(f"{group} | of FMA peak" for group in SUMMARY_GROUPS) + " |"
    ]
    lines.append("|---" * (1 + 2 * len(SUMMARY_GROUPS)) + "|")
    for case, label in LABELS.items():
        members = [found[group, case] for group in SUMMARY_GROUPS if (group, case) in found]
        if len(members) == len(SUMMARY_GROUPS):
            cells = [f"{best_peer(row)[1]:.2f}x | {row['peak_share']:.0%}" for row in members]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(rows: list[dict], path: Path) -> None:
    """Bars: how many times as long each peer takes; ours is the line at one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure, axes = plt.subplots(len(groups), 1, figsize=(10, 2.8 * len(groups)), squeeze=False)
    for axis, group in zip(axes[:, 0], groups):
        members = [row for row in rows if row["group"] == group]
        peers = list(dict.fromkeys(name for row in members for name in row["peers_ms"]))
        width = 0.8 / len(peers)
        for i, name in enumerate(peers):
            heights = [row["peers_ms"].get(name, 0) / row["ms"] for row in members]
            axis.bar([x + (i + 0.5) * width - 0.4 for x in range(len(members))], heights, width, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(members)), [row["case"] for row in members], fontsize=8)
        axis.set_yscale("log", base=2)
        axis.set_ylabel("time / ours")
        axis.set_title(group, fontsize=10)
        axis.legend(fontsize=7, ncols=len(peers))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+", help="files of pytest-benchmark")
    parser.add_argument("--summary", action="store_true", help="the short table of the README instead of everything")
    parser.add_argument("--chart", type=Path, help="write a PNG here")
    arguments = parser.parse_args()
    rows = load(arguments.json)
    print(summary(rows) if arguments.summary else markdown(rows))
    if arguments.chart:
        chart(rows, arguments.chart)


if __name__ == "__main__":
    main()
