"""How sharp and how strong the alignment loss is before it has taught anything:
`python -m comp.studies.alignment [--recipe NAME] [--samples N] [field=value ...]`.

Temperatures and weight depend on width, vocabulary and texts. For the first batch of every stage that aligns, with the
pre-trained parts and a new adapter: the entropy of the targets, what they tell samples apart by, which word holds most of them,
the temperature that your own texts ask for (comp_kernels.temperature_for_entropy), and the gradient of the weighted loss
against that of the next-token loss. Rule of docs/ablations.md: an entropy of 1 to 2 nats, a ratio of 0.1 to 0.5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from comp_kernels import propose_temperature, temperature_for_entropy
from comp_kernels.ops.alignment_loss.reference import target_distribution, unit_rows
from comp_kernels.ops.alignment_loss.temperature import PAPER_ENTROPY

from ..build import build_model, sample_encoder, set_position_mode
from ..cli import positive_int
from ..config import AlignmentConfig, Config, ConfigError, PrototypeSource
from ..config_io import apply_overrides
from ..data.batch import Batch
from ..data.datasets import Dataset
from ..data.encode import SampleEncoder
from ..data.mixture import open_sources
from ..data.packing import EncodedSample, collate
from ..data.template import num_rows
from ..eval.vqa import usable_samples
from ..log import table
from ..model.multimodal import CoMP
from ..recipes import RECIPES
from ..train.optim import set_trainable, train_mode
from ..train.prior import count_words


@dataclass(frozen=True)
class Sharpness:
    """Of the targets [n, V] of one batch, in nats."""

    entropy: float
    """Mean over the samples."""
    information: float
    """Entropy of the mean target minus the mean entropy: what a target tells about its sample, log(n) at most."""
    top_word: int
    """The word with most of the mean target."""
    top_share: float


def sharpness(target: Tensor) -> Sharpness:
    mean = target.mean(0)
    entropies = -torch.special.xlogy(target, target).sum(-1)
    share, word = mean.max(0)
    information = -torch.special.xlogy(mean, mean).sum() - entropies.mean()
    return Sharpness(entropies.mean().item(), information.item(), int(word), share.item())


def text_scores(model: CoMP, batch: Batch, source: PrototypeSource) -> Tensor:
    """Cosines [n, V] of the texts of the samples that align with the prototypes."""
    text = model.step_text([batch])
    return unit_rows(text.features[text.valid]) @ unit_rows(model.prototypes(source).detach().float()).T


def gradients(loss: Tensor, model: CoMP) -> dict[str, Tensor]:
    """Gradient of every part as one vector; parts that do not train, or that the loss does not reach, are absent."""
    found = {}
    for part, named in model.named_parts().items():
        parameters = [p for p in named.values() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if parameters else []
        if any(grad is not None for grad in grads):
            found[part] = torch.cat([(p.new_zeros(p.shape) if g is None else g).flatten() for p, g in zip(parameters, grads)])
    return found


def force(model: CoMP, batch: Batch, settings: AlignmentConfig) -> dict[str, tuple[float, float]]:
    """Part -> (norm of the weighted alignment gradient over that of the next-token gradient, cosine of the two)."""
    output = model(batch, alignment=settings)
    token = gradients(output.token_loss_sum / output.num_tokens, model)
    aligned = gradients(settings.weight * output.alignment_loss, model)
    return {
        part: (
            (aligned[part].norm() / token[part].norm()).item(),
            torch.nn.functional.cosine_similarity(aligned[part], token[part], dim=0).item(),
        )
        for part in token
        if part in aligned
    }


def first_usable(samples: Dataset, encoder: SampleEncoder, count: int) -> list[EncodedSample]:
    """The first `count` samples that can be learned from, or as many as there are; those left out are said."""
    usable = usable_samples(samples, encoder, range(len(samples)), "skipped ")
    found = list(islice(usable, count))
    if not any(sample.grids and sample.answer_ids for sample in found):
        raise ConfigError(f"none of {len(found)} samples has an image and an answer: nothing to align")
    return found


def examine(config: Config, num_samples: int | None = None) -> tuple[list[str], list[list[str]]]:
    """(header, rows) with a row per stage that aligns. num_samples: of the batch, default a whole step."""
    torch.manual_seed(config.seed)
    model, template = build_model(config)
    aligned = [(stage, stage.alignment) for stage in config.stages if stage.alignment is not None]
    if not aligned:
        raise ConfigError("no stage of this configuration has an alignment loss")
    last, _ = aligned[-1]
    width, vocabulary = model.adapter.language_width, num_rows(template.tokenizer)
    model.set_word_counts(count_words(open_sources(last.data, config.seed), template, vocabulary))
    proposed = propose_temperature(width, vocabulary)
    header = ["stage", "mode", "epsilon", "entropy", "information", "top word", "share", "epsilon at 2.08 nats", "random"]
    header += [f"{name} {part}" for part in ("adapter", "vision") for name in ("force", "cosine")]
    rows = []
    for stage, settings in aligned:
        set_trainable(model, stage.trainable)
        train_mode(model, stage.trainable)
        set_position_mode(model, config, stage)
        encoder = sample_encoder(model, template, config, stage)
        samples = open_sources(stage.data, config.seed)
        encoded = first_usable(samples, encoder, num_samples or stage.batch_size)
        batch = collate(encoded, pad_id=template.pad_id, patch_features=encoder.patch_features)
        scores = text_scores(model, batch, settings.prototype_source)
        cells = ["-"] * 4
        if settings.mode != "contrastive":
            target = target_distribution(
                scores,
                model.word_counts if settings.prior else None,
                mode=settings.mode,
                epsilon=settings.epsilon,
                num_iters=settings.num_iters,
                prior_temperature=settings.prior_temperature,
                valid=torch.ones(len(scores), dtype=torch.bool),
                group=None,
            )
            sharp = sharpness(target)
            word = repr(template.tokenizer.decode([sharp.top_word]))
            cells = [f"{sharp.entropy:.2f}", f"{sharp.information:.2f}", word, f"{100 * sharp.top_share:.0f}%"]
        own = temperature_for_entropy(scores, min(PAPER_ENTROPY, 0.5 * torch.tensor(float(vocabulary)).log().item()))
        forces = force(model, batch, settings)
        found = [f"{value:.2f}" for part in ("adapter", "vision") for value in forces.get(part, (float("nan"),) * 2)]
        rows.append([stage.name, settings.mode, f"{settings.epsilon:g}", *cells, f"{own:.4f}", f"{proposed:.4f}", *found])
    return header, rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", choices=sorted(RECIPES))
    parser.add_argument("--samples", type=positive_int, help="of the batch (default: those of a step)")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        header, rows = examine(apply_overrides(RECIPES[options.recipe](), options.overrides), options.samples)
    except ConfigError as error:
        parser.error(str(error))
    print(table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
