"""CoMP for transformers: packed vision tower at native resolution, 2x2 adapter, causal language model (arXiv 2503.18931).

This file stands beside the weights it belongs to and needs torch and transformers only:

    AutoModel.from_pretrained(folder + "/vision", trust_remote_code=True)           the vision tower, CompVisionModel
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)     the whole, CompForConditionalGeneration
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)                   images and text for it, CompProcessor

Patches are in merge-block order: the merge_size^2 patches of a block, of which the adapter makes one token, are neighbours.

Shape suffixes:
    N  patches of all images   D  width   H  heads   K  head size   M  images   B  rows   L  tokens of a row   E  language width
"""

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BatchFeature, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.processing_utils import ProcessorMixin

Grid = tuple[int, int, int]  # frames, rows, columns


class CompVisionConfig(PreTrainedConfig):
    """Every field is in config.json: sizes, which norms and biases there are, and

    pos_mode:         "abs" (position table), "rope" (2D rotary embedding in every layer) or "abs+rope" (both).
    abs_pos_order:    "merge": each patch gets the table entry of its place; "raster_legacy": the table in raster order is added
                      to patches in merge-block order, as the first released CoMP towers were trained.
    abs_pos_interp, align_corners, antialias:  how the table is resampled to an image's grid.
    rope_dtype:       "fp32", or "bf16_legacy": angles rounded to bfloat16.
    adapter_width:    width of the adapter's tokens; null without adapter.
    """

    model_type = "comp_vision"
    attribute_map = {  # noqa: RUF012, a plain dictionary is what transformers reads
        "hidden_size": "width",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_width",
        "hidden_act": "activation",
    }


class CompConfig(PreTrainedConfig):
    """vision_config, text_config (of any causal language model of transformers), the id of the image placeholder, and
    position_ids: "mrope", image tokens carry (time, row, column), or "1d"."""

    model_type = "comp"

    def __init__(self, vision_config=None, text_config=None, image_token_id=None, position_ids="mrope", **kwargs):
        if isinstance(vision_config, dict):
            vision_config = CompVisionConfig(**vision_config)
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.vision_config, self.text_config = vision_config, text_config
        self.image_token_id, self.position_ids = image_token_id, position_ids
        super().__init__(**kwargs)


# --- vision tower -------------------------------------------------------------------------------------------------------------


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def make_norm(config: CompVisionConfig) -> nn.Module:
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[config.norm](config.width, eps=config.norm_eps)


class CompAttention(nn.Module):
    def __init__(self, config: CompVisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.proj_bias)

    def forward(self, x_ND: Tensor, rotation: tuple[Tensor, Tensor] | None, lengths: list[int]) -> Tensor:
        q_NHK, k_NHK, v_NHK = self.qkv(x_ND).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        if rotation is not None:
            q_NHK, k_NHK = rotate(q_NHK, *rotation), rotate(k_NHK, *rotation)
        frames = zip(*(x_NHK.transpose(0, 1).split(lengths, dim=1) for x_NHK in (q_NHK, k_NHK, v_NHK)))
        out_HNK = torch.cat([F.scaled_dot_product_attention(*(x.unsqueeze(0) for x in qkv))[0] for qkv in frames], dim=1)
        return self.proj(out_HNK.transpose(0, 1).flatten(1))


def rotate(x_NHK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Channel pairs (j, j + K / 2) turned by their angles, in float32."""
    x = x_NHK.float()
    first, second = x.chunk(2, dim=-1)
    turned = x * cos_NK.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin_NK.unsqueeze(1)
    return turned.to(x_NHK.dtype)


class CompMLP(nn.Module):
    def __init__(self, config: CompVisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.fc2 = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_ND)))


class CompGatedMLP(nn.Module):
    def __init__(self, config: CompVisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate, up = self.gate_up(x_ND).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class CompBlock(nn.Module):
    def __init__(self, config: CompVisionConfig):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = CompAttention(config)
        self.norm2 = make_norm(config)
        self.mlp = (CompGatedMLP if config.gated_mlp else CompMLP)(config)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(config.width)) if config.layer_scale else None for _ in range(2))

    def forward(self, x_ND: Tensor, rotation: tuple[Tensor, Tensor] | None, lengths: list[int]) -> Tensor:
        attended_ND = self.attn(self.norm1(x_ND), rotation, lengths)
        x_ND = x_ND + (attended_ND if self.scale1 is None else attended_ND * self.scale1)
        mixed_ND = self.mlp(self.norm2(x_ND))
        return x_ND + (mixed_ND if self.scale2 is None else mixed_ND * self.scale2)


class CompAdapter(nn.Module):
    """LayerNorm of each patch, concatenation of the patches of a block, Linear, GELU, Linear."""

    def __init__(self, config: CompVisionConfig):
        super().__init__()
        merged = config.width * config.merge_size**2
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(merged, merged), nn.Linear(merged, config.adapter_width)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x_ND).view(-1, self.fc1.in_features))))


class CompVisionModel(PreTrainedModel):
    """The tower, and its adapter where it has one. Images of any size are packed without padding, attention is within each."""

    config_class = CompVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["CompBlock"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: CompVisionConfig):
        super().__init__(config)
        self.patch_embed = nn.Linear(config.num_channels * config.patch_size**2, config.width, bias=config.patch_bias)
        self.embed_norm = make_norm(config) if config.embed_norm else None
        table = None if config.sincos_table else torch.zeros(config.grid_size, config.grid_size, config.width)
        self.pos_embed = None if table is None else nn.Parameter(table)
        num_prefix = config.num_prefix_tokens if config.keep_prefix_tokens else 0
        self.prefix_tokens = nn.Parameter(torch.zeros(num_prefix, config.width)) if num_prefix else None
        self.pre_norm = make_norm(config) if config.pre_norm else None
        self.blocks = nn.ModuleList(CompBlock(config) for _ in range(config.num_layers))
        self.norm = make_norm(config) if config.final_norm else None
        self.adapter = None if config.adapter_width is None else CompAdapter(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs) -> BaseModelOutput:
        """last_hidden_state [N, D] in merge-block order; `feature_maps` gives maps of rows and columns.

        pixel_values:    [N, channels * patch_size^2] patches of all images, as AutoImageProcessor makes them.
        image_grid_thw:  [M, 3] frames, rows and columns of patches of each image.
        """
        config = self.config
        grids = [tuple(grid) for grid in image_grid_thw.tolist()]
        x_ND = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        if self.embed_norm is not None:
            x_ND = self.embed_norm(x_ND)
        if "abs" in config.pos_mode:
            x_ND = x_ND + torch.cat([self._position_table(h, w).repeat(t, 1) for t, h, w in grids]).to(x_ND.dtype)
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        rotation = self._rotation(grids, x_ND.device) if "rope" in config.pos_mode else None
        num_prefix = 0 if self.prefix_tokens is None else len(self.prefix_tokens)
        if self.prefix_tokens is not None:  # in front of every frame, not rotated
            x_ND = torch.cat([part for frame in x_ND.split(lengths) for part in (self.prefix_tokens, frame)])
            if rotation is not None:
                at_origin = (torch.ones, torch.zeros)  # cosine and sine of angle 0
                cos, sin = (
                    torch.cat(
                        [p for frame in table.split(lengths) for p in (fill(num_prefix, table.shape[1]).to(table), frame)]
                    )
                    for fill, table in zip(at_origin, rotation)
                )
                rotation = (cos, sin)
            lengths = [length + num_prefix for length in lengths]
        if self.pre_norm is not None:
            x_ND = self.pre_norm(x_ND)
        for block in self.blocks:
            x_ND = block(x_ND, rotation, lengths)
        if num_prefix:
            x_ND = torch.cat([frame[num_prefix:] for frame in x_ND.split(lengths)])
        return BaseModelOutput(last_hidden_state=x_ND if self.norm is None else self.norm(x_ND))

    def feature_maps(self, features_ND: Tensor, image_grid_thw: Tensor) -> list[Tensor]:
        """[N, D] in merge-block order -> a map [frames, rows, columns, D] of each image."""
        merge, grids = self.config.merge_size, image_grid_thw.tolist()
        parts = features_ND.split([t * h * w for t, h, w in grids])
        blocks = [part.view(t, h // merge, w // merge, merge, merge, -1) for part, (t, h, w) in zip(parts, grids)]
        return [block.transpose(2, 3).reshape(t, h, w, -1) for block, (t, h, w) in zip(blocks, grids)]

    def _position_table(self, height: int, width: int) -> Tensor:
        """[height * width, D] float32, in the order of the tokens."""
        config = self.config
        if self.pos_embed is None:
            table = sincos_table(height, width, config.width).to(self.patch_embed.weight.device)
        else:
            table = self.pos_embed.float()
            if table.shape[:2] != (height, width):
                how = dict(mode=config.abs_pos_interp, align_corners=config.align_corners, antialias=config.antialias)
                table = F.interpolate(table.permute(2, 0, 1).unsqueeze(0), size=(height, width), **how)[0].permute(1, 2, 0)
        return self._in_blocks(table) if config.abs_pos_order == "merge" else table.flatten(0, 1)

    def _in_blocks(self, x: Tensor) -> Tensor:
        """[h, w, ...] -> [h * w, ...] in merge-block order."""
        merge = self.config.merge_size
        height, width, *rest = x.shape
        if height % merge or width % merge:
            raise ValueError(f"grids must be multiples of merge_size {merge}, got {height} x {width} patches")
        return x.reshape(height // merge, merge, width // merge, merge, *rest).transpose(1, 2).flatten(0, 3)

    def _rotation(self, grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [N, K] float32: the first half of the channel pairs turn with the row, the others with the column."""
        config = self.config
        quarter = config.width // config.num_heads // 4
        powers = torch.arange(quarter, dtype=torch.float64) / quarter
        freqs = (config.rope_base**-powers).to(device, torch.float32)
        positions = torch.cat(
            [
                self._in_blocks(torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(h, w, 2)).repeat(t, 1)
                for t, h, w in grids
            ]
        )
        positions = positions.to(device)
        if config.rope_dtype == "bf16_legacy":
            angles = (positions.bfloat16().unsqueeze(-1) * freqs.bfloat16()).flatten(1)
        else:
            angles = (positions.unsqueeze(-1) * freqs).flatten(1)
        both = torch.cat((angles, angles), dim=1)
        return both.cos().float(), both.sin().float()


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """The computed table of AIMv2 "native", [height, width, dim] float32."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64).outer(omega) for n in (height, width))
    rows = torch.cat((rows.sin(), rows.cos()), dim=1).unsqueeze(1).expand(height, width, -1)
    columns = torch.cat((columns.sin(), columns.cos()), dim=1).unsqueeze(0).expand(height, width, -1)
    return torch.cat((columns, rows), dim=-1).float()


# --- positions of the language model ------------------------------------------------------------------------------------------


class MultimodalRotary(nn.Module):
    """Around a decoder's rotary_emb: while `table` [3, B, L] is set, token i of row b is at (time, row, column) table[:, b, i],
    and tokens behind the last count on. Channel pairs are shared out among the three axes as in Qwen2-VL."""

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary
        self.table: Tensor | None = None

    def forward(self, x: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.table is None:
            return self.rotary(x, position_ids, *args, **kwargs)
        table = self.table
        if len(position_ids) > table.shape[1]:  # several beams of every row
            table = table.repeat_interleave(len(position_ids) // table.shape[1], dim=1)
        inside = position_ids.clamp(max=table.shape[2] - 1).expand(table.shape[1], -1)
        axes = table.gather(2, inside.expand(3, -1, -1)) + (position_ids - inside)
        per_axis = [self.rotary(x, axis, *args, **kwargs) for axis in axes]
        cos, sin = zip(*per_axis)
        return self._shared_out(cos), self._shared_out(sin)

    @staticmethod
    def _shared_out(tables: Sequence[Tensor]) -> Tensor:
        pairs = tables[0].shape[-1] // 2
        time = pairs // 4
        row = (pairs - time) // 2
        parts = [table.split([time, row, pairs - time - row] * 2, dim=-1) for table in tables]
        return torch.cat([parts[i % 3][i] for i in range(6)], dim=-1)


def mrope_table(rows: Sequence[Tensor], grids: Sequence[Grid], image_token_id: int) -> Tensor:
    """(time, row, column) of every token, [3, B, longest row], for ids of rows without padding and the grids, in tokens, of
    their images in order. Text counts up; an image that starts at s has s + (frame, row, column); then on from the largest."""
    table = torch.zeros(3, len(rows), max(map(len, rows)), dtype=torch.long)
    remaining = list(grids)
    for number, ids in enumerate(rows):
        is_image, done, base = (ids == image_token_id).tolist(), 0, 0
        while True in is_image[done:]:
            start = is_image.index(True, done)
            t, h, w = remaining.pop(0)
            table[:, number, done:start] = torch.arange(base, base + start - done)
            base += start - done
            axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            done = start + t * h * w
            table[:, number, start:done] = torch.stack(axes).flatten(1) + base
            base += max(t, h, w)
        table[:, number, done:] = torch.arange(base, base + table.shape[2] - done)  # to the end: generated tokens count on
    return table


# --- the whole ----------------------------------------------------------------------------------------------------------------


class CompForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision tower with adapter, and a causal language model that sees the image tokens in place of their placeholders.

    On disk the two are folders of their own, vision/ and language/, beside this file: `language` is an ordinary causal language
    model of transformers with its tokenizer.
    """

    config_class = CompConfig
    _no_split_modules = ["CompBlock"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(
        self, config: CompConfig, vision: CompVisionModel | None = None, language_model: PreTrainedModel | None = None
    ):
        super().__init__(config)
        self.vision = CompVisionModel(config.vision_config) if vision is None else vision
        self.language_model = AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        self.rotary = None
        if config.position_ids == "mrope":
            decoder = self.language_model.get_decoder()
            self.rotary = decoder.rotary_emb = MultimodalRotary(decoder.rotary_emb)
        self.generation_config = self.language_model.generation_config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Both parts by their own from_pretrained, with the same options (dtype, device_map, attn_implementation ...)."""
        path = pretrained_model_name_or_path
        if config is None:
            config = CompConfig.from_pretrained(path)
        if kwargs.get("subfolder"):
            raise ValueError(f"the model must be at the top of its repository, got subfolder {kwargs['subfolder']!r}")
        vision = CompVisionModel.from_pretrained(path, **{**kwargs, "subfolder": "vision", "attn_implementation": "sdpa"})
        language_model = AutoModelForCausalLM.from_pretrained(path, **{**kwargs, "subfolder": "language"})
        return cls(config, vision, language_model).eval()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """The layout of `from_pretrained`; this file and what the processor needs are left to who copies them."""
        self.config.save_pretrained(save_directory)
        self.vision.save_pretrained(f"{save_directory}/vision", *args, **kwargs)
        self.language_model.save_pretrained(f"{save_directory}/language", *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        beams: int = 1,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As the language model's own forward; pixel_values and image_grid_thw as for the vision tower, images in the order of
        their placeholders. Without a cache to continue, this is the beginning of new rows.

        beams: so many rows that follow each other are the same one, whose images come once.
        """
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        is_begin = cache is None or cache.get_seq_length() == 0
        if is_begin and self.rotary is not None:
            self.rotary.table = None
        if is_begin and pixel_values is not None:
            if input_ids is None or image_grid_thw is None:
                raise ValueError("pixel_values need input_ids, which say where they belong, and image_grid_thw")
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            rows, row_masks = input_ids[::beams], mask[::beams]
            inputs_embeds = self._embed(rows, pixel_values, image_grid_thw).repeat_interleave(beams, dim=0)
            if self.rotary is not None:
                self.rotary.table = self._positions(rows, row_masks, image_grid_thw).to(inputs_embeds.device)
                if position_ids is None and attention_mask is not None:
                    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        inputs = dict(input_ids=input_ids) if inputs_embeds is None else dict(inputs_embeds=inputs_embeds)
        return self.language_model(**inputs, attention_mask=attention_mask, position_ids=position_ids, labels=labels, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """For several beams of each row: images are not repeated, they are not lined up with the rows."""
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_grid_thw")}
        expand = super()._expand_inputs_for_generation  # type: ignore[misc] # its annotation names `self` twice
        input_ids, kwargs = expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **images, "beams": expand_size}

    def _embed(self, input_ids: Tensor, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """[B, L, E] word embeddings with the image tokens in their places."""
        embeds_BLE = self.get_input_embeddings()(input_ids)
        is_image_BL1 = (input_ids == self.config.image_token_id).unsqueeze(-1)
        if self.vision.adapter is None:
            raise ValueError("the vision tower has no adapter: images cannot become tokens")
        visual_VE = self.vision.adapter(self.vision(pixel_values, image_grid_thw).last_hidden_state)
        if int(is_image_BL1.sum()) != len(visual_VE):
            raise ValueError(
                f"input_ids have {int(is_image_BL1.sum())} image placeholders, the images make {len(visual_VE)} tokens"
            )
        return embeds_BLE.masked_scatter(is_image_BL1.to(embeds_BLE.device), visual_VE.to(embeds_BLE))

    def _positions(self, input_ids: Tensor, attention_mask: Tensor, image_grid_thw: Tensor) -> Tensor:
        merge = self.config.vision_config.merge_size
        rows = [ids[kept.bool()].cpu() for ids, kept in zip(input_ids, attention_mask)]
        grids = [(t, h // merge, w // merge) for t, h, w in image_grid_thw.tolist()]
        return mrope_table(rows, grids, self.config.image_token_id)


class CompProcessor(ProcessorMixin):
    """Images to patches, and every image placeholder of the text to as many as the image has tokens."""

    image_token = "<|image_pad|>"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, videos=None, audio=None, return_tensors=None, **kwargs) -> BatchFeature:
        """images: in the order of their placeholders in `text`, a text or a list of texts. Rows are padded on the left."""
        if text is None or videos is not None or audio is not None:
            raise ValueError("text is needed, and images are all that may come with it")
        texts, vision = [text] if isinstance(text, str) else list(text), {}
        marks = sum(text.count(self.image_token) for text in texts)
        if images is not None:
            vision = dict(self.image_processor(images, return_tensors="pt"))
            counts = (vision["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist()
        else:
            counts = []
        if marks != len(counts):
            raise ValueError(f"text must have one {self.image_token} per image, got {marks} for {len(counts)} images")
        remaining = iter(counts)
        texts = [re.sub(re.escape(self.image_token), lambda _: self.image_token * next(remaining), text) for text in texts]
        kwargs = {"padding": len(texts) > 1, "padding_side": "left", "add_special_tokens": False, **kwargs}
        return BatchFeature({**self.tokenizer(texts, **kwargs), **vision}, tensor_type=return_tensors)
