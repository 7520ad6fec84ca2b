"""The paper's Table 2 in small: what is a frozen tower worth to a language model that learns to read it?

The tower stays as it is; a new adapter and the language model that the run started from learn for a fixed number of steps, the
same samples in the same order for every tower (CoMP, arXiv 2503.18931v2, Table 2 and Table 12). The measure is the mean
next-token loss of the reference answers to held-out questions.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import closing

import torch

from ..build import build_model, sample_encoder, set_position_mode
from ..config import Config, ConfigError
from ..data.loader import StepDataset, iterate_steps
from ..data.mixture import open_sources
from ..data.streams import is_stream
from ..eval.vqa import answer_loss, usable_samples
from ..model import Adapter, VisionEncoder
from ..parallel import ALONE
from ..train.optim import build_optimizer, lr_multiplier, set_learning_rates, set_trainable, train_mode
from ..train.step import StepTotals, seed_step, train_step

STEPS = 100
READERS = ("adapter", "language")
"""The parts that learn."""


def check_readers(config: Config) -> None:
    """ConfigError where readers cannot learn as a run did: its last stage reads a stream, or no stage has a rate for their
    parts."""
    last = config.stages[-1]
    if any(map(is_stream, last.data)):
        raise ConfigError(f"readers of frozen towers learn from the data of stage {last.name}, which has a stream")
    for part in READERS:
        if not any(stage.optim.lr(part) for stage in config.stages):
            raise ConfigError(f"readers of frozen towers need a rate for the {part}, and no stage has an optim.lr_{part}")


def reading_config(config: Config, tower: VisionEncoder, steps: int) -> Config:
    """`config` with one stage in place of its own: the data and sizes of the last one, a frozen tower with its own positions,
    and the highest rates that adapter and language model have in any stage."""
    check_readers(config)
    last = config.stages[-1]
    adapter, language = (max(stage.optim.lr(part) for stage in config.stages) for part in READERS)
    mode = tower.pos_mode
    stage = dataclasses.replace(
        last,
        name="reading",
        trainable=READERS,
        rope=mode != "abs",
        max_steps=steps,
        optim=dataclasses.replace(last.optim, lr_vision=0.0, lr_adapter=adapter, lr_language=language),
        alignment=None,
    )
    vision = dataclasses.replace(config.vision, pos_mode=config.vision.pos_mode if mode == "abs" else mode)
    held_out = dataclasses.replace(config.eval, encoder=())  # names stages that are gone
    return dataclasses.replace(config, vision=vision, stages=[stage], eval=held_out)


def reading_loss(
    config: Config, tower: VisionEncoder, *, steps: int = STEPS, seed: int = 0, num_questions: int | None = None
) -> float:
    """Nats per learned token of the held-out answers after `steps` steps.

    tower:  is not changed, and its adapter, if it has one, not used.
    seed:   of the new adapter and of the order of the samples.

    Samples that cannot be used are left out, and said.
    """
    config = reading_config(config, tower, steps)
    stage = config.stages[0]
    torch.manual_seed(seed)  # for word embeddings that the template adds
    model, template = build_model(config, encoder=copy.deepcopy(tower))
    torch.manual_seed(seed)  # for the adapter: the same for every tower of one width
    model.encoder.adapter = Adapter(
        tower.config.width, model.adapter.language_width, merge_size=tower.config.merge_size, init=config.vision.adapter_init
    )
    set_trainable(model, stage.trainable)
    set_position_mode(model, config, stage)
    optimizer = build_optimizer(model, stage.optim)
    encoder = sample_encoder(model, template, config, stage)
    samples = open_sources(stage.data, config.seed)
    dataset = StepDataset(
        samples,
        encoder,
        batch_size=stage.batch_size,
        epochs=max(1.0, steps * stage.batch_size / len(samples)),  # as often as the steps need
        max_steps=steps,
        seed=seed,
        visual_tokens=stage.forward_visual_tokens,
        text_tokens=stage.forward_text_tokens,
    )
    train_mode(model, stage.trainable)
    with closing(iterate_steps(dataset, start=0, num_workers=config.num_workers)) as prepared:
        for data in prepared:
            totals = StepTotals.gather(data, ALONE, stop=False)
            if totals.tokens == 0:
                continue
            seed_step(seed, 0, data.step, 0)
            set_learning_rates(optimizer, lr_multiplier(data.step, len(dataset), stage.optim))
            train_step(model, optimizer, data, totals, stage, ALONE, pad_id=template.pad_id, bf16=False)
    held_out = open_sources(config.eval.data, config.seed)
    count = min(num_questions or len(held_out), len(held_out))
    usable = usable_samples(held_out, encoder, range(count), "left out of the reading loss: ")
    return answer_loss(model, usable, encoder, batch_size=config.eval.batch_size)
