"""The page of a session: a table per kind of row of OUT/results.jsonl, what failed, and a plot per part that took times."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

Row = dict  # as Session.say writes it


def write_page(out: Path) -> Path:
    """Write `out`/report.md and `out`/PART.png from what `out`/results.jsonl holds so far; returns the page."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    first = next((row for row in rows if row["part"] == "session" and "torch" in row), {})
    lines = [f"# {first.get('device', 'a device that was not named')}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in first.items() if key not in ("part", "device")), ""]
    lines += table([without(row, "part") for row in rows if "finished" in row])
    for part in dict.fromkeys(row["part"] for row in rows if row["part"] != "session"):
        found = [without(row, "part") for row in rows if row["part"] == part]
        lines += [f"## {part}", ""]
        failures = [row for row in found if "failed" in row or "error" in row]
        for block in kinds([row for row in found if row not in failures]):
            lines += table(block)
        lines += [f"- {', '.join(f'{key}: {value}' for key, value in row.items())}" for row in failures] + [""] * bool(failures)
        if plot(found, out / f"{part}.png"):
            lines += [f"![{part}]({part}.png)", ""]
    page = out / "report.md"
    page.write_text("\n".join(lines))
    return page


def without(row: Row, *keys: str) -> Row:
    return {key: value for key, value in row.items() if key not in keys}


def kinds(rows: list[Row]) -> Iterable[list[Row]]:
    """Rows with the same keys, in the order of their first."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row), []).append(row)
    return found.values()


def spread(row: Row) -> list[Row]:
    """A row whose values are dictionaries by name (us, teraflops, ..) as a row per name."""
    nested = {key: value for key, value in row.items() if isinstance(value, dict)}
    if not nested:
        return [row]
    names = dict.fromkeys(name for value in nested.values() for name in value)
    label = without(row, *nested)
    return [{**label, "name": name, **{key: value.get(name) for key, value in nested.items()}} for name in names]


def table(rows: list[Row]) -> list[str]:
    """Lines of Markdown; rows have the same keys."""
    rows = [flat for row in rows for flat in spread(row)]
    if not rows:
        return []
    return [
        "| " + " | ".join(rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
        *("| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows),
        "",
    ]


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    text = " x ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def plot(rows: list[Row], path: Path) -> bool:
    """Bars by name for every row that has them: TFLOPS, or microseconds; returns whether there were any."""
    unit = next((unit for unit in ("teraflops", "us") if any(isinstance(row.get(unit), dict) for row in rows)), None)
    if unit is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if isinstance(row.get(unit), dict)]
    figure, axes = pyplot.subplots(len(rows), 1, squeeze=False, layout="constrained")
    figure.set_size_inches(9, sum(0.6 + 0.2 * len(row[unit]) for row in rows))
    for axis, row in zip(axes[:, 0], rows):
        axis.barh(list(row[unit]), [value or 0 for value in row[unit].values()])
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        labels = (cell(value) for value in row.values() if not isinstance(value, dict))
        axis.set_title(f"{', '.join(labels)}: {'TFLOPS' if unit == 'teraflops' else 'microseconds'}", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
