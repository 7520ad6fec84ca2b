"""From a configuration to its model and how it reads samples, and from the model back to directories on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig, PreTrainedModel

from .config import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS, AlignmentConfig, Config, ConfigError, StageConfig, VisionConfig
from .data.encode import ImageSettings, SampleEncoder
from .data.template import ChatTemplate, load_tokenizer, num_rows
from .files import write_json
from .limits import position_limit
from .model import VisionEncoder
from .model.causal_lm import apply_liger, load_language_model, recompute_activations, word_embeddings
from .model.lora import OUTSIDE_ADAPTER, TOWER_TARGETS, add_lora
from .model.multimodal import CoMP
from .model.weights import MODELING_FILE, image_processor
from .parallel import World, uses_fsdp


def build_model(
    config: Config, *, dummy_image: bool = False, encoder: VisionEncoder | None = None
) -> tuple[CoMP, ChatTemplate]:
    """The pre-trained parts joined, in float32, and the chat template of the language model's tokenizer.

    encoder:  a tower at hand, in place of the one that the configuration names.

    The word embeddings get exactly one row per id of the tokenizer, as the authors' code does: the vocabulary prior and
    the prototypes of the alignment loss then agree, and padding rows that some checkpoints carry take no mass. The language
    model's configurations say where its answers end from now on, as those of instructed models do.
    """
    tokenizer = config.language.tokenizer or config.language.path
    with loading(tokenizer):
        template = ChatTemplate(load_tokenizer(tokenizer))
    with loading(config.language.path):
        language_model = load_language_model(config.language.path, "float32", attention=config.language.attention)
        if config.language.liger:
            apply_liger(language_model)
    rows = num_rows(template.tokenizer)
    if word_embeddings(language_model).num_embeddings != rows:
        language_model.resize_token_embeddings(rows, mean_resizing=False)
    set_end_ids(language_model, template)
    if encoder is None:
        with loading(config.vision.path):
            encoder = load_tower(config.vision)
    with loading(config.language.path):
        model = CoMP(
            encoder,
            language_model,
            image_token_id=template.image_id,
            position_ids=config.language.position_ids,
            adapter_init=config.vision.adapter_init,
            dummy_image=dummy_image,
            pack_rows=config.language.pack_rows,
            text_start=template.start,
        )
    sources = {stage.alignment.prototype_source for stage in config.stages if stage.alignment is not None}
    if "frozen" in sources:
        model.freeze_prototypes()
    if "learned" in sources:
        model.learn_prototypes()
    for part, module, targets, names in (
        ("vision", encoder, TOWER_TARGETS, OUTSIDE_ADAPTER),
        ("language", language_model, "all-linear", None),
    ):
        settings = getattr(config, part)
        if settings.lora is not None:
            add_lora(module, settings.lora, all_targets=targets, names=names, base=settings.path, field=f"{part}.lora")
    if config.activation_checkpointing:
        encoder.gradient_checkpointing = True
        if not language_model.supports_gradient_checkpointing:
            raise ConfigError(f"{type(language_model).__name__} has no activation_checkpointing; set it to false")
        recompute_activations(language_model)
    return model, template


def set_end_ids(language_model: PreTrainedModel, template: ChatTemplate) -> None:
    """Let config.json and generation_config.json say where answers end and what padding is, for whoever reads the export, and
    nothing else: how a released model samples and penalises was tuned for that model."""
    language_model.generation_config = GenerationConfig()
    for settings in (language_model.config, language_model.generation_config):
        settings.pad_token_id = template.pad_id
        try:
            settings.eos_token_id = template.end_ids
        except Exception:  # a configuration that takes one id only refuses a list in its own way
            settings.eos_token_id = template.turn_end


def load_tower(vision: VisionConfig) -> VisionEncoder:
    """The vision tower of a configuration in float32, with its choices."""
    return VisionEncoder.from_pretrained(vision.path, **vision.choices()).float()


@contextmanager
def loading(path: str) -> Iterator[None]:
    """What cannot be loaded is a mistake of the configuration that names it."""
    try:
        yield
    except Exception as error:  # readers of damaged files raise nearly anything
        where = path if Path(path).is_dir() else f"{path} is no folder here and, as a hub id,"
        cause = f"{error}" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where} cannot be loaded: {cause}") from error


def set_position_mode(model: CoMP, config: Config, stage: StageConfig) -> None:
    """Rotary embedding on or off in the vision tower, as the stage wants it."""
    model.encoder.pos_mode = config.vision.pos_mode if stage.rope else "abs"


def sample_encoder(model: CoMP, template: ChatTemplate, config: Config, stage: StageConfig) -> SampleEncoder:
    """Turns samples into what the model eats, at the resolution of the stage."""
    resolution = stage.resolution
    if isinstance(resolution, str):  # "pretrain"
        vision = model.encoder.config
        resolution = config.vision.pretrain_resolution or vision.grid_size * vision.patch_size
    return make_sample_encoder(
        model,
        template,
        resolution=resolution,
        pad_to_square=stage.pad_to_square,
        min_visual_tokens=stage.min_visual_tokens,
        max_visual_tokens=stage.max_visual_tokens,
        max_text_tokens=stage.max_text_tokens,
        max_image_pixels=config.max_image_pixels,
        answer_tokens=config.eval.max_new_tokens,
        alignment=stage.alignment,
    )


def make_sample_encoder(
    model: CoMP,
    template: ChatTemplate,
    *,
    max_text_tokens: int,
    answer_tokens: int = 0,
    alignment: AlignmentConfig | None = None,
    **choices: Any,
) -> SampleEncoder:
    """Turns samples into what the model eats, at native size if nothing else is chosen.

    answer_tokens:  positions of the language model that a question leaves to its answer.
    alignment:      how the text of the alignment loss is made.
    choices:        fields of `ImageSettings` that the model does not settle.
    """
    vision = model.encoder.config
    images = ImageSettings(
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        mean=vision.image_mean,
        std=vision.image_std,
        **choices,
    )
    shuffle, longest = (False, None) if alignment is None else (alignment.shuffle_answers, alignment.max_text_tokens)
    return SampleEncoder(
        template,
        images,
        max_text_tokens=max_text_tokens,
        max_positions=position_limit(model.language_model),
        mrope=model.mrope,
        answer_tokens=answer_tokens,
        shuffle_answers=shuffle,
        max_alignment_tokens=longest,
    )


def question_encoder(
    model: CoMP,
    template: ChatTemplate,
    *,
    answer_tokens: int,
    min_visual_tokens: int = MIN_VISUAL_TOKENS,
    max_visual_tokens: int = MAX_VISUAL_TOKENS,
) -> SampleEncoder:
    """For questions, at native size; leaves `answer_tokens` of the language model's positions to the answer."""
    return make_sample_encoder(
        model,
        template,
        max_text_tokens=position_limit(model.language_model) - answer_tokens,
        min_visual_tokens=min_visual_tokens,
        max_visual_tokens=most_visual_tokens(model, max_visual_tokens),
    )


def most_visual_tokens(model: CoMP, wanted: int = MAX_VISUAL_TOKENS) -> int:
    """`wanted`, or three quarters of the language model's positions where those are fewer: a quarter is for text."""
    return min(wanted, position_limit(model.language_model) * 3 // 4)


def longest_answer(model: CoMP) -> int:
    """Tokens of an answer that leave half of the language model's positions to the question."""
    return position_limit(model.language_model) // 2


def export_model(model: CoMP, template: ChatTemplate, config: Config, world: World, folder: Path) -> None:
    """Write `folder`/vision (with the adapter) and `folder`/language (with the tokenizer) for CoMP.from_pretrained and for
    transformers alone; LoRA's updates are merged there, and by themselves in `folder`/lora/{vision, language}.

    All processes call it: a sharded model is gathered on the CPU of the first.
    """
    if uses_fsdp(config, world):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        if not world.is_main:
            return
        pos_mode = model.encoder.pos_mode
        model, _ = build_model(config)
        model.load_state_dict(state)
        model.encoder.pos_mode = pos_mode
    if world.is_main:
        model.save_pretrained(folder)
        save_processor(model, template, folder)


def save_processor(model: CoMP, template: ChatTemplate, folder: Path) -> None:
    """The tokenizer with its chat template, beside the language model and at the top of `folder`, and there what AutoProcessor
    needs, with images up to `most_visual_tokens`."""
    for place in (folder, folder / "language"):
        template.save_tokenizer(place)
    processor = dict(
        auto_map={"AutoProcessor": f"{MODELING_FILE.stem}.CompProcessor"},
        **image_processor(model.encoder.config, max_tokens=most_visual_tokens(model)),
    )
    write_json(folder / "preprocessor_config.json", processor)
