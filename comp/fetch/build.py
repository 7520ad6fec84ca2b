"""Unpacked packages -> records in LLaVA format: captions of emoji and stamps, drawn charts, lines of typeset pages.

Each builder takes {package: folder} and the output folder, saves its images to `<output>/<part>/`, and yields ("train" or
"heldout", record). Whole emoji concepts and stamp captions are held out, by a hash of their name, and so are the stamps on
which the segmentation probe is tested and the tables and documents named below.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .packages import Places
from .stamps import cut_outs, held_out_captions, stamp_files, stamp_folder

Record = dict[str, object]
CHARTS_PER_TABLE = 40
LINES_PER_PAGE = 3
HELD_OUT_TABLES = ("plotly-medals", "vega-cars", "vega-iowa-electricity")
HELD_OUT_DOCUMENTS = ("R-data", "R-FAQ")


def split_of(name: str) -> str:
    """One name in ten is held out, the same on every machine."""
    return "heldout" if zlib.crc32(name.encode()) % 10 == 0 else "train"


def record(part: str, name: str, turns: list[tuple[str, str]], kind: str, metric: str) -> Record:
    """A conversation about the image `<part>/<name>`."""
    conversations = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]
    conversations[0]["value"] = "<image>\n" + conversations[0]["value"]
    return {
        "id": f"{part}/{name}",
        "image": f"{part}/{name}",
        "conversations": conversations,
        "question_type": kind,
        "metric": metric,
    }


def save_on_white(source: Path, target: Path) -> tuple[int, int]:
    """The picture with its transparent parts white, as JPEG at its own size."""
    picture = Image.open(source).convert("RGBA")
    page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    page.alpha_composite(picture)
    page.convert("RGB").save(target, quality=92)
    return picture.size


def emoji(places: Places, output: Path) -> Iterator[tuple[str, Record]]:
    """Names from OpenMoji, pictures from Fluent Emoji 3D, joined on the code points without variation selectors."""

    def key(code: str) -> str:
        return code.lower().replace("-fe0f", "")

    pictures = {key(path.stem): path for path in sorted((places["@lobehub/fluent-emoji-3d"] / "package/assets").glob("*.webp"))}
    for row in json.loads((places["openmoji"] / "package/data/openmoji.json").read_text()):
        code = key(row["hexcode"])
        if row["skintone"] or row["group"].startswith("extras") or code not in pictures:
            continue
        name = f"{code}.jpg"
        save_on_white(pictures[code], output / "emoji" / name)
        yield split_of(code), record("emoji", name, [("What does this emoji show?", row["annotation"])], "emoji", "anls")


def stamps(places: Places, output: Path) -> Iterator[tuple[str, Record]]:
    """Tux Paint's stamps: cut-out photos and drawings of 12 to 2,348 pixels, with one sentence each. Letters are left out."""
    root, held_out = stamp_folder(places), held_out_captions(cut_outs(places))
    for category, path, caption in stamp_files(places):
        name = "-".join(path.relative_to(root).with_suffix(".jpg").parts)
        if category != "symbols" and min(save_on_white(path, output / "stamps" / name)) >= 8:
            split = "heldout" if caption in held_out else split_of(caption)
            yield split, record("stamps", name, [("What is in this picture?", caption)], "stamp", "anls")


def charts(places: Places, output: Path) -> Iterator[tuple[str, Record]]:
    """Bar charts of rows of real tables, drawn with matplotlib in many sizes; held out by table."""
    for table, rows in _tables(places):
        names = _column(rows, number=False)
        for index in range(CHARTS_PER_TABLE if names else 0):
            rng = np.random.default_rng([zlib.crc32(table.encode()), index])
            chart = _chart(rng, rows, names)
            if chart is None:
                continue
            column, labels, values = chart
            name = f"{table}-{index}.png"
            _draw_chart(rng, column, labels, values, output / "charts" / name)
            asked = int(rng.integers(len(labels)))
            turns = [
                ("How many bars are there?", str(len(labels))),
                ("Which bar has the largest value?", labels[int(np.argmax(values))]),
                (f"What is the value of {labels[asked]}?", f"{values[asked]:g}"),
            ]
            turns = [turns[i] for i in rng.permutation(len(turns))]
            split = "heldout" if table in HELD_OUT_TABLES else "train"
            yield split, record("charts", name, turns, "chart", "relaxed_accuracy")


def _tables(places: Places) -> Iterator[tuple[str, list[dict[str, object]]]]:
    for path in sorted((places["plotly"] / "plotly/package_data/datasets").glob("*.csv.gz")):
        with gzip.open(path, "rt") as f:
            yield f"plotly-{path.name.split('.')[0]}", list(csv.DictReader(f))
    for path in sorted((places["vega_datasets"] / "vega_datasets/_data").iterdir()):
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            with open(path, encoding="utf-8") as f:
                rows = list(csv.DictReader(f))
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            yield f"vega-{path.stem}", rows


def _number(cell: object) -> float | None:
    try:
        return float(str(cell))
    except ValueError:
        return None


def _column(rows: list[dict[str, object]], *, number: bool) -> list[str]:
    """Columns whose first cells are all numbers, or all short texts."""
    head = rows[:20]
    return [
        column
        for column in rows[0]
        if column
        and all(
            (_number(row.get(column)) is not None) == number and (number or 0 < len(str(row.get(column) or "")) <= 16)
            for row in head
        )
    ]


def _chart(
    rng: np.random.Generator, rows: list[dict[str, object]], names: list[str]
) -> tuple[str, list[str], list[float]] | None:
    """A number column, 3 to 7 rows with different names and their values; None when the draw cannot be charted."""
    numbers = _column(rows, number=True)
    if not numbers:
        return None
    column, name = numbers[rng.integers(len(numbers))], names[rng.integers(len(names))]
    values: dict[str, float] = {}
    for i in rng.permutation(len(rows))[:200]:
        value = _number(rows[i].get(column))
        if value is not None and value > 0 and len(values) < int(rng.integers(3, 8)):
            values.setdefault(str(rows[i].get(name)), float(f"{value:.3g}"))
    if len(values) < 3 or len(set(values.values())) < len(values):
        return None
    return column, list(values), list(values.values())


def _draw_chart(rng: np.random.Generator, column: str, labels: list[str], values: list[float], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(rng.uniform(2.5, 5), rng.uniform(1.8, 3.2)), dpi=int(rng.integers(70, 120)), layout="constrained")
    axes = figure.subplots()
    colour = f"C{rng.integers(10)}"
    bars = axes.barh(labels, values, color=colour) if rng.random() < 0.5 else axes.bar(labels, values, color=colour)
    axes.margins(0.12)
    if max(map(len, labels)) * len(labels) > 20:
        axes.tick_params(axis="x", labelrotation=45)
    if rng.random() < 0.5:
        axes.bar_label(bars, fmt="{:g}")
    axes.set_title(column.replace("_", " "))
    figure.savefig(target)


def pages(places: Places, output: Path) -> Iterator[tuple[str, Record]]:
    """Lines of R's manuals, cut out of the rendered page at its own resolution; held out by document."""
    import pypdfium2

    for path in sorted((places["r-doc-pdf"] / "usr/share/R/doc/manual").glob("R-*.pdf")):
        document = pypdfium2.PdfDocument(path)
        for number, page in enumerate(document):
            rng = np.random.default_rng([zlib.crc32(path.stem.encode()), number])
            scale = float(rng.uniform(1.0, 2.0))
            picture = page.render(scale=scale).to_pil().convert("RGB")
            lines = list(_lines(page))
            for i in rng.permutation(len(lines))[:LINES_PER_PAGE]:
                (left, bottom, right, top), text = lines[i]
                height = page.get_height()
                box = [scale * v for v in (left - 4, height - top - 3, right + 4, height - bottom + 3)]
                name = f"{path.stem}-{number}-{i}.png"
                picture.crop([round(v) for v in box]).save(output / "pages" / name)
                split = "heldout" if path.stem in HELD_OUT_DOCUMENTS else "train"
                yield split, record("pages", name, [("What is written?", text)], "page", "anls")
        document.close()


def _lines(page) -> Iterator[tuple[tuple[float, float, float, float], str]]:
    """Box (left, bottom, right, top in points) and text of every line of a page that is worth reading."""
    text_page = page.get_textpage()
    for i in range(text_page.count_rects()):
        box = text_page.get_rect(i)
        text = " ".join(text_page.get_text_bounded(*box).split())
        if 8 <= len(text) <= 80:
            yield box, text


BUILDERS: dict[str, Callable[[Places, Path], Iterator[tuple[str, Record]]]] = dict(
    emoji=emoji, stamps=stamps, charts=charts, pages=pages
)
