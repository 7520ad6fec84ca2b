"""The examples of the documentation: Python blocks are run, commands are parsed by the programs they start."""

import argparse
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from torchvision_stub import import_timm

from train import read_command_line

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
LINKING = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted([*(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "comp_kernels").rglob("README.md")]),
]


def blocks(*languages: str):
    """(page and line, text) of every fenced block in one of `languages`."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            if match[1] in languages:
                found.append(pytest.param(match[2], id=f"{page.name}:{text[: match.start()].count(chr(10)) + 1}"))
    return found


def commands():
    """Every shell command that starts Python, with line continuations joined and comments dropped."""
    found = []
    for block in blocks("bash", "sh", "slurm", "console"):
        for number, line in enumerate(block.values[0].replace("\\\n", " ").splitlines()):
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                while command and command[0] in ("$", "srun"):
                    command = command[1:]
                program = command[0].removeprefix(".venv/bin/") if command else ""
                if program in ("python", "torchrun"):
                    found.append(pytest.param([program, *command[1:]], id=f"{block.id}+{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_example_runs(code, tmp_path, monkeypatch):
    if "import timm" in code:
        try:
            import_timm()
        except ImportError:
            pytest.skip("timm is not installed (pip install --no-deps timm)")
    if "from kernels import" in code and importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels is not installed (pip install kernels)")
    if ".lora=" in code and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed (pip install 'comp-kernels[lora]')")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


class Parsed(Exception):
    """A program has accepted its command line."""


def check_lmms_eval(arguments):
    """The harness parses with all its dependencies; what is ours are the name and the arguments of the model."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options["--model"] == "comp"
    try:
        from comp.eval.lmms_adapter import CoMPForLmmsEval
    except ImportError:
        pytest.skip("lmms-eval is not installed (pip install --no-deps lmms-eval loguru pytz)")
    model_arguments = dict(pair.split("=") for pair in options["--model_args"].split(","))
    inspect.signature(CoMPForLmmsEval).bind(**model_arguments, batch_size=options["--batch_size"])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("words", commands())
def test_command_is_understood(words, monkeypatch):
    program, *arguments = words
    if program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        script = ["-m"] * options.module + [options.training_script]
        arguments = [*script, *options.training_script_args]
    if arguments[0] == "train.py":
        read_command_line(arguments[1:])
    elif arguments[:2] == ["-m", "pytest"]:
        pytest.Config.fromdictargs({}, arguments[2:])
    elif arguments[:2] == ["-m", "lmms_eval"]:
        check_lmms_eval(arguments[2:])
    else:
        assert arguments[0] == "-m", words
        parse_args = argparse.ArgumentParser.parse_args

        def parse_and_stop(self, args=None, namespace=None):
            parse_args(self, args, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        monkeypatch.setattr(sys, "argv", arguments[1:])
        with pytest.raises(Parsed):
            runpy.run_module(arguments[1], run_name="__main__")


def anchors(page):
    """Of the headings of a page, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", prose):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


SOURCE_FILE = re.compile(r"`([\w./-]+\.(?:py|h|cpp|cu|cuh|sh))\b[^`]*`")


@pytest.mark.parametrize(
    "page", [page for page in LINKING if page.name != "log.md"], ids=lambda page: str(page.relative_to(REPOSITORY))
)
def test_files_that_are_named_exist(page):
    """But for those of an operator that is yet to be added. The log names files of other projects too."""
    folders = ("benchmarks", "comp", "comp_kernels", "csrc", "docs", "findings", "tests")
    known = [f"/{file.relative_to(REPOSITORY)}" for folder in folders for file in (REPOSITORY / folder).rglob("*.*")]
    known += [f"/{file.name}" for file in REPOSITORY.glob("*.*")]
    named = {name for name in SOURCE_FILE.findall(page.read_text()) if "NAME" not in name}
    assert not [name for name in named if not any(path.endswith(f"/{name}") for path in known)]


def test_there_are_examples():
    assert len(blocks("python")) >= 8 and len(commands()) >= 6
