"""Evaluations on two processes give what one gives: probes, segmentation, sweep, benchmarks."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from toy import export_toy_model, save_toy_models, toy_config

from comp.config_io import to_dict

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[3]
PROGRAMS = {
    "comp.studies.probes": "comp.studies.probes.classify",
    "comp.studies.segmentation": "comp.studies.segmentation.segment",
}


def make_data(folder):
    """Pictures with classes, pictures with annotations, and questions; numbers that two does not divide."""
    lines = []
    for number in range(9):
        colour = ("red", "blue", "white")[number % 3]
        picture = Image.new("RGB", (24 + 8 * (number % 2), 24), "black")
        ImageDraw.Draw(picture).rectangle((4, 4, 16, 16), colour)
        annotation = Image.new("L", picture.size, 1)
        ImageDraw.Draw(annotation).rectangle((4, 4, 16, 16), 2 + number % 2)
        for split, ade in (("train", "training"), ("val", "validation")):
            for path, image in (
                (folder / "classes" / split / colour, picture),
                (folder / "shapes" / "images" / ade, picture),
                (folder / "shapes" / "annotations" / ade, annotation),
            ):
                path.mkdir(parents=True, exist_ok=True)
                suffix = "jpg" if path.parent.name == "images" else "png"
                image.save(path / f"{number}.{suffix}")
        picture.save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": colour}]
        lines.append(json.dumps({"id": number, "image": f"{number}.png", "conversations": turns}))
    (folder / "mine.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{number of processes: folder of the run}, with the same four programs run on each."""
    folder = tmp_path_factory.mktemp("distributed")
    save_toy_models(folder)
    make_data(folder)
    found = {}
    for count in (1, 2):
        config = toy_config(folder, name=f"on-{count}")
        run = folder / "runs" / config.name
        (run / "models").mkdir(parents=True)
        (run / "models" / "III").symlink_to(export_toy_model(folder))
        (run / "config.json").write_text(json.dumps(to_dict(config)))
        small = ["--settings", "small", "--seeds", "2", "--device", "cpu"]
        commands = [
            ["comp.studies.probes", run, "--data", folder / "classes", "--size", "16", "--epochs", "3", *small],
            ["comp.studies.segmentation", run, "--data", folder / "shapes", "--num-classes", "3", "--crop", "16"]
            + ["--iterations", "3", "--batch-size", "3", "--channels", "4", *small],
            ["comp.studies.sweep", run, f"mine={folder}/mine.jsonl", "--caps", "4", "16", "--count", "5", "--device", "cpu"],
            ["comp.eval.evaluate", run / "models" / "III", f"mine={folder}/mine.jsonl", "--output", run / "evaluation"]
            + ["--batch-size", "2", "--max-new-tokens", "4", "--precision", "bf16", "--device", "cpu"],
        ]
        run_together(count, [[str(word) for word in command] for command in commands])
        found[count] = run
    return found


def run_together(count, commands):
    port = random.SystemRandom().randint(20000, 40000)
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "helpers")]),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "PORT": str(port),
        }
        command = [sys.executable, __file__, json.dumps(commands)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)


@pytest.mark.parametrize("name", ["probes/classes", "probes/shapes-upernet", "sweep"])
def test_tables_are_those_of_one_process(results, name):
    one, two = (json.loads((results[count] / name / "table.json").read_text()) for count in (1, 2))
    assert one == two and one["rows"]


def test_answers_are_those_of_one_process_in_order(results):
    """In bfloat16, one line per question, in the order of the file; unequal shares at the end."""
    one, two = ((results[count] / "evaluation" / "mine.jsonl").read_text().splitlines() for count in (1, 2))
    assert len(one) == 9 and one == two
    assert [json.loads(line)["name"].rpartition(" ")[2] for line in one] == [str(i) for i in range(9)]
    scores = [json.loads((results[count] / "evaluation" / "scores.json").read_text()) for count in (1, 2)]
    assert scores[0] == scores[1]


def test_the_sweep_takes_benchmarks(results):
    table = json.loads((results[2] / "sweep" / "table.json").read_text())
    assert [row[0] for row in table["rows"]] == ["mine", "overall"] and "5 held-out questions" in table["text"]


if __name__ == "__main__":
    for number, (module, *arguments) in enumerate(json.loads(sys.argv[1])):
        os.environ["MASTER_PORT"] = str(int(os.environ["PORT"]) + number)  # one that was just given up may not be free yet
        program = importlib.import_module(PROGRAMS.get(module, module))
        assert program.main(arguments) == 0
