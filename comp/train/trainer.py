"""The trainer: a run through its stages, with evaluation between them, checkpoints and exact resume.

Whatever is random in a step follows from (seed, stage, step, rank) and the data of a step from its number, so a checkpoint
holds the model, the optimiser and counters, and a resumed run repeats an unbroken one bit for bit on the same number of CPUs.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from comp_kernels._processor import has_fast_bfloat16

from ..build import build_model, export_model, sample_encoder, set_position_mode
from ..config import BEFORE, Config, ConfigError, StageConfig
from ..data.batch import BadSampleError
from ..data.loader import Skipped, StepData, StepDataset, StreamSteps, iterate_steps
from ..data.mixture import Mixture, check_files, open_sources
from ..data.streams import Streams, needs_lanes
from ..data.template import num_rows
from ..eval.vqa import answer_questions, blind_baselines, scores_by_type, write_predictions
from ..files import checksum, write_json
from ..log import MetricsLog, Progress, table
from ..parallel import distribute, gathered, note_trainable_changed, start_world, uses_bf16, uses_fsdp
from .checkpoint import CheckpointError, CheckpointStore
from .optim import build_optimizer, lr_multiplier, part_reports, set_learning_rates, set_trainable, train_mode
from .plots import plot_run
from .prior import count_words
from .run_state import claim_folder, find_state, is_unchanged
from .startup import Startup
from .step import StepLosses, StepTotals, seed_step, train_step
from .summary import result_table, summarize
from .work import Work, peak_flops

Measure = Callable[[Config, Path, Callable[[str], None]], dict[str, Any]]


class StopRequested(Exception):
    """SIGTERM or SIGINT (Ctrl-C) arrived; what was learned so far is saved."""


class Trainer:
    """One run of a configuration. All processes construct it and call `run`.

    measure:  called by the first process at the end of the run, with the configuration, the folder of the run and a function
              that prints a line; what it returns goes into the summary.
    """

    def __init__(self, config: Config, *, resume: bool = False, measure: Measure | None = None):
        self.config = config
        self.measure = measure
        self.world = start_world(config.device)
        self.startup = Startup(self.world.device, enabled=self.world.is_main)
        self.startup.say(f"imports done, {self.world.size} process(es) on {self.world.device.type}")
        self.folder = Path(config.output_dir) / config.name
        self.store = CheckpointStore(self.folder / "checkpoints", keep=config.checkpoint.keep, world=self.world)
        self.state, self._checkpoint = find_state(self.folder, config, self.store, resume=resume)
        if resume and self._checkpoint is None and self.world.is_main:
            print(f"nothing to continue in {self.folder}: starting from the beginning")
        self.log: MetricsLog | None = None  # of the first process, while it runs
        self._stop = False
        self.interrupted = False
        """By Ctrl-C."""
        self._started = time.monotonic() - self.state.seconds

        # data and folder first: a wrong path should not wait for the weights
        check_files([source for stage in config.stages for source in stage.data] + config.eval.data)
        self.sources = [self._open_data(stage) for stage in config.stages]
        self._check_sizes()
        if config.eval.baselines and isinstance(self.sources[-1], Streams):
            raise ConfigError("eval.baselines reads all answers of the last stage, which is a stream; set it to false")
        self.held_out = open_sources(config.eval.data, config.seed) if config.eval.data else None
        self._claim = claim_folder(self.folder, config, self.world)
        self.startup.say("data opened")
        torch.manual_seed(config.seed)
        model, self.template = build_model(config, dummy_image=uses_fsdp(config, self.world))
        self.work = Work.of(model)  # before parameters are sharded
        self.padded = model.padded_because is not None
        if self.padded and config.language.pack_rows and self.world.is_main:
            print(f"rows of text are padded: {model.padded_because}", file=sys.stderr)
        self.model = distribute(model, config, self.world)
        self.bf16 = uses_bf16(config.precision, self.world)
        if self.bf16 and self.world.device.type == "cpu" and has_fast_bfloat16() is False and self.world.is_main:
            print("precision=bf16 is slower than fp32 here: this processor has no fast products of bfloat16", file=sys.stderr)
        self.peak = peak_flops(config.peak_tflops, self.world.device, bf16=self.bf16)
        self.startup.say("models loaded")
        self.datasets = [self._open_stage(index) for index in range(len(config.stages))]
        self._set_prior()

    def run(self) -> dict[str, Any]:
        """Train all stages that are left; returns the summary (also in summary.json). Raises StopRequested after
        SIGTERM and Ctrl-C."""
        try:
            self._run_stages()
            return self._finish()
        finally:
            if self._claim is not None:
                self._claim.close()

    # --- stages and steps ----------------------------------------------------------------------------------------------------

    def _run_stages(self) -> None:
        config, state = self.config, self.state
        self.log = self._open_log() if self.world.is_main else None
        total = sum(len(dataset) for dataset in self.datasets)
        self.progress = Progress(total, state.step, enabled=self.world.is_main)
        try:
            with self._signals_ask_to_stop(), self.startup.compilations_said():
                if not state.evaluations:
                    self._evaluate(BEFORE, config.stages[0])
                for index in range(state.stage, len(config.stages)):
                    self._run_stage(index)
        finally:
            self.progress.close()
            if self.log is not None:
                self.log.close()

    def _run_stage(self, index: int) -> None:
        config, state, stage = self.config, self.state, self.config.stages[index]
        if state.stage != index:
            state.stage, state.step_in_stage, state.samples_in_stage, state.lanes = index, 0, 0, {}
        set_trainable(self.model, stage.trainable)
        note_trainable_changed(self.model)
        set_position_mode(self.model, config, stage)
        optimizer = build_optimizer(self.model, stage.optim)
        if self._checkpoint is not None:
            self.store.load(self._checkpoint, self.model, optimizer)
            self._checkpoint = None
        self._print_parts(stage)
        train_mode(self.model, stage.trainable)
        dataset = self.datasets[index]
        loaded = time.monotonic()
        ahead = iterate_steps(dataset, start=state.step_in_stage, num_workers=config.num_workers, states=state.lanes)
        with closing(ahead) as steps:
            for data in steps:
                stop = self._step(optimizer, data, begun=loaded)
                loaded = time.monotonic()
                if stop or state.step_in_stage % config.checkpoint.every_steps == 0 or state.step_in_stage == len(dataset):
                    self._save(optimizer)
                if stop:
                    raise StopRequested
        if state.samples_in_stage == 0:
            raise ConfigError(f"no sample of stage {stage.name} can be learned from; the last: {list(state.skipped)[-3:]}")
        optimizer.zero_grad(set_to_none=True)
        self._evaluate(stage.name, stage)
        if self.log is not None:
            plot_run(self.log.path, self.folder / "plots")
        self._export(stage)

    def _step(self, optimizer: torch.optim.Optimizer, data: StepData, *, begun: float) -> bool:
        """One optimiser step and its record; true when a process was asked to stop."""
        state = self.state
        stage, num_steps = self.config.stages[state.stage], len(self.datasets[state.stage])
        data_time = time.monotonic() - begun
        state.lanes.update(data.lanes)
        notes = [note for note in data.notes if note not in state.notes]
        flops = self.work.step(data.batches, stage.trainable, text_again=stage.alignment is not None)
        totals = StepTotals.gather(data, self.world, padded=self.padded, flops=flops, notes=len(notes), stop=self._stop)
        if totals.notes:
            self._say_notes(notes)
        if totals.skipped and self.config.bad_samples == "stop":
            raise BadSampleError("; ".join(bad.message for share in self.world.gather(data.skipped) for bad in share))
        if totals.tokens == 0 and totals.skipped:
            return self._skip_step(data, totals)
        seed_step(self.config.seed, state.stage, state.step_in_stage, self.world.rank)
        rates = set_learning_rates(optimizer, lr_multiplier(state.step_in_stage, num_steps, stage.optim))
        losses = train_step(self.model, optimizer, data, totals, stage, self.world, pad_id=self.template.pad_id, bf16=self.bf16)
        state.step += 1
        state.step_in_stage += 1
        state.samples += totals.samples
        state.samples_in_stage += totals.samples
        state.images += totals.images
        state.text_tokens += totals.text_tokens
        if totals.skipped:
            self._note_skipped(data.skipped)
        step_time = time.monotonic() - begun
        if self.log is not None:
            record = self._record(stage, losses, totals, lr=rates, step_time=step_time, data_time=data_time)
            self.log.write(record)
            self.progress.update(stage.name, record)
        self.startup.step_done()
        return totals.stop

    def _record(
        self,
        stage: StageConfig,
        losses: StepLosses,
        totals: StepTotals,
        *,
        lr: dict[str, float],
        step_time: float,
        data_time: float,
    ) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        record = dict(
            event="train",
            step=self.state.step,
            stage=stage.name,
            **{name: value for name, value in asdict(losses).items() if value is not None},
            lr=lr,
            tokens=totals.tokens,
            samples=totals.samples,
            images=totals.images,
            text_tokens=totals.text_tokens,
            visual_tokens=totals.visual_tokens,
            forwards=totals.num_forwards,
            step_time=step_time,
            data_time=data_time,
            images_per_s=totals.images / step_time,
            tokens_per_s=totals.text_tokens / step_time,
            padding=1 - totals.text_tokens / max(1, totals.text_slots),
        )
        if self.peak is not None:
            record["mfu"] = totals.flops / step_time / (self.peak * self.world.size)
        return record

    def _skip_step(self, data: StepData, totals: StepTotals) -> bool:
        """A step without any usable sample is named and counted; nothing is updated."""
        self.state.step += 1
        self.state.step_in_stage += 1
        self._note_skipped(data.skipped)
        self.progress.advance()
        return totals.stop

    def _note_skipped(self, skipped: list[Skipped]) -> None:
        """Count unusable samples of all processes, and say each message once: stages may have their own about one sample."""
        state = self.state
        for place, message in (bad for share in self.world.gather(skipped) for bad in share):
            if message not in state.skipped:
                self._say(f"skipped {message}", event="skipped", message=message)
            state.skipped[message] = state.skipped.get(message, 0) + 1
            state.skipped_samples[place] = state.skipped_samples.get(place, 0) + 1

    def _say_notes(self, notes: list[str]) -> None:
        """What the records of all processes hold and nobody reads, each once in the run."""
        for note in (n for share in self.world.gather(notes) for n in share):
            if note not in self.state.notes:
                self._say(note, event="note", message=note)
                self.state.notes.append(note)

    def _say(self, text: str, **record: Any) -> None:
        self.progress.print(text)
        if self.log is not None:
            self.log.write(dict(step=self.state.step, **record))

    def _print_parts(self, stage: StageConfig) -> None:
        """Which parameters train, per part: the answer to "is the vision tower training?"."""
        rows = [
            [r.part, f"{r.num_parameters:,}", f"{r.num_trainable:,}", f"{r.lr:g}" if r.num_trainable else "frozen"]
            for r in part_reports(self.model, stage.optim)
        ]
        self.progress.print(f"\nstage {stage.name}\n" + table(["part", "parameters", "trainable", "learning rate"], rows))

    # --- evaluation ----------------------------------------------------------------------------------------------------------

    def _evaluate(self, label: str, stage: StageConfig) -> None:
        """Answer the held-out questions at the stage's resolution, share by share, and record the scores."""
        if self.held_out is None:
            return
        settings, world = self.config.eval, self.world
        set_position_mode(self.model, self.config, stage)
        notes: list[str] = []
        self.startup.say(f"evaluation: {label} ({len(self.held_out)} questions)")
        with gathered(self.model), torch.autocast(world.device.type, torch.bfloat16, enabled=self.bf16):
            predictions, skipped = answer_questions(
                self.model,
                self.held_out,
                sample_encoder(self.model, self.template, self.config, stage),
                indices=range(len(self.held_out)),
                world=world,
                metric=settings.metric,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                device=world.device,
                after_batch=lambda: self._stop,
                say=notes.append,
            )
        if world.max([int(self._stop)])[0]:  # agreed on by all: no process may wait for one that left
            raise StopRequested  # the steps so far are saved, and resuming repeats the evaluation
        self._say_notes(list(dict.fromkeys(notes)))
        if skipped:
            self.progress.print(f"{len(skipped)} questions could not be asked and do not count: {skipped[0]}")
        scores = scores_by_type(predictions)
        record = dict(event="evaluation", step=self.state.step, label=label, scores=scores, skipped=skipped)
        self.state.evaluations.append({k: record[k] for k in ("label", "step", "scores", "skipped")})
        if self.log is not None:
            write_predictions(self.folder / "predictions" / f"{label}.jsonl", predictions)
            self.log.write(record)
        self.progress.print("held-out score (%)\n" + result_table(self.state.evaluations))

    # --- beginning, end, and interruptions -----------------------------------------------------------------------------------

    def _open_data(self, stage: StageConfig) -> Mixture | Streams:
        if not needs_lanes(stage.data):
            return open_sources(stage.data, self.config.seed)
        if stage.max_steps is None:
            raise ConfigError(f"stage {stage.name} reads a stream, so max_steps must say how long; its sources have no end")
        return Streams(stage.data, lanes=self.config.lanes, seed=self.config.seed)

    def _check_sizes(self) -> None:
        """Which samples a step takes follows from how many there are, so a run that goes on needs as many as it began with."""
        for index, (stage, sources) in enumerate(zip(self.config.stages, self.sources)):
            sizes = sources.sizes()
            before = self.state.sizes.setdefault(stage.name, sizes)
            if sizes != before and index >= self.state.stage:
                raise ConfigError(
                    f"--resume needs the data the run was started with; the sources of stage {stage.name} had {before} samples "
                    f"(of streams: shards) and have {sizes}"
                )

    def _open_stage(self, index: int) -> StepDataset | StreamSteps:
        config, stage = self.config, self.config.stages[index]
        sources, encoder = self.sources[index], sample_encoder(self.model, self.template, config, stage)
        shared: dict[str, Any] = dict(
            batch_size=stage.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            visual_tokens=stage.forward_visual_tokens,
            text_tokens=stage.forward_text_tokens,
            padded=self.padded,
        )
        if isinstance(sources, Streams):
            assert stage.max_steps is not None  # see _open_data
            return StreamSteps(sources, encoder, num_steps=stage.max_steps, **shared)
        return StepDataset(
            sources,
            encoder,
            epochs=stage.epochs,
            max_steps=stage.max_steps,
            seed=int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0]),
            cost=self.work.sample if config.balance else None,
            **shared,
        )

    def _set_prior(self) -> None:
        """Count the words of the last stage that uses the alignment loss (the paper's: Stage II), once per run."""
        aligned = [i for i, stage in enumerate(self.config.stages) if stage.alignment is not None]
        if not aligned:
            return
        path = self.folder / "word_counts.npy"
        rows = num_rows(self.template.tokenizer)
        counts = self._stored_counts(path, rows) if self._checkpoint is not None else None
        if counts is None:
            counts = count_words(self.sources[aligned[-1]], self.template, rows, self.world)
            if self.world.is_main:
                temporary = path.with_name(".writing-word_counts.npy")
                np.save(temporary, counts.numpy())
                temporary.rename(path)
        if self.world.is_main:
            self.state.checksums[path.name] = checksum(path)
        self.model.set_word_counts(counts)
        self.startup.say("words counted")

    def _stored_counts(self, path: Path, rows: int) -> torch.Tensor | None:
        """The counts of the run that is continued; None on every process if one cannot read them or finds them changed,
        and they are counted again."""
        try:
            stored = np.load(path) if is_unchanged(path, self.state) else None
        except (OSError, ValueError, EOFError):
            stored = None
        is_whole = stored is not None and stored.shape == (rows,) and stored.dtype == np.int64
        return torch.from_numpy(stored) if all(self.world.gather(is_whole)) else None

    def _open_log(self) -> MetricsLog:
        return MetricsLog(
            self.folder / "metrics.jsonl",
            self.folder / "tensorboard" if self.config.tensorboard else None,
            keep_bytes=self.state.metrics_bytes,
            purge_step=self.state.step + 1,
        )

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        state = self.state
        state.seconds = time.monotonic() - self._started
        dataset = self.datasets[state.stage]
        if state.lanes and isinstance(dataset, StreamSteps):
            # each process knows its own lanes; the others are as old as the start
            own = {lane: state.lanes[lane] for lane in map(str, dataset.lanes)}
            state.lanes = {lane: its for share in self.world.gather(own) for lane, its in share.items()}
        if self.log is not None:
            state.metrics_bytes = self.log.num_bytes()
            state.checksums[self.log.path.name] = checksum(self.log.path)
        self.store.save(state.step, self.model, optimizer, asdict(state))

    def _export(self, stage: StageConfig) -> None:
        """The model after a stage as Hugging Face directories: vision (with adapter) and language (with tokenizer)."""
        folder = self.folder / "models" / stage.name
        try:
            export_model(self.model, self.template, self.config, self.world, folder)
        except (OSError, SafetensorError) as error:
            good = self.store.newest_whole()
            raise CheckpointError(f"{folder} cannot be written: {error}. The last good checkpoint is {good}") from error

    def _finish(self) -> dict[str, Any]:
        config = self.config
        if not self.world.is_main:
            return {}
        baselines, train = {}, self.sources[-1]
        if config.eval.baselines and self.held_out is not None and isinstance(train, Mixture):
            baselines = blind_baselines(train, self.held_out, metric=config.eval.metric, seed=config.seed)
        summary = self._write_summary(baselines)  # the measures take long, and may fail
        if self.measure is not None:
            measured = self.measure(config, self.folder, self.progress.print)
            summary = self._write_summary(baselines, **measured)
        return summary

    def _write_summary(self, baselines: dict[str, Any], **measured: Any) -> dict[str, Any]:
        self.state.seconds = time.monotonic() - self._started
        metrics = self.folder / "metrics.jsonl"
        summary = summarize(self.config, self.state, baselines, metrics, self.world, self.model) | measured
        write_json(self.folder / "summary.json", summary)
        return summary

    @contextmanager
    def _signals_ask_to_stop(self) -> Iterator[None]:
        """SIGTERM or Ctrl-C, sent to any process, ends the run with a checkpoint after the next step; an evaluation ends at
        once. Ctrl-C a second time ends the process where it is."""
        asked = -math.inf

        def note(signum: int, frame: object) -> None:
            nonlocal asked
            if signum == signal.SIGINT:
                if time.monotonic() - asked < 1:  # torchrun passes on what the terminal has sent to all already
                    return
                if self.interrupted:
                    raise KeyboardInterrupt
                asked, self.interrupted = time.monotonic(), True
                if self.world.is_main:  # not print: the signal may have come in the middle of one
                    os.write(2, b"\nstopping with a checkpoint after this step; Ctrl-C again ends at once\n")
            self._stop = True

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
