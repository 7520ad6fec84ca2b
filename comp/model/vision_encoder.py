"""VisionEncoder: one vision transformer for SigLIP, SigLIP 2, DINOv2, AIMv2 and CLIP weights, at native resolution.

Images of any size are packed without padding; attention runs within each frame through `comp_kernels.rope_attention`.

Shape suffixes:
    N  patches of all images            T  tokens of all frames: patches, and prefix tokens where kept
    D  width                            H  heads       K  head size       R  rotary channel pairs, K / 2
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comp_kernels import rope_attention

from ..config import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS, PosMode, TowerChoices, need_choice
from ..data.images import check_grid, prepare_image, to_raster
from . import weights
from .adapter import Adapter
from .folder import warn_of_non_finite
from .layer_norm import LayerNorm
from .lora import merged_state
from .positions import Grids, in_token_order, patch_positions, resample_table, rotary_tables, sincos_table
from .row_sizes import over_filled_rows, slack_rows, with_slack, without_slack
from .vit_config import ACTIVATIONS, ViTConfig


def make_norm(config: ViTConfig) -> nn.Module:
    return {"layer": LayerNorm, "rms": nn.RMSNorm}[config.norm](config.width, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.proj_bias)

    def forward(
        self, x_TD: Tensor, cos_TR: Tensor | None, sin_TR: Tensor | None, cu_seqlens: Tensor, backend: str | None
    ) -> Tensor:
        # q, k and v stay views of one projection: the kernel takes any strides
        q_THK, k_THK, v_THK = self.qkv(x_TD).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out_THK = rope_attention(q_THK, k_THK, v_THK, cos_TR, sin_TR, cu_seqlens, backend=backend)
        return self.proj(out_THK.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.fc2 = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_TD)))


class GatedMLP(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    """x + scale1 * attention(norm1 x), then x + scale2 * mlp(norm2 x); the scales are DINOv2's LayerScale."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = (GatedMLP if config.gated_mlp else MLP)(config)
        self.scale1 = nn.Parameter(torch.ones(config.width)) if config.layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(config.width)) if config.layer_scale else None

    def forward(
        self, x_TD: Tensor, cos_TR: Tensor | None, sin_TR: Tensor | None, cu_seqlens: Tensor, backend: str | None
    ) -> Tensor:
        attended_TD = self.attn(self.norm1(x_TD), cos_TR, sin_TR, cu_seqlens, backend)
        x_TD = x_TD + (attended_TD if self.scale1 is None else attended_TD * self.scale1)
        mixed_TD = self.mlp(self.norm2(x_TD))
        return x_TD + (mixed_TD if self.scale2 is None else mixed_TD * self.scale2)


class Layout(NamedTuple):
    """How the tokens of all frames are packed."""

    slack: int
    """Rows of zeros behind the T tokens, which attention does not reach (comp.model.row_sizes)."""
    cu_seqlens: Tensor
    """[frames + 1] int32."""
    cos_TR: Tensor | None
    sin_TR: Tensor | None
    token_rows: Tensor | None
    """[T] rows of (patches, prefix tokens) that make the token sequence; None without prefix tokens."""
    patch_rows: Tensor | None
    """[N] rows of the token sequence that are patches; None without prefix tokens."""

    def only_patches(self, x_TD: Tensor) -> Tensor:
        return without_slack(x_TD, self.slack) if self.patch_rows is None else x_TD[self.patch_rows]


class VisionEncoder(nn.Module):
    """A packed vision transformer with CoMP's C-RoPE: interpolated position table plus 2D rotary embedding.

    Build it with `from_pretrained`, or from a ViTConfig for random weights.

    These attributes may change at any time, between stages for example.

    Attributes:
        pos_mode:  "abs", "rope" or "abs+rope". "rope" leaves the position table unused (it then gets no gradient).
        gradient_checkpointing:  recompute the blocks in the backward pass instead of keeping their activations.
        backend:  of rope_attention; None chooses by device.
        adapter:  the 2x2 merge MLP (comp.model.Adapter) where the checkpoint has one, else None. `forward` does not apply it.
    """

    def __init__(self, config: ViTConfig, adapter: Adapter | None = None) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.backend: str | None = None
        self._frozen_tables: tuple[object, dict] = (None, {})

        self.patch_embed = nn.Linear(config.patch_dim, config.width, bias=config.patch_bias)
        self.embed_norm = make_norm(config) if config.embed_norm else None
        if config.sincos_table:
            self.pos_embed = None
        else:
            self.pos_embed = nn.Parameter(torch.empty(config.grid_size, config.grid_size, config.width))
        # CLS with its table entry added, then registers
        self.prefix_tokens = nn.Parameter(torch.empty(config.prefix_tokens, config.width)) if config.prefix_tokens else None
        self.pre_norm = make_norm(config) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config) if config.final_norm else None
        self.adapter = adapter
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Random weights: truncated normal of `std` for matrices, table and tokens; zero biases; ones for norms and scales.
        The adapter resets itself."""
        for name, parameter in self.named_parameters():
            if name.startswith("adapter."):
                continue
            if name in ("pos_embed", "prefix_tokens") or (parameter.dim() == 2 and name.endswith("weight")):
                nn.init.trunc_normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    @property
    def pos_mode(self) -> PosMode:
        return self.config.pos_mode

    @pos_mode.setter
    def pos_mode(self, mode: PosMode) -> None:
        need_choice("pos_mode", mode, get_args(PosMode))
        self.config.pos_mode = mode

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        **choices: Any,
    ) -> VisionEncoder:
        """Load a tower in Hugging Face layout (SigLIP, SigLIP 2, DINOv2, AIMv2, CLIP) or a CoMP checkpoint,
        also out of a whole CoMP-MM (`visual.*` beside the language model, which is left out).

        Args:
            path:  a directory with config.json and weights (.safetensors, sharded or not, or pytorch_model.bin), or a hub id.
            dtype:  of the parameters, default that of the file.
            choices:  pos_mode, abs_pos_order, abs_pos_interp, align_corners, antialias, rope_dtype, keep_prefix_tokens,
                final_norm, merge_size: fields of comp.config.TowerChoices. None takes the stored choice of a directory that
                `save_pretrained` wrote, else what the weights were trained with: "abs" for plain towers; for released CoMP
                checkpoints (`use_rope` in the configuration or `merger.*` among the weights) "abs+rope" and, with a warning,
                abs_pos_order "raster_legacy".

        Raises ValueError naming every missing and every unexpected weight; heads that CoMP drops on purpose (pooling heads,
        text towers, and the like: comp.model.weights.DROPPED) are neither. TypeError for a choice of another name.
        """
        TowerChoices(**choices)  # TypeError for a name that is none of them
        file = weights.Checkpoint.open(path)
        config = weights.tower_config(file, choices, path)
        with torch.device("meta"):  # no random initialisation of what is overwritten anyway
            width = file.adapter_width
            adapter = None if width is None else Adapter(config.width, width, merge_size=config.merge_size)
            encoder = cls(config, adapter)
        shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
        tensors = weights.read_tensors(file, config, shapes, path)
        if dtype is not None:
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        encoder.load_state_dict(tensors, assign=True)
        warn_of_non_finite(path, tensors.items())
        return encoder.requires_grad_(True).eval()

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the encoder with its adapter and modeling_comp.py, so that transformers alone runs it:
        AutoModel.from_pretrained(path, trust_remote_code=True). `from_pretrained` gives the same encoder back."""
        weights.write_tower(path, self.config, merged_state(self))

    def save_as_transformers(self, path: str | os.PathLike) -> None:
        """Write the tower, without its adapter, for the class of transformers that it came from (SiglipVisionModel,
        Dinov2Model ...), which then computes the same.

        Raises ValueError with what is in the way: rotary embedding, prefix tokens or a final norm that were left out, the
        position table in another order.
        """
        weights.write_transformers_tower(path, self.config, merged_state(self))

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, return_layers: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Features of packed images.

        Args:
            pixel_values:  [N, C * P * P] patches of all images in merge-block order (comp.data.images.patchify).
            grid_thw:  [M, 3] integers, frames, rows and columns of patches of each image; sides multiples of merge_size.
                Every frame attends to itself only.
            return_layers:  also return the outputs of these blocks, before the final norm (0-based, negative from the end).

        Returns features [N, D] in merge-block order; comp.data.images.to_raster gives maps. With return_layers:
        (features, {layer: [N, D]}).
        """
        grids = self._check_input(pixel_values, grid_thw)
        layout = self._layout(grids, pixel_values.device)
        x_ND = self._embed(pixel_values, grids)
        x_TD = x_ND
        if self.prefix_tokens is not None:
            x_TD = torch.cat((x_ND, self.prefix_tokens.to(x_ND.dtype)))[layout.token_rows]
        x_TD = with_slack(x_TD, layout.slack)
        if self.pre_norm is not None:
            x_TD = self.pre_norm(x_TD)

        num_layers = len(self.blocks)
        for layer in return_layers or ():
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"return_layers must lie in {-num_layers} .. {num_layers - 1}, got {layer}")
        taps = {}
        # the blocks draw no random numbers of their own, but dropout of low-rank updates within them does
        recomputed = self.gradient_checkpointing and torch.is_grad_enabled()
        draws = recomputed and any(isinstance(module, nn.Dropout) for module in self.blocks.modules())
        for index, block in enumerate(self.blocks):
            arguments = (x_TD, layout.cos_TR, layout.sin_TR, layout.cu_seqlens, self.backend)
            if recomputed:
                x_TD = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=draws)
            else:
                x_TD = block(*arguments)
            for layer in return_layers or ():  # one block may go by two numbers, 3 and -1 of four
                if layer % num_layers == index:
                    taps[layer] = layout.only_patches(x_TD)
        x_ND = layout.only_patches(x_TD)
        features_ND = x_ND if self.norm is None else self.norm(x_ND)
        return features_ND if return_layers is None else (features_ND, taps)

    def encode(
        self,
        images: Image.Image | Sequence[Image.Image],
        *,
        min_tokens: int = MIN_VISUAL_TOKENS,
        max_tokens: int = MAX_VISUAL_TOKENS,
        size: tuple[int, int] | None = None,
    ) -> list[Tensor]:
        """Feature maps [h, w, D] in raster order, one per image, at native resolution; no gradients.

        Args:
            min_tokens:  least h * w / merge_size^2; smaller images are scaled up, keeping the aspect ratio.
            max_tokens:  most h * w / merge_size^2; larger images are scaled down, keeping the aspect ratio.
            size:  (height, width) in pixels for a fixed resolution instead.
        """
        images = [images] if isinstance(images, Image.Image) else images
        if not images:
            return []
        prepared = [self.prepare(image, min_tokens=min_tokens, max_tokens=max_tokens, size=size) for image in images]
        pixel_values = torch.cat([patches for patches, _ in prepared]).to(self.patch_embed.weight.device)
        grid_thw = torch.tensor([grid for _, grid in prepared])
        with torch.no_grad():
            features = self(pixel_values, grid_thw)
        return [one.squeeze(0) for one in to_raster(features, grid_thw, self.config.merge_size)]

    def prepare(self, image: Image.Image, **limits) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches and grid of one image with this tower's patch size and pixel statistics (comp.data.images.prepare_image)."""
        config = self.config
        return prepare_image(
            image,
            patch_size=config.patch_size,
            merge_size=config.merge_size,
            mean=config.image_mean,
            std=config.image_std,
            **limits,
        )

    def _check_input(self, pixel_values: Tensor, grid_thw: Tensor) -> Grids:
        if pixel_values.dim() != 2 or pixel_values.shape[1] != self.config.patch_dim:
            raise ValueError(f"pixel_values must be [N, {self.config.patch_dim}], got {tuple(pixel_values.shape)}")
        if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
            raise ValueError(f"grid_thw must be integers [M, 3], got {grid_thw.dtype} {tuple(grid_thw.shape)}")
        grids = [tuple(grid) for grid in grid_thw.tolist()]  # waits for the device, where it lies there
        if not grids:
            raise ValueError("grid_thw must describe at least one image, got none")
        for t, h, w in grids:
            check_grid(h, w, self.config.merge_size)
            if t < 1:
                raise ValueError(f"grid_thw must have at least one frame per image, got {(t, h, w)}")
        described = sum(t * h * w for t, h, w in grids)
        if described != pixel_values.shape[0]:
            raise ValueError(f"pixel_values has {pixel_values.shape[0]} patches but grid_thw describes {described}: {grids}")
        return grids

    def _layout(self, grids: Grids, device: torch.device) -> Layout:
        """Where each frame's tokens lie and how they are rotated; made on the CPU from the grids, then moved once."""
        num_prefix = self.config.prefix_tokens
        frame_lengths = [h * w for t, h, w in grids for _ in range(t)]
        positions = patch_positions(grids, self.config.merge_size)
        token_rows = patch_rows = None
        if num_prefix:
            rows = prefix_rows(frame_lengths, num_prefix)
            # position (0, 0) is angle 0: prefix tokens are not rotated
            positions = torch.cat((positions, positions.new_zeros(num_prefix, 2)))[rows]
            token_rows, patch_rows = rows.to(device), (rows < sum(frame_lengths)).nonzero().squeeze(1).to(device)
        bounds = torch.tensor([0, *(length + num_prefix for length in frame_lengths)]).cumsum(0)
        slack = slack_rows(len(positions), device)
        positions = with_slack(positions, slack).to(device)
        cos_TR, sin_TR = self._rotary_tables(positions) if "rope" in self.pos_mode else (None, None)
        return Layout(slack, bounds.to(device, torch.int32), cos_TR, sin_TR, token_rows, patch_rows)

    def _embed(self, pixel_values: Tensor, grids: Grids) -> Tensor:
        """Patches with their absolute positions, [N, D]."""
        x_ND = over_filled_rows(self.patch_embed, pixel_values.to(self.patch_embed.weight.dtype))
        if self.embed_norm is not None:
            x_ND = self.embed_norm(x_ND)
        if "abs" in self.pos_mode:
            x_ND = x_ND + self._position_table(grids, x_ND.device).to(x_ND.dtype)
        return x_ND

    def _position_table(self, grids: Grids, device: torch.device) -> Tensor:
        """Table entries of all patches, [N, D] float32; each distinct grid is resampled once."""
        tables = self._table_cache()
        for size in {(h, w) for _, h, w in grids}:
            if size not in tables:
                table = self._table_for(*size, device)
                tables[size] = in_token_order(table, self.config.abs_pos_order, self.config.merge_size)
        rows = torch.cat([tables[h, w] for t, h, w in grids for _ in range(t)])
        while len(tables) > 16:  # keep the most recent grids of a frozen table
            tables.pop(next(iter(tables)))
        return rows

    def _table_for(self, height: int, width: int, device: torch.device) -> Tensor:
        config = self.config
        if self.pos_embed is None:
            return sincos_table(height, width, config.width, device)
        return resample_table(
            self.pos_embed,
            height,
            width,
            mode=config.abs_pos_interp,
            align_corners=config.align_corners,
            antialias=config.antialias,
        )

    def _table_cache(self) -> dict[tuple[int, int], Tensor]:
        """Resampled tables that may outlive this forward pass: only those of a frozen table, until it changes."""
        table = self.pos_embed
        if table is None or table.requires_grad or table.is_inference():
            self._frozen_tables = (None, {})
            return {}
        config = self.config
        choices = (config.abs_pos_order, config.abs_pos_interp, config.align_corners, config.antialias)
        state = (table.data_ptr(), table._version, table.device, table.dtype, *choices)
        if self._frozen_tables[0] != state:
            self._frozen_tables = (state, {})
        return self._frozen_tables[1]

    def _rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotary_tables(positions, config.head_dim, base=config.rope_base, dtype=config.rope_dtype)


def prefix_rows(frame_lengths: Sequence[int], num_prefix: int) -> Tensor:
    """Row numbers that put prefix tokens in front of every frame, [T] int64.

    They index [patches of all frames; prefix tokens]: for frames of 2 and 1 patches and one prefix token, [3, 0, 1, 3, 2].
    """
    total = sum(frame_lengths)
    prefix = torch.arange(total, total + num_prefix)
    parts = []
    for patches in torch.arange(total).split(list(frame_lengths)):
        parts += [prefix, patches]
    return torch.cat(parts)
