"""CoMP: vision encoder, adapter and a transformers causal language model as one multimodal model (arXiv 2503.18931).

Shape suffixes:
    B  samples   L  text tokens of a row   E  language width   N  patches   D  vision width   M  images
    V  visual tokens of all images, N / merge_size^2       T  text tokens of all rows, without padding
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from comp_kernels import alignment_loss

from ..config import AdapterInit, AlignmentConfig, PositionIds, PrototypeSource, need_choice
from ..files import write_json
from .adapter import Adapter
from .causal_lm import evaluation_mode, load_language_model, split, word_embeddings
from .folder import read_object
from .generation import ALONE, continue_rows, plain_config, rows_together, sharing_of
from .lean_layers import make_lean
from .lora import has_lora, merged_state, save_adapter, updates_words_apart
from .losses import (
    Head,
    Learned,
    chunked_alignment_loss,
    contrastive_loss,
    mean_by_segment,
    next_token_loss,
)
from .mrope import install_mrope, mrope_position_ids
from .packed_rows import Rows, allow_packing, attention_mask_for_packed, shorten_last_layer
from .row_sizes import with_slack, without_slack
from .vision_encoder import VisionEncoder
from .weights import MODELING_FILE

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from ..data.batch import Batch

Grid = tuple[int, int, int]
SETTINGS_FILE = "config.json"
OLD_SETTINGS_FILE = "comp.json"
"""Of models that were saved before transformers could read them."""
AUTO_CLASSES = {"AutoConfig": "CompConfig", "AutoModelForImageTextToText": "CompForConditionalGeneration"}


@dataclass
class CoMPOutput:
    """Losses of one batch. Divide `token_loss_sum` by the number of learned tokens of the *global* batch."""

    token_loss_sum: Tensor
    """Float32 scalar: sum of the next-token losses of this batch."""
    num_tokens: int
    """Learned tokens of this batch."""
    alignment_loss: Tensor | None
    """Float32 scalar: mean over the samples of the whole group; its gradient is that of the local rows, to be *summed* over
    the ranks. None where no alignment loss was asked for."""
    num_aligned: int = 0
    """Samples of this batch in the alignment loss: those with an image and an answer."""


@dataclass
class StepText:
    """Text side of the alignment loss of all batches of an optimiser step, so that targets couple the samples of all.

    Where there are several, the alignment loss of one batch has log(choices) in place of each loss of the other batches' rows:
    over M batches the sum of the values minus (M - 1) * log(choices) is the loss of the step. The choices are the words of the
    vocabulary, in mode "contrastive" the valid texts of the step.
    """

    features: Tensor
    """[n, E] pooled texts of all samples of this process."""
    valid: Tensor
    """[n] bool: samples with an image and an answer."""
    begin: int = 0
    """Row of `features` where the batch at hand begins."""


class CoMP(nn.Module):
    """The multimodal model.

    Args:
        encoder:  a VisionEncoder. Its adapter is used where it has one that fits, else a new one is put there.
        language_model:  any transformers causal language model whose decoder takes `inputs_embeds`.
        image_token_id:  the placeholder in input_ids; an image of grid (t, h, w) has t * h * w / merge_size^2 of them in a
            run.
        position_ids:  "mrope": image tokens carry (time, row, column), identical to "1d" for text (comp.model.mrope); or
            "1d".
        adapter_init:  of a new adapter, "lecun" or "truncated" (comp.model.Adapter).
        dummy_image:  let batches without images push one block of zeros through encoder and adapter, times zero. Every rank
            then touches the same parameters whatever its batch holds, as DDP and FSDP need. Off by default: such a batch
            costs nothing in the vision tower.
        pack_rows:  let the language model's decoder read the rows of a batch one after the other without padding, where it
            can (comp.model.packed_rows). `padded_because` says why it cannot or may not, None where it does.
        text_start:  ids that stand before every text the language model knows (<s>, <bos>), hence before those of the
            alignment loss, of whose features they are no part. Prompts and conversations have them already.

    Parts: `encoder` (which holds `adapter`) and `language_model`; `named_parts` partitions the parameters.
    """

    word_counts: Tensor | None
    frozen_prototypes: Tensor | None
    learned_prototypes: nn.Parameter | None

    def __init__(
        self,
        encoder: VisionEncoder,
        language_model: PreTrainedModel,
        *,
        image_token_id: int,
        position_ids: PositionIds = "mrope",
        adapter_init: AdapterInit = "lecun",
        dummy_image: bool = False,
        pack_rows: bool = True,
        text_start: Sequence[int] = (),
    ) -> None:
        super().__init__()
        words = word_embeddings(language_model)
        width, vocabulary = words.embedding_dim, words.num_embeddings
        if not 0 <= image_token_id < vocabulary:
            raise ValueError(f"image_token_id must be a row of the {vocabulary} word embeddings, got {image_token_id}")
        need_choice("position_ids", position_ids, get_args(PositionIds))
        if encoder.adapter is None:
            encoder.adapter = Adapter(encoder.config.width, width, merge_size=encoder.config.merge_size, init=adapter_init)
            encoder.adapter.to(encoder.patch_embed.weight.device, encoder.patch_embed.weight.dtype)
        if encoder.adapter.language_width != width:
            raise ValueError(
                f"the encoder's adapter makes tokens of width {encoder.adapter.language_width}, the language model has "
                f"{width}; set encoder.adapter = None to start a new one"
            )
        self.encoder = encoder
        self.language_model = language_model
        self.image_token_id = image_token_id
        self.dummy_image = dummy_image
        self.text_start = text_start
        self.mrope = position_ids == "mrope"
        self._halves = split(language_model)
        self.padded_because = allow_packing(language_model, self._halves) if pack_rows else "pack_rows is false"
        self._shortened = self.padded_because is None and shorten_last_layer(language_model, self._halves)
        make_lean(language_model)
        self._sharing: str | None = None  # asked of the language model when a batch is answered
        if self.mrope:
            install_mrope(self._decoder)
        self.register_buffer("word_counts", None, persistent=False)
        self.register_buffer("frozen_prototypes", None)
        self.register_parameter("learned_prototypes", None)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, dtype: torch.dtype | None = None) -> CoMP:
        """Load what save_pretrained wrote, in evaluation mode. dtype: of the parameters, default that of the files.

        Raises ValueError with path and cause for a folder that is not what save_pretrained wrote, or is damaged.
        """
        folder = Path(folder)
        path = next((folder / name for name in (SETTINGS_FILE, OLD_SETTINGS_FILE) if (folder / name).is_file()), None)
        if path is None or not (folder / "vision").is_dir():
            raise ValueError(f"folder must hold {SETTINGS_FILE}, vision/ and language/ as save_pretrained writes, got {folder}")
        stored = read_object(path)
        image_token_id, position_ids = stored.get("image_token_id"), stored.get("position_ids")
        if not isinstance(image_token_id, int) or position_ids is None:
            got = f"image_token_id {image_token_id!r} and position_ids {position_ids!r}"
            raise ValueError(f"{path} must hold image_token_id (a number) and position_ids, got {got}")
        encoder = VisionEncoder.from_pretrained(folder / "vision", dtype=dtype)
        language_model = load_language_model(folder / "language", dtype or "auto")
        return cls(encoder, language_model, image_token_id=image_token_id, position_ids=position_ids).eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `folder`/vision (the encoder with its adapter) and `folder`/language, what joins them in config.json, and
        modeling_comp.py, so that transformers alone runs the whole:
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True). LoRA's updates are merged in both and
        stand by themselves in `folder`/lora.

        Tokenizer and processor are comp.build.save_processor's."""
        folder = Path(folder)
        self.encoder.save_pretrained(folder / "vision")
        merged = merged_state(self.language_model) if has_lora(self.language_model) else None
        self.language_model.save_pretrained(folder / "language", state_dict=merged)
        if updates_words_apart(self.language_model):
            path = folder / "language" / "config.json"
            write_json(path, read_object(path) | {"tie_word_embeddings": False})
        for part, module in (("vision", self.encoder), ("language", self.language_model)):
            if has_lora(module):
                save_adapter(module, folder / "lora" / part)
        settings = dict(
            model_type="comp",
            architectures=["CompForConditionalGeneration"],
            auto_map={name: f"{MODELING_FILE.stem}.{cls}" for name, cls in AUTO_CLASSES.items()},
            image_token_id=self.image_token_id,
            position_ids="mrope" if self.mrope else "1d",
            vision_config=read_object(folder / "vision" / "config.json"),
            text_config=read_object(folder / "language" / "config.json"),
        )
        write_json(folder / SETTINGS_FILE, settings)
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)

    @property
    def adapter(self) -> Adapter:
        assert self.encoder.adapter is not None  # from the beginning on
        return self.encoder.adapter

    @property
    def _decoder(self) -> nn.Module:
        return self._halves.decoder_of(self.language_model)

    def named_parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Every parameter in exactly one of "vision", "adapter" and "language", by name."""
        parts: dict[str, dict[str, nn.Parameter]] = {"vision": {}, "adapter": {}, "language": {}}
        for name, parameter in self.named_parameters():
            part = "language" if name.startswith("language_model.") else "vision"
            with_adapter = name.startswith("encoder.adapter.") or name == "learned_prototypes"
            parts["adapter" if with_adapter else part][name] = parameter
        return parts

    def set_word_counts(self, counts: Tensor) -> None:
        """Prior of the alignment loss: how often each vocabulary item occurs in the corpus, [vocabulary]."""
        words = word_embeddings(self.language_model).weight
        if counts.shape != words.shape[:1]:
            raise ValueError(f"counts must have one entry per word embedding, ({len(words)},), got {tuple(counts.shape)}")
        self.word_counts = counts.to(words.device)

    def freeze_prototypes(self, source: PrototypeSource = "embed_tokens") -> None:
        """Keep a copy of today's prototypes for prototype_source "frozen"; saved with the model's state."""
        self.frozen_prototypes = self.prototypes(source).clone()

    def learn_prototypes(self) -> None:
        """Make the vectors of prototype_source "learned": one per word, in random directions. They train with the adapter and
        are kept in checkpoints, not in what `save_pretrained` writes."""
        self.learned_prototypes = nn.Parameter(torch.randn_like(self.prototypes("embed_tokens")))

    def prototypes(self, source: PrototypeSource) -> Tensor:
        """Prototypes of the alignment loss, [vocabulary, E]: word embeddings, detached, or the learned vectors."""
        if source == "embed_tokens":
            return word_embeddings(self.language_model).weight.detach()
        if source == "lm_head":
            return self.language_model.get_output_embeddings().weight.detach()
        if source == "frozen":
            if self.frozen_prototypes is None:
                raise ValueError('prototype_source "frozen" needs a call of freeze_prototypes first')
            return self.frozen_prototypes
        if source == "learned":
            if self.learned_prototypes is None:
                raise ValueError('prototype_source "learned" needs a call of learn_prototypes first')
            return self.learned_prototypes
        raise ValueError(f"prototype_source must be one of {get_args(PrototypeSource)}, got {source!r}")

    def forward(
        self,
        batch: Batch,
        *,
        alignment: AlignmentConfig | None = None,
        group: dist.ProcessGroup | None = None,
        step_text: StepText | None = None,
        per_sample: bool = False,
    ) -> CoMPOutput:
        """Losses of a batch; every mix of text-only, one-image and several-image samples is legal, and no image at all.

        Args:
            alignment:  also compute the alignment loss with these settings (comp.config.AlignmentConfig; its weight is not
                applied here). All ranks of `group` must then call, each with its share of the global batch.
            step_text:  where this batch is one of several of an optimiser step: the text side of all of them (StepText).
            per_sample:  sum the mean token losses of the samples in place of the losses of their tokens.

        Raises ValueError where placeholders and images do not match, with the counts.
        """
        token_grids = self.token_grids(batch)
        if alignment is not None and step_text is None:
            step_text = self.step_text([batch])
        visual_VE = self.visual_tokens(batch)
        learned = Learned.of(batch.labels, batch.attention_mask, per_sample=per_sample)
        hidden_nE = self.decode(batch, visual_VE, token_grids, learned.predictors)
        loss_sum = next_token_loss(hidden_nE, learned, self.head())
        num_tokens = len(learned.targets)
        output = CoMPOutput(token_loss_sum=loss_sum, num_tokens=num_tokens, alignment_loss=None)
        if alignment is not None and step_text is not None:
            output.alignment_loss = self.align(visual_VE, token_grids, step_text, alignment, group)
            output.num_aligned = batch.num_aligned_rows()
        return output

    def token_grids(self, batch: Batch) -> list[list[Grid]]:
        """Per sample, the grids (t, h, w) of its images counted in merged tokens; checked against the placeholders."""
        merge_size = self.encoder.config.merge_size
        grids: list[list[Grid]] = [[] for _ in batch.input_ids]
        image_sample = batch.image_sample.tolist()
        if len(image_sample) != len(batch.grid_thw) or image_sample != sorted(image_sample):
            raise ValueError(
                f"image_sample must give each of the {len(batch.grid_thw)} images of grid_thw its row of input_ids, "
                f"never decreasing, got {image_sample}"
            )
        for (t, h, w), sample in zip(batch.grid_thw.tolist(), image_sample):
            grids[sample].append((t, h // merge_size, w // merge_size))
        placeholders = (batch.input_ids == self.image_token_id).sum(1).tolist()
        for sample, (found, images) in enumerate(zip(placeholders, grids)):
            needed = sum(t * h * w for t, h, w in images)
            if found != needed:
                raise ValueError(
                    f"input_ids row {sample} has {found} placeholders (id {self.image_token_id}) but its {len(images)} images "
                    f"make {needed} visual tokens: {images} as (frames, rows, columns)"
                )
        return grids

    def visual_tokens(self, batch: Batch) -> Tensor:
        """Adapter outputs of all images of the batch, [V, E]; no rows for a batch without images."""
        pixel_values, grid_thw = batch.pixel_values, batch.grid_thw
        is_dummy = len(grid_thw) == 0
        if is_dummy and not self.dummy_image:
            # no rows through the adapter: costs nothing, and the loss can be differentiated where only the adapter trains
            return self.adapter(self.adapter.norm.weight.new_zeros(0, self.encoder.config.width))
        if is_dummy:
            side = self.encoder.config.merge_size
            pixel_values = pixel_values.new_zeros(side * side, self.encoder.config.patch_dim)
            grid_thw = torch.tensor([[1, side, side]])
        visual_VE = self.adapter(self.encoder(pixel_values, grid_thw))
        return visual_VE[:0] if is_dummy else visual_VE

    def embed(self, batch: Batch, visual_VE: Tensor, token_grids: list[list[Grid]]) -> tuple[Tensor, Tensor | None]:
        """Input embeddings [B, L, E] with the images in place, and M-RoPE positions [3, B, L] (None: plain positions)."""
        embeds_BLE = word_embeddings(self.language_model)(batch.input_ids)
        is_image_BL1 = (batch.input_ids == self.image_token_id).unsqueeze(-1)
        # done without images too: scattering no rows is what ties the parameters behind a dummy image to the loss
        embeds_BLE = embeds_BLE.masked_scatter(is_image_BL1, visual_VE.to(embeds_BLE.dtype))
        if not self.mrope or not any(token_grids):
            return embeds_BLE, None
        return embeds_BLE, mrope_position_ids(batch.input_ids.cpu(), token_grids, self.image_token_id).to(embeds_BLE.device)

    def decode(self, batch: Batch, visual_VE: Tensor, token_grids: list[list[Grid]], wanted_T: Tensor | None = None) -> Tensor:
        """Last hidden states [T, E] of all tokens, row after row without padding, after the decoder's final norm; or [n, E] of
        those that `wanted_T` marks."""
        embeds_BLE, position_ids = self.embed(batch, visual_VE, token_grids)
        return self.run_decoder(batch.attention_mask, position_ids, wanted_T, inputs_embeds=embeds_BLE)

    def head(self) -> Head:
        """How the language model makes logits, for `next_token_loss`."""
        return Head(self.logits, self._halves.vocabulary, self._halves.linear_head(self.language_model))

    def logits(self, hidden_nE: Tensor) -> Tensor:
        """Logits of last hidden states, [n, vocabulary], with all that the language model does to them before its loss."""
        return self._halves.logits(self.language_model, hidden_nE)

    def run_decoder(
        self,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        wanted_T: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """The decoder without its head on right-padded rows: last hidden states [T, E] of their tokens.

        position_ids:  of M-RoPE, [3, B, L]; None: the decoder's own.
        wanted_T:      [T] bool, the tokens to return; None: all.
        inputs:        inputs_embeds [B, L, E] or input_ids [B, L].
        """
        if self.padded_because is not None:
            with self.multimodal_positions(position_ids):
                hidden_BLE = self._halves.decode(self.language_model, attention_mask=attention_mask.long(), **inputs)
            hidden_TE = hidden_BLE[attention_mask.bool()]
            return hidden_TE if wanted_T is None else hidden_TE[wanted_T]
        rows = Rows.of(attention_mask)
        packed = {name: rows.packed(x) for name, x in inputs.items()}
        positions = None if position_ids is None else with_slack(position_ids[:, rows.is_token], rows.slack, dim=1).unsqueeze(1)
        wanted = None if wanted_T is None else wanted_T.nonzero().squeeze(1)
        learned = wanted if self._shortened and wanted is not None and len(wanted) else None
        with self.multimodal_positions(positions, packed=True):
            mask = attention_mask_for_packed(self.language_model)
            arguments = packed | rows.arguments(learned)
            hidden_TE = self._halves.decode(self.language_model, attention_mask=mask, **arguments).squeeze(0)
        if learned is not None:
            return hidden_TE
        return without_slack(hidden_TE, rows.slack) if wanted is None else hidden_TE[wanted]

    @contextmanager
    def multimodal_positions(self, position_ids: Tensor | None, *, packed: bool = False) -> Iterator[None]:
        """Let the decoder use these M-RoPE positions [3, B, L], or [3, 1, T] of packed rows; None leaves its own."""
        rotary = install_mrope(self._decoder) if self.mrope else None  # the one that is there
        try:
            if rotary is not None:
                rotary.position_ids, rotary.packed = position_ids, packed
            yield
        finally:
            if rotary is not None:
                rotary.position_ids, rotary.packed = None, False

    def align(
        self,
        visual_VE: Tensor,
        token_grids: list[list[Grid]],
        step_text: StepText,
        settings: AlignmentConfig,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Alignment loss over the group, always in float32.

        Vision: mean over the visual tokens of all images of a sample. Samples without an image or without an answer do not
        count; a group without any that count has loss 0. The rows of other batches of the step have vision features zero,
        hence constant losses: gradients of the batches add up to that of the step.
        """
        lengths = [sum(t * h * w for t, h, w in images) for images in token_grids]
        with torch.autocast(visual_VE.device.type, enabled=False):
            before, after = step_text.begin, len(step_text.features) - step_text.begin - len(lengths)
            vision = F.pad(mean_by_segment(visual_VE, lengths), (0, 0, before, after))
            if settings.mode == "contrastive":
                text, valid = step_text.features, step_text.valid
                return contrastive_loss(vision, text, temperature=settings.temperature, valid=valid, group=group)
            loss = alignment_loss
            if settings.target_batch is not None:
                loss = partial(chunked_alignment_loss, chunk=settings.target_batch)
            return loss(
                vision,
                step_text.features,
                self.prototypes(settings.prototype_source),
                prior=self.word_counts if settings.prior else None,
                mode=settings.mode,
                epsilon=settings.epsilon,
                temperature=settings.temperature,
                num_iters=settings.num_iters,
                prior_temperature=settings.prior_temperature,
                prototype_gradient=settings.prototype_source == "learned",
                valid=step_text.valid,
                group=group,
            )

    def step_text(self, batches: Sequence[Batch]) -> StepText:
        """The text side of the alignment loss for batches that are learned from together."""
        features = [self.text_features(b.answer_ids, b.answer_mask) for b in batches]
        return StepText(features=torch.cat(features), valid=torch.cat([b.aligned_rows() for b in batches]))

    @torch.no_grad()
    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean of the last hidden states over the tokens of each row, [B, E] float32: no image, no lm_head, no gradient,
        evaluation mode. Rows without tokens give zeros."""
        if mask.shape[1] == 0:
            return torch.zeros(len(mask), self.adapter.language_width, device=mask.device)
        lengths = mask.sum(1)
        if not bool(lengths.any()):  # the decoder runs all the same: sharded, it is waited for by other processes
            mask = mask.clone()
            mask[0, 0] = True
        start = ids.new_tensor(self.text_start).expand(len(ids), -1)
        ids, is_text = torch.cat((start, ids), dim=1), F.pad(mask, (start.shape[1], 0))
        mask = torch.cat((mask.any(1, keepdim=True).expand_as(start), mask), dim=1)
        with evaluation_mode(self.language_model):
            hidden_TE = self.run_decoder(mask, wanted_T=is_text[mask] if self.text_start else None, input_ids=ids)
        return mean_by_segment(hidden_TE if bool(lengths.any()) else hidden_TE[:0], lengths)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """Continuation of every row of batch.input_ids (prompts, right padded) by the language model's own `generate`.

        Args:
            eos_token_id:  ids that end an answer, default those of the language model's generation config; nothing else of
                that is used.
            streamer:  of transformers; gets the prompt and then the ids of an answer as they come. One row at a time.
            options:  fields of transformers.GenerationConfig, for example do_sample=True, temperature=0.7, top_p=0.9 or
                num_beams=4; without any the answer is greedy.

        Returns the new ids of each row, without the one that ended it. Answers do not depend on the other rows: rows of
        different lengths are answered one after another where padding would change them (comp.model.generation).
        """
        lengths = batch.attention_mask.sum(1)
        if not bool((lengths > 0).all()):
            raise ValueError(f"every row of input_ids must have a prompt, got lengths {lengths.tolist()}")
        if streamer is not None and len(lengths) != 1:
            raise ValueError(f"streamer needs a batch of one row, got {len(lengths)}")
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError(f"num_return_sequences must be 1, got {options['num_return_sequences']}; repeat the rows instead")
        if eos_token_id is None:
            eos_token_id = self.language_model.generation_config.eos_token_id
        stops = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        config = plain_config(max_new_tokens, stops, options)
        with evaluation_mode(self):
            answers = (
                self._continued(batch, lengths, config, streamer=streamer) if max_new_tokens > 0 else [[] for _ in lengths]
            )
        return [list(takewhile(lambda token: token not in stops, answer)) for answer in answers]

    def _continued(self, batch: Batch, lengths: Tensor, config: GenerationConfig, **arguments: Any) -> list[list[int]]:
        """New ids of every row, what follows an end included."""
        embeds_BLE, position_ids = self.embed(batch, self.visual_tokens(batch), self.token_grids(batch))
        answers: list[list[int]] = [[] for _ in lengths]
        if self._sharing is None and len(lengths) > 1:
            self._sharing = sharing_of(self.language_model)
        for rows in rows_together(self._sharing or ALONE, lengths.tolist()):
            with self.multimodal_positions(None if position_ids is None else position_ids[:, rows]):
                prompts = (embeds_BLE[rows], batch.input_ids[rows], lengths[rows])
                ids = continue_rows(self.language_model, *prompts, config, **arguments)
            for row, answer in zip(rows, ids[:, int(lengths[rows].max()) :].tolist()):
                answers[row] = answer
        return answers
