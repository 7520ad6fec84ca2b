"""A page as a list of blocks, written twice: HTML in one file with its pictures inside, and Markdown beside picture files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Facts:
    """A few headline figures: (value, what it is)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """First column left, the others right; the last row may be a total."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: bool = False


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str = ""


@dataclass(frozen=True)
class Example:
    """One question: pictures, question, accepted answers, and (label, answer, score in [0, 1]) per evaluation."""

    pictures: Sequence[Path]
    question: str
    answers: Sequence[str]
    predictions: Sequence[tuple[str, str, float]]


@dataclass(frozen=True)
class Gallery:
    examples: Sequence[Example]


Block = Heading | Text | Facts | Table | Picture | Gallery

STYLE = """
:root { --ink: #1c2733; --soft: #5b6b7b; --line: #dde3ea; --tint: #f5f7fa; --good: #1a7f4b; --bad: #b3383f; --mark: #2f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf0; --soft: #9aa8b6; --line: #33404d; --tint: #1d2730; --good: #5cc28b; --bad: #ef8389; --mark: #7fb4ea; }
  body { background: #141b22; } img { background: #fff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 68rem; color: var(--ink);
       font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { margin: 2.8rem 0 .8rem; font-size: 1.3rem; } h3 { margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0 1rem; color: var(--soft); max-width: 46rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.facts div { flex: 1 1 9rem; background: var(--tint); border-radius: .6rem; padding: .8rem 1rem;
             color: var(--soft); font-size: .85rem; }
.facts b { display: block; font-size: 1.5rem; color: var(--ink); font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
td.prose { white-space: normal; min-width: 11rem; }
tr.total td { border-top: 2px solid var(--ink); font-weight: 600; }
figure { margin: 1rem 0; } figure img { max-width: 100%; border-radius: .4rem; }
figcaption { color: var(--soft); font-size: .88rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; display: flex; flex-direction: column; }
.card .images { background: var(--tint); padding: .7rem; text-align: center; min-height: 9rem; display: flex;
                align-items: center; justify-content: center; gap: .5rem; flex-wrap: wrap; }
.card img { max-width: 100%; min-height: 4rem; max-height: 13rem; }
.card .words { padding: .7rem .9rem .9rem; }
.card .question { font-weight: 600; } .card .answer { color: var(--soft); margin-bottom: .4rem; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0; font-size: .9rem; }
.card dt { color: var(--soft); } .card dd { margin: 0; overflow-wrap: anywhere; }
dd.good::before { content: "\\2713\\00a0"; } dd.bad::before { content: "\\2717\\00a0"; }
.good { color: var(--good); } .bad { color: var(--bad); }
"""


def write_page(blocks: Sequence[Block], title: str, folder: Path, name: str) -> tuple[Path, Path]:
    """Write folder/name.html and folder/name.md; returns both. Picture files must lie below `folder`."""
    pages = folder / f"{name}.html", folder / f"{name}.md"
    body = "\n".join(_html(block) for block in blocks)
    pages[0].write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n<body>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )
    pages[1].write_text("\n\n".join(_markdown(block, folder) for block in blocks) + "\n", encoding="utf-8")
    return pages


def _html(block: Block) -> str:
    escape = html.escape
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Facts(items):
            return '<div class="facts">' + "".join(f"<div><b>{escape(v)}</b>{escape(n)}</div>" for v, n in items) + "</div>"
        case Table(header, rows, total):
            lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
            for number, row in enumerate(rows):
                css = ' class="total"' if total and number == len(rows) - 1 else ""
                cells = (f"<td{_wrapping(cell)}>{escape(cell)}</td>" for cell in row)
                lines.append(f"<tr{css}>" + "".join(cells) + "</tr>")
            return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"
        case Picture(path, caption):
            return f"<figure>{_image(path, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        case Gallery(examples):
            return '<div class="gallery">' + "\n".join(_card(example) for example in examples) + "</div>"


def _wrapping(cell: str) -> str:
    """Words may go over several lines; figures stay on one."""
    return ' class="prose"' if len(cell) > 24 else ""


def _card(example: Example) -> str:
    escape = html.escape
    pictures = "".join(_image(path, "") for path in example.pictures)
    answers = " / ".join(dict.fromkeys(example.answers))
    rows = "".join(
        f'<dt>{escape(label)}</dt><dd class="{"good" if score >= 0.5 else "bad"}">{escape(text) or "(nothing)"}</dd>'
        for label, text, score in example.predictions
    )
    return (
        f'<div class="card"><div class="images">{pictures}</div><div class="words">'
        f'<div class="question">{escape(example.question)}</div><div class="answer">answer: {escape(answers)}</div>'
        f"<dl>{rows}</dl></div></div>"
    )


def _image(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Facts(items):
            return "\n".join(f"- **{value}** {name}" for value, name in items)
        case Table(header, rows, _):
            cells = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
        case Picture(path, caption):
            return f"![{caption}]({path.relative_to(folder).as_posix()})"
        case Gallery(examples):
            return "\n\n".join(_markdown_example(example, folder) for example in examples)


def _markdown_example(example: Example, folder: Path) -> str:
    pictures = " ".join(f"![]({path.relative_to(folder).as_posix()})" for path in example.pictures)
    lines = [f"- {label}: {text or '(nothing)'} ({100 * score:.0f}%)" for label, text, score in example.predictions]
    answers = " / ".join(dict.fromkeys(example.answers))
    return f"{pictures}\n\n**{example.question}** ({answers})\n\n" + "\n".join(lines)
