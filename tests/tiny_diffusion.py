"""Tiny random denoisers of ``diffusers`` for the tests."""

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel


def unet(text: int) -> UNet2DConditionModel:
    """Cross-attention to states ``text`` wide at both resolutions."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def flow(text: int, joint: int, single: int) -> FluxTransformer2DModel:
    """``joint`` and ``single`` blocks, reading states ``text`` wide."""
    torch.manual_seed(1)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=joint,
        num_single_layers=single,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text,
        pooled_projection_dim=text,
        axes_dims_rope=(2, 2, 4),
    ).eval()
