"""Whole runs of a toy model: files, equality over processes, exact resume after kill -9 and SIGTERM, stops, skipped samples."""

import copy
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from toy import ColouredRectangles, toy_config
from transformers import GPT2LMHeadModel, OPTForCausalLM

import comp.train.trainer
from comp import VisionEncoder, parallel
from comp.build import build_model, sample_encoder
from comp.config import ConfigError, SourceConfig, VisionConfig
from comp.config_io import apply_overrides
from comp.data.packing import collate
from comp.log import read_records
from comp.parallel import World, compile_blocks, make_mesh, transformer_blocks
from comp.train.step import NonFiniteLossError
from comp.train.trainer import StopRequested, Trainer
from comp.train.work import Work

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[3]
HELPERS = REPOSITORY / "tests" / "helpers"
NUM_STEPS = 11  # of toy_config: 3 + 3 + 3 + 2
TIMING = ("step_time", "data_time", "images_per_s", "tokens_per_s", "mfu")  # what differs between two equal runs


def run(folder, *overrides, resume=False, plots=False):
    """A run in this process; drawing takes longer than training the toy, so it is left out where it is not asked for."""
    with nullcontext() if plots else patch("comp.train.trainer.plot_run"):
        return Trainer(apply_overrides(toy_config(folder), overrides), resume=resume).run()


def start_process(folder, *arguments, rank=0, world_size=1, port=0):
    """`toy.py` in a process of its own, one of `world_size`."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(HELPERS)]),
        "OMP_NUM_THREADS": str(torch.get_num_threads() if world_size == 1 else 1),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, str(HELPERS / "toy.py"), str(folder), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_on(count, folder, *arguments):
    port = random.SystemRandom().randint(20000, 40000)
    processes = [start_process(folder, *arguments, rank=rank, world_size=count, port=port) for rank in range(count)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)


def run_on_two(folder, *arguments):
    run_on(2, folder, *arguments)


def records(folder, name="toy"):
    """metrics.jsonl without timings."""
    return [{k: v for k, v in r.items() if k not in TIMING} for r in read_records(folder / "runs" / name / "metrics.jsonl")]


def weights(folder, name="toy", stage="III"):
    parts = ("vision", "language")
    return {
        (part, key): value
        for part in parts
        for key, value in load_file(folder / "runs" / name / "models" / stage / part / "model.safetensors").items()
    }


@pytest.fixture(scope="module")
def unbroken(toy_models):
    """The run that all others are compared with, in runs/toy beside the toy models."""
    summary = run(toy_models, "tensorboard=true", plots=True)
    return toy_models, summary


def test_a_run_leaves_its_files(unbroken):
    folder, summary = unbroken
    out = folder / "runs" / "toy"
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["steps"] == NUM_STEPS and [s["steps"] for s in summary["stages"]] == [3, 3, 3, 2]
    assert [e["label"] for e in summary["evaluations"]] == ["before", "I", "II-a", "II-b", "III"]
    assert set(summary["evaluations"][-1]["scores"]) == {"colour", "shape", "overall"}
    assert {p.name for p in (out / "plots").iterdir()} >= {
        "losses.png",
        "learning_rates.png",
        "gradient_norms.png",
        "scores.png",
    }
    assert len((out / "predictions" / "III.jsonl").read_text().splitlines()) == 6
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000011"], "the newest one is kept"
    assert any((out / "tensorboard").iterdir())
    frozen = summary["stages"][0]["parameters"]
    assert frozen["vision"]["trainable"] == frozen["language"]["trainable"] == 0 and frozen["adapter"]["trainable"] > 0


def test_stages_train_what_they_say(unbroken):
    folder, _ = unbroken
    one, two, three = (weights(folder, stage=s) for s in ("I", "II-a", "III"))
    original = load_file(folder / "language" / "model.safetensors")
    for (part, key), value in one.items():
        if part == "language" and key in original and original[key].shape == value.shape:
            assert torch.equal(value, original[key]), f"{key} is frozen in stage I"
    for a, b in ((one, two), (two, three)):
        assert all(not torch.equal(a[key], b[key]) for key in a), "every tensor moves from stage II on"
    trained = [r for r in records(folder) if r["event"] == "train"]
    assert [set(r["lr"]) for r in trained] == [{"adapter"}] * 3 + [{"vision", "adapter", "language"}] * 8
    assert all(("alignment_loss" in r) == (r["stage"] != "III") for r in trained)


@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_two_processes_equal_one(unbroken, parallel):
    """Half the batch each, text-only and mixed shares, several forward passes per step; alignment mode "sinkhorn"."""
    folder, _ = unbroken
    run_on_two(folder, f"name={parallel}", f"parallel={parallel}", "stages.*.forward_text_tokens=256")
    one = [r for r in records(folder) if r["event"] == "train"]
    two = [r for r in records(folder, parallel) if r["event"] == "train"]
    assert len(one) == len(two) == NUM_STEPS and max(r["forwards"] for r in two) > 1
    for a, b in zip(one, two):
        assert (a["tokens"], a["images"], a["samples"]) == (b["tokens"], b["images"], b["samples"])
        for name in ("loss", "token_loss", "alignment_loss"):
            if name in a:
                assert abs(a[name] - b[name]) <= 1e-5, (a["step"], name)
        for part, norm in a["grad_norm"].items():
            assert abs(norm - b["grad_norm"][part]) <= 1e-5 * max(1, norm), (a["step"], part)
    assert [r["scores"] for r in records(folder, parallel) if r["event"] == "evaluation"]
    ones, twos = ((folder / "runs" / name / "predictions" / "before.jsonl").read_text() for name in ("toy", parallel))
    assert ones == twos, "in the order of the data"
    for key, value in weights(folder).items():
        # Adam divides by gradients that may be tiny, so rounding grows in single weights
        assert torch.allclose(value, weights(folder, parallel)[key], atol=2e-3), key


def test_lora_sharded_over_two_processes_equals_one(toy_folder):
    """FSDP over frozen matrices with updates beside them; the export gathers and merges."""
    pytest.importorskip("peft", reason="pip install 'comp-kernels[lora]'")
    options = ["vision.lora={rank: 3}", "language.lora={rank: 3}", "eval.data=[]", "stages.*.max_steps=1"]
    run(toy_folder, *options, "name=one")
    run_on_two(toy_folder, *options, "name=two", "parallel=fsdp")
    one, two = (weights(toy_folder, name) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=2e-3) for key in one)
    for part in ("vision", "language"):
        a, b = (
            load_file(toy_folder / "runs" / name / "models" / "III" / "lora" / part / "adapter_model.safetensors")
            for name in ("one", "two")
        )
        assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=2e-3) for key in a)


def test_processes_with_shares_of_equal_work_equal_one(unbroken):
    """Shares differ from those by number, losses do not; padding and utilisation are recorded."""
    folder, _ = unbroken
    run_on_two(folder, "name=balanced", "balance=true", "peak_tflops=0.001", "stages.*.max_steps=2", "eval.data=[]")
    one = {(r["stage"], r["step"]): r for r in records(folder) if r["event"] == "train"}
    two = [r for r in read_records(folder / "runs" / "balanced" / "metrics.jsonl") if r["event"] == "train"]
    for r in two[:2]:
        assert abs(r["loss"] - one[r["stage"], r["step"]]["loss"]) <= 1e-5
        assert r["samples"] == one[r["stage"], r["step"]]["samples"] and r["padding"] == 0
    assert all(r["mfu"] > 0 for r in two)


def test_padding_is_recorded_and_budgets_count_it(toy_folder):
    options = ["stages.*.max_steps=1", "eval.data=[]", "stages.*.forward_text_tokens=300"]
    packed = run(toy_folder, *options, "name=packed")
    padded = run(toy_folder, *options, "name=padded", "language.pack_rows=false")
    a, b = ([r for r in records(toy_folder, name) if r["event"] == "train"] for name in ("packed", "padded"))
    assert all(r["padding"] == 0 for r in a) and all(0 < r["padding"] < 1 for r in b)
    assert sum(r["forwards"] for r in a) < sum(r["forwards"] for r in b)
    assert abs(a[0]["loss"] - b[0]["loss"]) <= 1e-5
    assert packed["stages"][0]["median_padding"] == 0 < padded["stages"][0]["median_padding"]


def test_work_of_a_step_by_hand(toy_models):
    """The toy: width 32, two layers of two heads of 16 (one of keys), MLP 64, 300 words; tower of the same sizes."""
    config = toy_config(toy_models)
    model, template = build_model(config)
    work = Work.of(model)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    words = model.language_model.get_input_embeddings().num_embeddings
    assert work.language_token == 2 * 2 * layer and work.logit_row == 2 * 32 * words
    assert work.language_pair == 4 * 32 * 2 and work.vision_pair == 4 * 32 * 2
    assert work.vision_patch == 2 * (2 * (4 * 32 * 32 + 2 * 32 * 64) + 48 * 32)
    encoder = sample_encoder(model, template, config, config.stages[2])
    samples = [encoder.encode(ColouredRectangles(2, mixed=False)[i]) for i in range(2)]
    batch = collate(samples, pad_id=0, patch_features=48)
    tower = sum(work.vision([h * w for _, h, w in s.grids]) for s in samples)
    adapter = work.visual_token * sum(s.num_visual_tokens for s in samples)
    language = work.language(len(s.input_ids) for s in samples) + batch.num_learned_tokens() * work.logit_row
    everything = ("vision", "adapter", "language")
    assert work.step([batch], everything, text_again=False) == pytest.approx(3 * (tower + adapter + language))
    again = sum(work.language([len(s.answer_ids)]) for s in samples)
    expected = tower + 2 * (adapter + language) + again
    assert work.step([batch], ("adapter",), text_again=True) == pytest.approx(expected)


def test_compiled_blocks_serve_all_sizes(toy_models):
    """Once for a block in every state of training: batches of other sizes, numbers of rows and images compile nothing anew."""
    config = toy_config(toy_models)
    model, template = build_model(config)
    expected, counter = copy.deepcopy(model), CompileCounter()
    torch._dynamo.reset()
    compile_blocks(model, backend=counter)
    encoder = sample_encoder(model, template, config, config.stages[2])
    encoded = [encoder.encode(ColouredRectangles(12)[i]) for i in range(12)]
    counts = []
    for part in (encoded[:3], encoded[3:4], encoded, encoded[5:9], encoded[2:4]):
        batch = collate(part, pad_id=0, patch_features=48)
        loss = model(batch).token_loss_sum
        torch.testing.assert_close(loss, expected(batch).token_loss_sum)
        loss.backward()
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[1:] == counts[:1] * 4, counts
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in expected.named_parameters()}


def test_a_hybrid_mesh_equals_one_process_and_checkpoints_fit_any_number(unbroken, toy_folder):
    """Two copies of the parameters over four processes, each sharded over two; then two processes that shard, then one."""
    folder, _ = unbroken
    saved = toy_folder / "runs" / "toy" / "checkpoints"
    options = ["eval.data=[]", "parallel=fsdp"]
    run_on(4, toy_folder, *options, "shard_size=2", "--sigterm-in=4")
    assert [p.name for p in saved.iterdir()] == ["step-00000005"]
    run_on(2, toy_folder, *options, "--resume", "--sigterm-in=2")
    assert [p.name for p in saved.iterdir()] == ["step-00000008"]
    run(toy_folder, *options, resume=True)
    one, mixed = ([r for r in records(f) if r["event"] == "train"] for f in (folder, toy_folder))
    assert [r["step"] for r in mixed] == [r["step"] for r in one]
    for a, b in zip(one, mixed):
        assert abs(a["loss"] - b["loss"]) <= 1e-4, a["step"]
        for part, norm in a["grad_norm"].items():
            assert abs(norm - b["grad_norm"][part]) <= 1e-3 * max(1, norm), (a["step"], part)
    with pytest.raises(ConfigError, match="shard_size must divide the number of processes, got shard_size=2 for 3"):
        make_mesh(World(rank=0, size=3, device=torch.device("cpu"), group=None), 2)


NO_DROPOUT = {  # processes draw their own
    "GPT2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "OPT": dict(dropout=0.0),
}
LAYOUTS = {
    "GPT2": (GPT2LMHeadModel, dict(n_embd=32, n_layer=2, n_head=2, n_positions=512)),
    "OPT": (
        OPTForCausalLM,
        dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_language_models_sharded_over_two(layout, toy_folder):
    """Layers that are not `.layers`, tables of positions; answers are asked for as well."""
    torch.manual_seed(0)
    language = toy_folder / "other"
    kind, sizes = LAYOUTS[layout]
    ids = dict(vocab_size=300, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    kind(kind.config_class(**sizes, **ids, **NO_DROPOUT[layout])).save_pretrained(language)
    options = [
        f"language.path={language}",
        f"language.tokenizer={toy_folder / 'language'}",
        "language.position_ids=1d",
        "activation_checkpointing=true",
        "stages.*.max_steps=1",
    ]
    run(toy_folder, *options, "name=one")
    run_on_two(toy_folder, *options, "name=two", "parallel=fsdp")
    one, two = ([r for r in records(toy_folder, name) if r["event"] == "train"] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) <= 1e-4, a["step"]
    answers = [[r["scores"] for r in records(toy_folder, name) if r["event"] == "evaluation"] for name in ("one", "two")]
    assert answers[0] == answers[1] and answers[0]


def test_a_language_model_whose_layers_are_unknown_is_refused(toy_models):
    model, _ = build_model(toy_config(toy_models))
    assert len(transformer_blocks(model)) == 4
    model.language_model._no_split_modules = None
    with pytest.raises(ConfigError, match=r"need to know the layers of Qwen2ForCausalLM.*use parallel=replicate"):
        transformer_blocks(model)


@pytest.mark.parametrize("device, tables", [("cpu", None), ("cuda", torch.bfloat16)])
def test_tables_of_words_stay_in_float32_where_their_gradients_would_be_cut(device, tables, toy_folder, monkeypatch):
    """On a CPU torch adds up the gradient of a bfloat16 table in bfloat16: from 256 equal summands on it stands still."""
    policies = {}
    for name in ("make_mesh", "register_fsdp_forward_method"):
        monkeypatch.setattr(parallel, name, lambda *arguments: None)
    monkeypatch.setattr(
        parallel, "fully_shard", lambda module, mesh, mp_policy: policies.setdefault(module, mp_policy.param_dtype)
    )
    config = toy_config(toy_folder, parallel="fsdp", precision="bf16")
    model, _ = build_model(config)
    parallel.distribute(model, config, World(rank=0, size=2, device=torch.device(device), group=object()))
    assert policies == {model: tables} | dict.fromkeys(transformer_blocks(model), torch.bfloat16)


def test_sharded_bf16_with_all_options_runs(toy_folder):
    """Stage I freezes what stage II trains: sharded gradients must change their dtype with it."""
    align = "{prototype_source: frozen, epsilon: 0.05, temperature: 0.05}"
    run_on_two(
        toy_folder,
        "parallel=fsdp",
        "precision=bf16",
        "activation_checkpointing=true",
        f"stages.*.alignment={align}",
        "stages.*.max_steps=1",
        "eval.data=[]",
    )
    train = [r for r in records(toy_folder) if r["event"] == "train"]
    assert [r["stage"] for r in train] == ["I", "II-a", "II-b", "III"]
    assert all(r["grad_norm"]["vision"] > 0 for r in train[1:])
    assert {value.dtype for value in weights(toy_folder).values()} == {torch.float32}


def test_forward_budgets_do_not_change_the_step(unbroken, toy_folder):
    """Accumulation over several forward passes, the coupled targets of "sinkhorn" included."""
    folder, _ = unbroken
    run(toy_folder, "stages.*.forward_text_tokens=256", "stages.*.max_steps=2", "eval.data=[]")
    several = [r for r in records(toy_folder) if r["event"] == "train"][:2]
    assert all(r["forwards"] > 1 for r in several)
    for a, b in zip([r for r in records(folder) if r["event"] == "train"], several):
        assert abs(a["alignment_loss"] - b["alignment_loss"]) <= 1e-5 and abs(a["loss"] - b["loss"]) <= 1e-5


def test_kill_and_resume_repeats_the_unbroken_run(unbroken, toy_folder):
    folder, _ = unbroken
    at = random.SystemRandom().randint(1, NUM_STEPS - 1)
    process = start_process(toy_folder)
    metrics = toy_folder / "runs" / "toy" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while sum(b'"train"' in line for line in metrics.read_bytes().splitlines()) < at if metrics.exists() else True:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    with metrics.open("ab") as file:
        file.write(b'{"event": "train", "st')  # as if killed while writing
    summary = run(toy_folder, resume=True)
    assert summary["steps"] == NUM_STEPS
    assert records(toy_folder) == records(folder), f"killed after step {at}"
    expected, resumed = weights(folder), weights(toy_folder)
    assert all(torch.equal(expected[key], resumed[key]) for key in expected), f"killed after step {at}"


def test_sigterm_saves_and_resume_repeats(unbroken, toy_folder, monkeypatch):
    folder, _ = unbroken
    train_step = comp.train.trainer.train_step
    calls = []

    def with_signal(*args, **kwargs):
        calls.append(None)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(comp.train.trainer, "train_step", with_signal)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested):
        run(toy_folder, "checkpoint.every_steps=1000")
    assert signal.getsignal(signal.SIGTERM) == before
    assert [p.name for p in (toy_folder / "runs" / "toy" / "checkpoints").iterdir()] == ["step-00000005"]
    run(toy_folder, "checkpoint.every_steps=1000", resume=True)
    assert records(toy_folder) == records(folder)


def test_sigterm_during_an_evaluation_ends_it(toy_folder, monkeypatch):
    generate, calls = comp.train.trainer.answer_questions, []

    def with_signal(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        calls.append(generate(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(comp.train.trainer, "answer_questions", with_signal)
    with pytest.raises(StopRequested):
        run(toy_folder)
    assert len(calls[0][0]) == 4, "one batch of four, the other two questions are left out"
    assert not records(toy_folder)


def test_non_finite_loss_stops_before_the_update(toy_folder, monkeypatch):
    train_step, seen = comp.train.trainer.train_step, {}

    def poisoned(model, *args, **kwargs):
        seen["steps"] = seen.get("steps", 0) + 1
        if seen["steps"] == 3:
            with torch.no_grad():
                model.adapter.fc2.bias[0] = float("inf")
            seen["model"] = model
            seen["before"] = {name: p.clone() for name, p in model.named_parameters()}
        return train_step(model, *args, **kwargs)

    monkeypatch.setattr(comp.train.trainer, "train_step", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"loss nan.*nothing was updated.*rectangle"):
        run(toy_folder, "eval.data=[]")
    for name, parameter in seen["model"].named_parameters():
        assert torch.equal(parameter, seen["before"][name]), name
    assert len([r for r in records(toy_folder) if r["event"] == "train"]) == 2
    assert [p.name for p in (toy_folder / "runs" / "toy" / "checkpoints").iterdir()] == ["step-00000002"]


def test_text_alone_is_legal_in_every_stage(toy_folder):
    """Forward passes and whole steps without any image, also while only the adapter trains."""
    text = "{factory: 'toy:MostlyText', arguments: {size: 16, mixed: false}}"
    options = ["stages.*.batch_size=4", "stages.*.max_steps=4", "eval.data=[]"]
    run(toy_folder, f"stages.*.data=[{text}]", *options)
    train = [r for r in records(toy_folder) if r["event"] == "train"]
    assert len(train) == 16 and any(r["images"] == 0 for r in train if r["stage"] == "I")
    for r in train:
        assert (r["grad_norm"]["adapter"] > 0) == (r["images"] > 0), "no image, nothing to learn for the adapter"


def test_bad_samples_are_counted_in_the_summary(toy_folder):
    data = [SourceConfig(factory="toy:ColouredRectangles", arguments=dict(size=8, broken=[3], mixed=False))]
    config = toy_config(toy_folder)
    config.stages = config.stages[:1]
    config.stages[0].data, config.stages[0].epochs, config.eval.data = data, 2, []
    summary = Trainer(config).run()
    assert summary["skipped"]["samples"] == 1 and summary["skipped"]["times"] == 2
    assert next(iter(summary["skipped"]["messages"])).startswith("rectangle 3: image /nowhere/broken.png: FileNotFoundError")
    assert summary["samples"] == 14
    assert len(read_records(toy_folder / "runs" / "toy" / "metrics.jsonl", "skipped")) == 1, "each is named once"

    config.name, config.stages[0].batch_size = "one-by-one", 1
    summary = Trainer(config).run()
    assert summary["samples"] == 14 and summary["steps"] == 16, "a step of one bad sample updates nothing"

    config.name, config.stages[0].data = "all-bad", [SourceConfig(factory="toy:OnlyBadSamples")]
    with pytest.raises(ConfigError, match=r"no sample of stage I can be learned from.*bad \d: on purpose"):
        Trainer(config).run()


def test_a_bad_sample_counts_once_whatever_stages_say_of_it(toy_folder):
    """Eight albums, too large for every stage in a way of its own."""
    data = "[{factory: 'toy:Albums', arguments: {size: 24, mixed: false}}]"
    summary = run(toy_folder, f"stages.*.data={data}", "stages.3.max_steps=null", "eval.data=[]")
    assert len(summary["skipped"]["messages"]) > 8
    assert summary["skipped"]["samples"] == 8 and summary["skipped"]["times"] == 4 * 8


def test_samples_beyond_the_positions_are_skipped_by_name(toy_folder):
    stage = ["stages.3.max_text_tokens=4000", "stages.3.data=[{factory: 'toy:LongAnswers', arguments: {size: 8}}]"]
    summary = run(toy_folder, *stage, "stages.*.max_steps=1", "eval.data=[]")
    messages = list(summary["skipped"]["messages"])
    assert len(messages) == summary["skipped"]["samples"] == 4
    assert all(m.startswith("rectangle ") and "positions exceed the 512 of the language model" in m for m in messages)


def test_limits_reach_the_encoder_of_every_stage(toy_folder):
    config = apply_overrides(toy_config(toy_folder), ["max_image_pixels=1234", "eval.max_new_tokens=7"])
    model, template = build_model(config)
    for stage in config.stages:
        encoder = sample_encoder(model, template, config, stage)
        limits = (encoder.images.max_image_pixels, encoder.max_positions, encoder.answer_tokens, encoder.mrope)
        assert limits == (1234, 512, 7, True)


def test_what_records_hold_and_nobody_reads_is_said_once(toy_folder, capsys):
    """In training and evaluation, in two files, over all stages."""
    for name, field in (("train", "caption"), ("held_out", "bbox")):
        turns = [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "red"}]
        lines = [json.dumps({"id": i, "conversations": turns, field: [i]}) for i in range(8)]
        (toy_folder / f"{name}.jsonl").write_text("\n".join(lines))
    run(
        toy_folder,
        f"stages.*.data=[{{path: {toy_folder}/train.jsonl}}]",
        f"eval.data=[{{path: {toy_folder}/held_out.jsonl}}]",
        "stages.*.trainable=[language]",
        "stages.*.optim.lr_language=1e-3",
    )
    expected = ['held_out.jsonl: field "bbox" is not read', 'train.jsonl: field "caption" is not read']
    summary = json.loads((toy_folder / "runs" / "toy" / "summary.json").read_text())
    assert sorted(summary["notes"]) == expected
    assert sorted(r["message"] for r in read_records(toy_folder / "runs" / "toy" / "metrics.jsonl", "note")) == expected
    printed = capsys.readouterr()
    assert all((printed.out + printed.err).count(note) == 1 for note in expected)


def test_a_stage_that_learns_nothing_ends_the_run(toy_folder):
    """Also after stages that learned, and when a checkpoint of its end is resumed."""
    options = ["stages.3.data=[{factory: 'toy:OnlyBadSamples'}]", "stages.*.max_steps=1", "eval.data=[]"]
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"no sample of stage III can be learned from.*bad \d: on purpose"):
            run(toy_folder, *options, resume=resume)
    exported = toy_folder / "runs" / "toy" / "models"
    assert (exported / "II-b").is_dir() and not (exported / "III").exists()


def test_a_run_is_not_overwritten_and_resumes_only_itself(toy_folder):
    short = ["stages.*.max_steps=1", "eval.data=[]"]
    Trainer(apply_overrides(toy_config(toy_folder), ["seed=7"]))  # never ran: its folder is free
    run(toy_folder, *short)
    with pytest.raises(ConfigError, match="holds a run already; continue it with --resume"):
        run(toy_folder, *short)
    with pytest.raises(ConfigError, match=r"these differ: seed, stages\.1\.batch_size"):
        run(toy_folder, *short, "seed=1", "stages.1.batch_size=3", resume=True)
    free = ["num_workers=1", "stages.*.forward_text_tokens=256", "eval.batch_size=3", "bad_samples=stop"]
    free += ["balance=true", "shard_size=1", "peak_tflops=1", "language.pack_rows=false", "language.attention=eager"]
    assert run(toy_folder, *short, *free, resume=True)["steps"] == 4
    (toy_folder / "runs" / "toy" / "metrics.jsonl").unlink()
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"holds checkpoints, but .* lacks metrics\.jsonl"):
            run(toy_folder, *short, resume=resume)


def test_a_folder_has_one_run_at_a_time(toy_folder):
    """The second of two cut off the records that the first had written since, which went on and ended well."""
    short = ["stages.*.max_steps=1", "eval.data=[]"]
    trainer = Trainer(apply_overrides(toy_config(toy_folder), short))
    for arguments in (short, [*short, "--resume"]):
        second = start_process(toy_folder, *arguments)
        output = second.communicate(timeout=600)[0]
        assert second.returncode == 1 and f"/runs/toy (process {os.getpid()} on " in output, output
    assert trainer.run()["steps"] == 4
    second = start_process(toy_folder, *short, "--resume")
    output = second.communicate(timeout=600)[0]
    assert second.returncode == 0, output


def test_data_that_grew_are_refused(toy_folder, monkeypatch):
    """A step's samples follow from their number: a run would go on with others, and a longer schedule."""
    path = toy_folder / "grows.jsonl"
    turns = [{"from": "human", "value": "What colour is it?"}, {"from": "gpt", "value": "red"}]
    path.write_text((json.dumps({"conversations": turns}) + "\n") * 20)
    source = f"[{{path: {path}}}]"
    options = ["eval.data=[]", "stages.*.max_steps=1", f"stages.0.data={source}", f"stages.2.data={source}"]
    assert run(toy_folder, *options)["steps"] == 4
    path.write_text(path.read_text() * 2)
    assert run(toy_folder, *options, resume=True)["steps"] == 4, "stages that are over need no data"
    with pytest.raises(ConfigError, match=r"the sources of stage I had \[40\] samples .* and have \[20\]"):
        start, step = comp.train.trainer.train_step, iter(range(3))

        def stop_in_the_second(*args, **kwargs):
            if next(step) == 1:
                signal.raise_signal(signal.SIGTERM)
            return start(*args, **kwargs)

        monkeypatch.setattr(comp.train.trainer, "train_step", stop_in_the_second)
        with pytest.raises(StopRequested):
            run(toy_folder, "name=stopped", "eval.data=[]", f"stages.0.data={source}")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
        run(toy_folder, "name=stopped", "eval.data=[]", f"stages.0.data={source}", resume=True)


def test_answers_without_text_are_skipped_by_name(toy_folder):
    source = "{factory: 'toy:Silent', arguments: {size: 24}}"
    summary = run(toy_folder, "eval.data=[]", f"stages.*.data=[{source}]", "stages.*.max_steps=2", "stages.*.batch_size=2")
    assert summary["skipped"]["samples"] > 0
    assert all("no answer is learned" in r["message"] for r in records(toy_folder) if r["event"] == "skipped")
    with pytest.raises(ConfigError, match=r"no sample of stage I can be learned from; .*no answer is learned"):
        run(toy_folder, "eval.data=[]", "name=all", "stages.*.data=[{factory: 'toy:Silent', arguments: {size: 24, every: 1}}]")


def test_wrong_paths_are_found_before_the_weights_are_loaded(toy_folder, monkeypatch):
    monkeypatch.setattr(comp.train.trainer, "build_model", lambda *args, **kwargs: pytest.fail("loaded the model first"))
    for path in ("absent.json", "absent.yaml"):
        with pytest.raises(ConfigError, match=f"data.path {path} is not a file"):
            run(toy_folder, f"stages.2.data=[{{path: {path}}}]")


def test_exported_models_load_and_start_another_run(unbroken, toy_folder):
    """models/STAGE/{vision, language} are Hugging Face directories; the adapter travels with the vision tower."""
    folder, _ = unbroken
    exported = folder / "runs" / "toy" / "models" / "II-b"
    config = toy_config(toy_folder)
    config.vision.path, config.language.path = str(exported / "vision"), str(exported / "language")
    model, template = build_model(config)
    assert model.encoder.pos_mode == "abs+rope"
    assert len(template.tokenizer) == model.language_model.get_input_embeddings().num_embeddings
    expected = weights(folder, stage="II-b")
    saved_again = {}
    model.encoder.save_pretrained(toy_folder / "vision-again")
    for key, value in load_file(toy_folder / "vision-again" / "model.safetensors").items():
        saved_again["vision", key] = value
    assert saved_again and all(torch.equal(expected[key], value) for key, value in saved_again.items())
    assert any(key.startswith("adapter.") for _, key in saved_again)


def test_the_tower_keeps_its_own_interpolation_unless_told(toy_folder):
    config = toy_config(toy_folder)
    encoder = VisionEncoder.from_pretrained(config.vision.path, abs_pos_interp="bilinear")
    encoder.save_pretrained(toy_folder / "bilinear")
    for chosen, used in ((None, "bilinear"), ("bicubic", "bicubic")):
        config.vision = VisionConfig(path=str(toy_folder / "bilinear"), abs_pos_interp=chosen)
        assert build_model(config)[0].encoder.config.abs_pos_interp == used


def test_recomputing_activations_changes_nothing(unbroken, toy_folder):
    folder, _ = unbroken
    run(toy_folder, "activation_checkpointing=true", "eval.data=[]")
    recomputed = [r for r in records(toy_folder) if r["event"] == "train"]
    expected = [r for r in records(folder) if r["event"] == "train"]
    assert [r["loss"] for r in recomputed] == [r["loss"] for r in expected]


def test_bf16_stays_close(unbroken, toy_folder):
    folder, _ = unbroken
    run(toy_folder, "precision=bf16", "eval.data=[]")
    low = [r for r in records(toy_folder) if r["event"] == "train"]
    full = [r for r in records(folder) if r["event"] == "train"]
    assert all(abs(a["token_loss"] - b["token_loss"]) < 0.1 for a, b in zip(low, full))
    assert abs(low[0]["alignment_loss"] - full[0]["alignment_loss"]) < 0.1, "the alignment loss is not computed in bf16"
    assert {value.dtype for value in weights(toy_folder).values()} == {torch.float32}


def test_bf16_says_where_the_processor_has_no_fast_products_for_it(toy_folder, tmp_path, monkeypatch, capsys):
    said = "slower than fp32 here"
    intel = "GenuineIntel\nflags : fpu avx512_bf16"
    slow = {"AuthenticAMD\nflags : fpu avx2": True, "AuthenticAMD\nflags : fpu avx512_bf16": False, None: False}
    for number, (vendor, is_slow) in enumerate((slow | {intel: True, f"{intel} amx_bf16": False}).items()):
        info = tmp_path / "cpuinfo"
        info.unlink(missing_ok=True)
        if vendor:
            info.write_text(f"processor : 0\nvendor_id : {vendor}\n")
        monkeypatch.setattr("comp_kernels._processor.CPU_INFO", info)
        for precision in ("bf16", "fp32"):
            overrides = [f"precision={precision}", f"name={precision}-{number}"]
            Trainer(apply_overrides(toy_config(toy_folder), overrides), resume=False)
            assert (said in capsys.readouterr().err) == (is_slow and precision == "bf16")


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Parquet shards with the pictures of the toy, a bad row among them; an override that reads them."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("stream")
    for shard in range(4):
        rows = []
        for number in range(6):
            picture, sample = io.BytesIO(), ColouredRectangles(24, mixed=False)[6 * shard + number]
            sample.messages[0].images[0]().save(picture, "png")
            turns = [{"user": m.text, "assistant": a.text} for m, a in [sample.messages]]
            rows.append(dict(images=[{"bytes": picture.getvalue(), "path": None}], texts=turns))
        if shard == 0:
            rows[2]["images"] = [{"bytes": b"no picture", "path": None}]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{shard}.parquet")
    rectangles = "{factory: 'toy:ColouredRectangles', arguments: {size: 24}, weight: 1}"
    return f"stages.*.data=[{{path: '{folder}/*.parquet', shuffle: 3, weight: 2}}, {rectangles}]"


def test_a_streamed_run_resumes_exactly_and_on_other_processes(stream, toy_folder, monkeypatch):
    """Killed within a stage; records and weights are those of the unbroken run, also on two processes that go on from one."""
    options = [stream, "stages.*.max_steps=3", "lanes=4", "eval.data=[]"]
    summary = run(toy_folder, *options)
    assert summary["steps"] == 12 and summary["skipped"]["samples"] >= 1
    assert any("no image format" in message for message in summary["skipped"]["messages"])
    train_step, calls = comp.train.trainer.train_step, []

    def failing(*args, **kwargs):
        calls.append(None)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return train_step(*args, **kwargs)

    for name in ("again", "two"):
        calls.clear()
        monkeypatch.setattr(comp.train.trainer, "train_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(toy_folder, *options, f"name={name}")
        monkeypatch.setattr(comp.train.trainer, "train_step", train_step)
    run(toy_folder, *options, "name=again", "num_workers=2", resume=True)
    assert records(toy_folder, "again") == records(toy_folder)
    expected, resumed = weights(toy_folder), weights(toy_folder, "again")
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    run_on_two(toy_folder, *options, "name=two", "--resume")
    for a, b in zip(records(toy_folder), records(toy_folder, "two")):
        if a["event"] == "train":
            assert abs(a["loss"] - b["loss"]) <= 1e-4 and a["samples"] == b["samples"], a["step"]
    first = Path(stream.split("'")[1]).with_name("0.parquet")
    more = shutil.copy(first, first.with_name("more.parquet"))
    with pytest.raises(ConfigError, match=r"the sources of stage III had \[4, 24\] .* and have \[5, 24\]"):
        run(toy_folder, *options, resume=True)
    more.unlink()


def test_streams_that_cannot_be_trained_on_are_refused(stream, toy_folder):
    with pytest.raises(ConfigError, match="stage III reads a stream, so max_steps must say how long"):
        run(toy_folder, stream, "stages.*.max_steps=3", "stages.3.max_steps=null")
    with pytest.raises(ConfigError, match=r"eval\.baselines reads all answers of the last stage"):
        run(toy_folder, stream, "stages.*.max_steps=3", "eval.baselines=true")
