"""Train the text-to-image U-Net of the shapes world: makes unet.safetensors and unet.json.

    python data/diffusion/make_unet.py [--minutes 600] [--scratch DIR] [--decay 60] [--ship]

A ``UNet2DConditionModel`` as in Stable Diffusion, on latents of 16 × 16 × 4, with cross-attention
to the caption at 16 × 16 and at 8 × 8 in every block. It predicts v on a cosine schedule: the first
step then starts from pure noise, so that a picture's ground is the caption's to choose, and the
loss weighs the noisy times, where it is decided what goes where. ``--minutes`` adds to what the
scratch folder holds; ``--decay`` lets the rate fall to zero, from there ``--ship`` writes.
"""

import json

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from look import look
from scenes import Reader, Scenes
from torch import nn
from training import Trainer, arguments, attention, compiled, ship, spread

from lib import diffusion

BATCH, SHARDS = 32, 8
NAMING = 0.1  # weight of the second task, to name what the middle's states show
CONFIG = dict(
    sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128),
    layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 2,
    mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=("CrossAttnUpBlock2D",) * 2,
    cross_attention_dim=384, attention_head_dim=(2, 4), norm_num_groups=8,
)  # fmt: skip
SCHEDULER = dict(
    num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
    timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=1,
)  # fmt: skip


def fresh() -> UNet2DConditionModel:
    """Every residual branch starts at zero, as usual for diffusion models; diffusers leaves it."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**CONFIG)
    for name, module in model.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".proj_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def main():
    args = arguments("unet", 600, __doc__)
    model = fresh()
    whole = nn.ModuleDict({"model": model, "reader": Reader(CONFIG["block_out_channels"][-1])})
    trainer = Trainer(whole, args, lr=1e-3, muon=True)
    if args.look:
        pipe = diffusion.assemble("unet", trainer.mean()["model"], DDIMScheduler(**SCHEDULER))
        print(json.dumps(look(pipe, args.look, args.scratch, trainer.step)))
        return
    if args.minutes or args.decay:
        F.scaled_dot_product_attention = attention
        scenes = Scenes(args.scratch.parent / "scenes", SHARDS)
        signal = DDIMScheduler(**SCHEDULER).alphas_cumprod

        hidden = {}
        model.mid_block.register_forward_hook(lambda _, __, out: hidden.update(mid=out))

        def predict(x, t, text):
            return model(x, t, text, return_dict=False)[0], hidden["mid"].flatten(2).mT

        predict = compiled(predict, args)

        def loss_of(step):
            g = torch.Generator().manual_seed(step)
            x, text, _, layouts, _ = scenes.batch(BATCH, g)
            t = (spread(BATCH, g) * 1000).long()
            noise = torch.randn(x.shape, generator=g)
            a = signal[t][:, None, None, None]
            with torch.autocast("cpu", torch.bfloat16):
                v, mid = predict(a.sqrt() * x + (1 - a).sqrt() * noise, t, text)
                named = whole["reader"](mid, layouts)
            error = (v.float() - (a.sqrt() * noise - (1 - a).sqrt() * x)).square().mean((1, 2, 3))
            snr = signal[t] / (1 - signal[t])
            # min-SNR weights, 5, in terms of v: nothing is lost where noise prevails.
            error = (error * (5 / (snr + 1)).clamp(max=1)).mean()
            return error + NAMING * named, BATCH

        trainer.run(loss_of)
    if args.ship:
        record = dict(minutes=round(trainer.minutes), steps=trainer.step, images=trainer.seen)
        ship("unet", trainer.mean()["model"], scheduler=SCHEDULER, training=record)


if __name__ == "__main__":
    main()
