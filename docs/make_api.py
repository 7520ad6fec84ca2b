"""Writes docs/api.md, the reference of the public names, from signatures and docstrings: `python docs/make_api.py`.

The sources are parsed, not imported, so the page depends on nothing but their text; a test holds the committed page to it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "api.md"

CHAPTERS = [
    (
        "Operators",
        "from comp_kernels import ...",
        {
            "comp_kernels/ops/rope_attention/api.py": "rope_attention",
            "comp_kernels/ops/rope_attention/tables.py": "rope_tables axial_freqs",
            "comp_kernels/ops/sinkhorn/api.py": "sinkhorn",
            "comp_kernels/ops/alignment_loss/api.py": "alignment_loss",
            "comp_kernels/ops/alignment_loss/temperature.py": "propose_temperature temperature_for_entropy",
            "comp_kernels/_backends.py": "available_backends",
        },
    ),
    (
        "Other people's models",
        "from comp_kernels.integrations import ...; from comp_kernels.layers import RopeAttention",
        {
            "comp_kernels/integrations/transformers.py": "patch_transformers register_attention",
            "comp_kernels/integrations/timm.py": "patch_timm",
            "comp_kernels/integrations/_patching.py": "unpatch UnsupportedCall",
            "comp_kernels/integrations/hyper_connections.py": "sinkhorn_knopp liger_mhc_coeffs patch_megatron unpatch_megatron",
            "comp_kernels/layers.py": "RopeAttention",
        },
    ),
    (
        "Models",
        "from comp import CoMP, VisionEncoder",
        {
            "comp/model/vision_encoder.py": "VisionEncoder",
            "comp/model/vit_config.py": "ViTConfig",
            "comp/model/adapter.py": "Adapter",
            "comp/model/multimodal.py": "CoMP CoMPOutput",
        },
    ),
    (
        "Configuration of a run",
        "from comp.config import ...",
        {
            "comp/config.py": "Config StageConfig OptimConfig AlignmentConfig SourceConfig VisionConfig LanguageConfig "
            "EvalConfig CheckpointConfig"
        },
    ),
    ("Data", "from comp.data.batch import ...", {"comp/data/batch.py": "Sample Message Batch"}),
    (
        "Evaluation",
        "from comp.eval.FILE import ...",
        {
            "comp/eval/benchmarks.py": "open_benchmark",
            "comp/eval/vqa.py": "answer_questions scores_by_type",
            "comp/eval/metrics.py": "relaxed_accuracy anls exact_match vqa_accuracy",
            "comp/eval/choices.py": "ai2d realworldqa seed mmmu mmbench",
            "comp/eval/lmms_adapter.py": "CoMPForLmmsEval",
        },
    ),
    (
        "Commands",
        None,
        dict.fromkeys(
            (
                "train.py",
                "comp/answer.py",
                "comp/eval/evaluate.py",
                "comp/studies/encoder.py",
                "comp/studies/alignment.py",
                "comp/studies/sweep.py",
                "comp/studies/probes/classify.py",
                "comp/studies/segmentation/segment.py",
                "comp/fetch/fetch.py",
                "comp/fetch/probes.py",
                "comp/studies/ablations/run.py",
                "comp/studies/report/report.py",
                "comp/tiny/pretrain.py",
                "comp_kernels/info.py",
                "comp_kernels/hf_kernels.py",
            )
        ),
    ),
]
"""(title, how the names are imported, {file: names, or None for a command, which the file's own docstring describes})"""


def page() -> str:
    """The whole of docs/api.md."""
    parts = [
        "# API reference",
        "Written by `python docs/make_api.py` from the docstrings: change those. Examples: [usage.md](usage.md).",
    ]
    chapters = [(title, imports, list(_entries(sources))) for title, imports, sources in CHAPTERS]
    for title, _, entries in chapters:
        parts.append(f"**{title}**: " + " · ".join(f"[{name}](#{_anchor(name)})" for name, _ in entries))
    for title, imports, entries in chapters:
        parts.append(f"## {title}")
        if imports:
            parts.append(f"`{imports}`")
        for name, text in entries:
            parts += [f"### {name}", text]
    return "\n\n".join(parts) + "\n"


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _entries(sources: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    """(heading, Markdown) of every documented name of a chapter."""
    for file, names in sources.items():
        tree = ast.parse((REPOSITORY / file).read_text())
        if names is None:
            yield _command(file), markdown(_docstring(tree, file), ())
            continue
        defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for name in names.split():
            node = defined[name]
            yield name, _class(node, file) if isinstance(node, ast.ClassDef) else _function(node)


def _command(file: str) -> str:
    """`python train.py`, `python -m comp.answer`; a package is run by its own name."""
    if "/" not in file:
        return f"python {file}"
    folder, _, name = file.removesuffix(".py").rpartition("/")
    entry = REPOSITORY / folder / "__main__.py"
    is_the_packages = entry.exists() and f"from .{name} import main" in entry.read_text()
    return "python -m " + (folder if is_the_packages else f"{folder}/{name}").replace("/", ".")


def _docstring(node: ast.AST, where: str) -> str:
    text = ast.get_docstring(node)
    if text is None:
        raise ValueError(f"{where} is public and has no docstring")
    return text


# --- functions and classes ---------------------------------------------------------------------------------------------------


def _function(node: ast.FunctionDef, owner: str = "") -> str:
    text = _docstring(node, f"{owner}{node.name}")
    return _signature(f"{owner}{node.name}", node) + "\n\n" + markdown(text, _parameters(node))


def _parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    named = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return [a.arg for a in (*named, arguments.vararg, arguments.kwarg) if a is not None]


def _signature(name: str, node: ast.FunctionDef) -> str:
    """name(arguments) -> result, on one line where it fits, else a line per argument."""
    arguments = node.args
    texts = []
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    texts += [_argument(a, d) for a, d in zip(positional, defaults) if a.arg not in ("self", "cls")]
    if arguments.kwonlyargs or arguments.vararg:
        texts.append("*" + (_argument(arguments.vararg, None) if arguments.vararg else ""))
    texts += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        texts.append("**" + _argument(arguments.kwarg, None))
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    line = f"{name}({', '.join(texts)}){result}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {text},\n" for text in texts) + f"){result}"
    return f"```text\n{line}\n```"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg
    if argument.annotation is not None:
        text += f": {ast.unparse(argument.annotation)}"
    if default is not None:
        text += f" = {ast.unparse(default)}" if argument.annotation is not None else f"={ast.unparse(default)}"
    return text


def _class(node: ast.ClassDef, file: str) -> str:
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    constructor = next((m for m in methods if m.name == "__init__"), None)
    names = _parameters(constructor) if constructor is not None else []
    parts = [_signature(node.name, constructor)] if constructor is not None else []
    parts.append(markdown(_docstring(node, node.name), names))
    parts += _fields(node, (REPOSITORY / file).read_text().splitlines())
    for method in methods:
        decorators = [ast.unparse(d) for d in method.decorator_list]
        public = not method.name.startswith("_") and ast.get_docstring(method) is not None
        if not public or any(d.endswith(".setter") for d in decorators):
            continue
        if "property" in decorators:
            parts.append(f"**`{node.name}.{method.name}`**: {_inline(ast.get_docstring(method))}")
        else:
            parts.append(_function(method, owner=f"{node.name}."))
    return "\n\n".join(parts)


def _fields(node: ast.ClassDef, source: Sequence[str]) -> list[str]:
    """A list of the fields of a dataclass; a field is described by the text below it, or by the comment beside it."""
    if not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return []
    lines = []
    for field, following in zip(node.body, [*node.body[1:], None]):
        if not isinstance(field, ast.AnnAssign) or ast.unparse(field.target).startswith("_"):
            continue
        default = "" if field.value is None else f" = {_default(field.value)}"
        text = source[field.end_lineno - 1][field.end_col_offset :].partition("# ")[2]
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(cleandoc(following.value.value).split())
        lines.append(
            f"- `{ast.unparse(field.target)}: {ast.unparse(field.annotation)}{default}`"
            + (f"<br>{_inline(text)}" if text else "")
        )
    return ["\n".join(lines)]


def _default(value: ast.expr) -> str:
    """field(default_factory=list) reads as list()."""
    text = ast.unparse(value)
    match = re.fullmatch(r"field\(default_factory=(\w+)\)", text)
    return f"{match[1]}()" if match else text


# --- docstrings --------------------------------------------------------------------------------------------------------------


def markdown(docstring: str, names: Sequence[str]) -> str:
    """A docstring in this project's manner as Markdown.

    Paragraphs stay paragraphs, indented blocks become code, and lines "name:  text" become list items: below "Args:" and the
    like all of them, elsewhere those whose name is a parameter. Lines that begin with "- " are list items already.
    """
    parts: list[str] = []
    lines = docstring.splitlines()
    position = 0
    while position < len(lines):
        line = lines[position]
        if not line.strip():
            position += 1
        elif re.fullmatch(r"(Args|Returns|Raises|Warns|Attributes[^:]*):", line):
            block, position = _indented(lines, position + 1)
            parts += [f"**{line}**", _items(block)]
        elif line.startswith("    "):
            block, position = _indented(lines, position)
            parts.append("```text\n" + "\n".join(block) + "\n```")
        elif _is_item(line, names):
            end = position + 1
            while end < len(lines) and (lines[end].startswith("  ") or _is_item(lines[end], names)):
                end += 1
            parts.append(_items(lines[position:end]))
            position = end
        else:
            end = position
            while (
                end < len(lines)
                and lines[end].strip()
                and not lines[end].startswith("    ")
                and not _is_item(lines[end], names)
            ):
                end += 1
            parts.append(_inline(" ".join(lines[position:end])))
            position = end
    return "\n\n".join(parts)


def _is_item(line: str, names: Sequence[str]) -> bool:
    return line.startswith("- ") or (bool(_names(line)) and all(name in names for name in _names(line)))


def _names(line: str) -> list[str]:
    """The names that a line "a, b:  text" describes."""
    match = re.match(r"(\w+(?:, \w+)*):(?:\s|$)", line)
    return match[1].split(", ") if match else []


def _indented(lines: Sequence[str], begin: int) -> tuple[list[str], int]:
    """The block of indented lines at `begin`, its indentation removed, and where it ends; empty lines inside belong to it."""
    end = begin
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
        end += 1
    block = cleandoc("\n" + "\n".join(lines[begin:end])).splitlines()
    return block, end


def _items(lines: Sequence[str]) -> str:
    """List items from lines "name:  text" with indented continuations; quoted values with their meanings make an inner list."""
    items: list[str] = []
    for line in lines:
        text = line.strip()
        value = re.match(r'("[^"]+")\s{2,}(\S.*)', text)
        if not text:
            continue
        if line.startswith(" ") and value:
            items.append(f"  - `{value[1]}`: {value[2]}")
        elif line.startswith(" ") and items:
            items[-1] += f" {text}"
        else:
            head = re.match(r"(?:- )?([\w.]+(?:, [\w.]+)*):\s+(.*)", text)
            items.append(f"- **{head[1]}**: {head[2]}" if head else f"- {text.removeprefix('- ')}")
    return "\n".join(_inline(item) for item in items)


def _inline(text: str) -> str:
    """Markdown of a line: outside of code, what Markdown or HTML would take for markup is text."""
    pieces = re.split(r"(`[^`]*`|\*\*[\w., ]+\*\*|\*\w+\*)", " ".join(text.split()) if not text.startswith("  -") else text)
    return "".join(
        piece if index % 2 else piece.replace("<", "&lt;").replace("*", r"\*").replace("__", r"\_\_")
        for index, piece in enumerate(pieces)
    )


if __name__ == "__main__":
    PAGE.write_text(page())
