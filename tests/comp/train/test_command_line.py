"""train.py as a user starts it: recipes, overrides, messages, exit codes, several processes, SIGTERM to everything."""

import errno
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from toy import toy_config

import train
from comp.eval.vqa import answer_questions
from comp.log import read_records
from comp.train.step import NonFiniteLossError

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def toy_recipe(toy_folder, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "toy", lambda: toy_config(toy_folder))
    return toy_folder


def test_a_recipe_with_overrides_runs_and_prints_its_results(toy_recipe, capsys):
    code = train.main(["--recipe", "toy", "stages.*.max_steps=1", "eval.baselines=true", "name=short"])
    printed = capsys.readouterr().out
    assert code == 0
    assert "question type  count  random  most frequent  before" in printed and "overall" in printed
    assert "4 steps, 32 samples" in printed and str(toy_recipe / "runs" / "short") in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stages.0.optim.lr=1"], "unknown field 'stages.0.optim.lr'; stages.0.optim has: lr_vision"),
        (["--recipe", "nothing"], "invalid choice: 'nothing'"),
        (["seed"], "an override looks like field=value, got 'seed'"),
    ],
)
def test_mistakes_end_with_a_message(toy_recipe, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        train.main(["--recipe", "toy", *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_what_cannot_be_loaded_is_named(toy_recipe, capsys):
    (toy_recipe / "empty").mkdir()
    assert train.main(["--recipe", "toy", f"vision.path={toy_recipe / 'empty'}"]) == 2
    assert "empty cannot be loaded: path must hold a config.json" in capsys.readouterr().err
    for part in ("vision", "language"):
        assert train.main(["--recipe", "toy", f"{part}.path=/nowhere"]) == 2
        assert "train.py: /nowhere is no folder here and, as a hub id, cannot be loaded: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("stages.0.data=[{factory: 'toy:NoLength'}]", 2, "'toy:NoLength' must return an object with __len__ and __getitem__"),
        ("stages.0.data=[{factory: 'toy:Dictionaries', arguments: {size: 8}}]", 2, "must be comp.data.batch.Sample, those of"),
        ("eval.data=[{factory: 'toy:OddMetric', arguments: {size: 8}}]", 2, "rectangle 0: metric must be one of"),
        ("stages.0.data=[{factory: 'toy:OnlyBadSamples'}]", 1, "stopped before step 1: bad "),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_mistakes_that_show_in_the_data_end_with_a_message(toy_recipe, capsys, override, code, message, num_workers):
    arguments = ["--recipe", "toy", "bad_samples=stop", "stages.*.alignment=null", f"num_workers={num_workers}"]
    with patch("comp.train.trainer.plot_run"):
        assert train.main([*arguments, *([] if "eval" in override else ["eval.data=[]"]), override]) == code
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_before_the_weights_are_loaded(toy_recipe, capsys):
    (toy_recipe / "file").touch()
    with patch("comp.train.trainer.build_model", side_effect=AssertionError("loaded the model first")):
        assert train.main(["--recipe", "toy", f"output_dir={toy_recipe}/file/runs"]) == 2
    assert f"train.py: output_dir {toy_recipe}/file/runs cannot be written: " in capsys.readouterr().err


def test_resuming_nothing_is_said(toy_recipe, capsys):
    with patch("comp.train.trainer.plot_run"):
        train.main(["--recipe", "toy", "stages.*.max_steps=1", "eval.data=[]", "--resume", "name=mistyped"])
    assert f"nothing to continue in {toy_recipe}/runs/mistyped: starting from the beginning\n" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_with_one(toy_recipe, capsys):
    def fails(*args, **kwargs):
        raise NonFiniteLossError("loss nan")

    with patch("comp.train.trainer.train_step", fails):
        assert train.main(["--recipe", "toy", "eval.data=[]"]) == 1
    assert "stopped before step 1: loss nan\nNo checkpoint was written before." in capsys.readouterr().err


def test_an_evaluation_that_asks_nothing_is_said_and_fails(toy_recipe, capsys):
    """The other evaluations keep their columns."""

    def no_room_in_the_last(model, samples, encoder, **settings):
        if encoder.max_text_tokens == 255:
            return [], ["rectangle 100: on purpose"] * len(samples)
        return answer_questions(model, samples, encoder, **settings)

    with patch("comp.train.trainer.plot_run"), patch("comp.train.trainer.answer_questions", no_room_in_the_last):
        assert train.main(["--recipe", "toy", "stages.*.max_steps=1", "stages.3.max_text_tokens=255"]) == 1
    printed = capsys.readouterr()
    (overall,) = (line.split() for line in printed.out.splitlines() if line.startswith("overall"))
    assert overall[1] == "6" and len(overall) == 7 and overall[-1] == "-" and "-" not in overall[:-1]
    assert "no held-out question could be asked in the evaluation III (rectangle 100: on purpose)" in printed.err
    said = [line for line in printed.err.splitlines() if "could not be asked" in line]
    assert any("6 questions could not be asked and do not count: rectangle 100: on purpose" in line for line in said)
    assert not any("the first:" in line for line in said), "said twice"


def test_a_finished_run_is_not_overwritten_and_may_be_resumed(toy_recipe, capsys):
    arguments = ["--recipe", "toy", "stages.*.max_steps=1", "eval.data=[]"]
    with patch("comp.train.trainer.plot_run"):
        assert train.main(arguments) == 0
        assert train.main(arguments) == 2
        assert "continue it with --resume" in capsys.readouterr().err
        assert train.main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_to_the_process_group_save_and_end(toy_folder, number, code):
    """Workers that read data get the signal too and must not take the run down; Ctrl-C may come twice at once, by torchrun."""
    program = (
        "import sys, train; from toy import toy_config; from pathlib import Path;"
        f"train.RECIPES['toy'] = lambda: toy_config(Path({str(toy_folder)!r}));"
        "sys.exit(train.main(['--recipe', 'toy', 'num_workers=1', 'stages.*.epochs=1000', 'eval.data=[]']))"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "helpers")]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = toy_folder / "runs" / "toy" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(read_records(metrics)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in output, output
    assert f"stopped on {number.name} after step" in output and "continue with --resume" in output
    steps = len(read_records(metrics, "train"))
    assert (toy_folder / "runs" / "toy" / "checkpoints" / f"step-{steps:08d}" / "progress.json").exists()


def test_a_second_interrupt_ends_at_once_without_a_traceback(toy_recipe, capsys):
    def interrupts(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        with patch("time.monotonic", return_value=time.monotonic() + 5):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored where a script runs the tests in the background
    with patch("comp.train.trainer.train_step", interrupts):
        assert train.main(["--recipe", "toy", "eval.data=[]"]) == 130
    assert "interrupted after step 0. No checkpoint was written before." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_while_models_are_loaded_is_said(toy_recipe, capsys):
    with patch("comp.train.trainer.build_model", side_effect=KeyboardInterrupt):
        assert train.main(["--recipe", "toy"]) == 130
    assert capsys.readouterr().err.endswith("train.py: interrupted before the first step\n")


def damage(checkpoint):
    """Its largest file cut in half."""
    path = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_resuming_takes_the_newest_whole_checkpoint(toy_recipe, capsys):
    """And repeats the run: the damaged one is not counted among those that are kept."""
    arguments = ["--recipe", "toy", "stages.*.max_steps=2", "eval.data=[]", "checkpoint.keep=2"]
    folder = toy_recipe / "runs" / "toy"
    with patch("comp.train.trainer.plot_run"):
        assert train.main(arguments) == 0
        before = read_records(folder / "metrics.jsonl", "train")
        names = [path.name for path in sorted((folder / "checkpoints").iterdir())]
        assert names == ["step-00000006", "step-00000008"]
        damage(folder / "checkpoints" / "step-00000008")
        (folder / "word_counts.npy").write_bytes(b"damaged as well")
        assert train.main([*arguments, "--resume"]) == 0
    said = capsys.readouterr().err
    assert "step-00000008 is damaged: " in said and f"continuing from {folder}/checkpoints/step-00000006" in said
    after = read_records(folder / "metrics.jsonl", "train")
    assert [r["loss"] for r in after] == [r["loss"] for r in before]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == names


def test_resuming_without_a_whole_checkpoint_ends_with_a_message(toy_recipe, capsys):
    arguments = ["--recipe", "toy", "stages.*.max_steps=1", "eval.data=[]"]
    with patch("comp.train.trainer.plot_run"):
        assert train.main(arguments) == 0
    (checkpoint,) = (toy_recipe / "runs" / "toy" / "checkpoints").iterdir()
    damage(checkpoint)
    assert train.main([*arguments, "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"train.py: --resume finds no whole checkpoint: checkpoint {checkpoint} is damaged: " in said
    (checkpoint / "files.json").unlink()  # as an older version wrote it: found out when it is loaded
    assert train.main([*arguments, "--resume"]) == 2
    assert f"train.py: checkpoint {checkpoint} cannot be loaded: " in capsys.readouterr().err
    (toy_recipe / "runs" / "toy" / "config.json").write_text('{"name": ')
    assert train.main([*arguments, "--resume"]) == 2
    assert "config.json cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "written", ["comp.train.checkpoint.dcp.save", "comp.train.trainer.export_model", "comp.log.MetricsLog.write"]
)
def test_a_full_disk_ends_with_one_line_that_names_the_last_good_checkpoint(toy_recipe, capsys, written):
    calls = []

    def fails(*args, **kwargs):
        calls.append(None)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    module, _, name = written.rpartition(".")
    real = getattr(pkgutil.resolve_name(module), name)
    arguments = ["--recipe", "toy", "stages.*.max_steps=2", "eval.data=[]"]
    with patch("comp.train.trainer.plot_run"), patch(written, fails):
        assert train.main(arguments) == 1
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "No space left on device" in line]
    assert len(lines) == 1 and "Traceback" not in said
    assert (
        "step-0000000" in lines[0].rpartition("last good checkpoint is ")[2] or "No checkpoint was written before" in lines[0]
    )


def test_a_disk_that_is_full_at_the_start_ends_with_one_line(toy_recipe, capsys):
    with patch("comp.train.trainer.np.save", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        assert train.main(["--recipe", "toy", "eval.data=[]"]) == 1
    said = capsys.readouterr().err
    assert "stopped before the first step: [Errno 28] No space left on device" in said and "Traceback" not in said
