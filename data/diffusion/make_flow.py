"""Train the flow-matching transformer of the shapes world: makes flow.safetensors and flow.json.

    python data/diffusion/make_flow.py [--minutes 600] [--scratch DIR] [--decay 60] [--ship]

A ``FluxTransformer2DModel``: joint attention of text and picture, rotary positions, two blocks with
weights of their own for either and five that share them. Pictures are 8 × 8 tokens of 2 × 2
latents; every tenth batch is of wide pictures, 8 × 16, so that the model knows places beyond its
usual frame. Rectified flow: x_s = (1 - s) · data + s · noise, the model gives noise − data, s is
logit-normal. ``--minutes`` and ``--decay`` as in make_unet.py.
"""

import json

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from look import look
from scenes import Reader, Scenes
from torch import nn
from training import Trainer, arguments, attention, compiled, ship, spread

from lib import diffusion

BATCH, SHARDS = 32, 8
NAMING = 0.1  # weight of the second task, to name what the states half-way show
CONFIG = dict(
    patch_size=1, in_channels=16, num_layers=2, num_single_layers=5, attention_head_dim=32,
    num_attention_heads=6, joint_attention_dim=384, pooled_projection_dim=384,
    guidance_embeds=False, axes_dims_rope=(8, 12, 12),
)  # fmt: skip
SCHEDULER = dict(num_train_timesteps=1000, shift=1.0)


def fresh() -> FluxTransformer2DModel:
    """Xavier's weights, and modulations and output that start at zero, as in DiT."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            parent = name.split(".")
            if name == "proj_out" or (parent[-1] == "linear" and "norm" in parent[-2]):
                nn.init.zeros_(module.weight)
    return model


def main():
    args = arguments("flow", 600, __doc__)
    model = fresh()
    width = CONFIG["attention_head_dim"] * CONFIG["num_attention_heads"]
    whole = nn.ModuleDict({"model": model, "reader": Reader(width)})
    trainer = Trainer(whole, args, lr=1.2e-3, muon=True)
    if args.look:
        scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        pipe = diffusion.assemble("flow", trainer.mean()["model"], scheduler)
        print(json.dumps(look(pipe, args.look, args.scratch, trainer.step)))
        return
    if args.minutes or args.decay:
        F.scaled_dot_product_attention = attention
        scenes = Scenes(args.scratch.parent / "scenes", SHARDS)
        wides = Scenes(args.scratch.parent / "scenes", wide=True)
        words = torch.zeros(diffusion.TOKENS, 3)

        hidden = {}
        middle = model.single_transformer_blocks[1]
        middle.register_forward_hook(lambda _, __, out: hidden.update(middle=out[1]))

        def predict(x, sigma, text, pooled, places):
            return model(
                hidden_states=x, timestep=sigma, encoder_hidden_states=text,
                pooled_projections=pooled, txt_ids=words, img_ids=places, return_dict=False,
            )[0], hidden["middle"]  # fmt: skip

        predict = compiled(predict, args)
        places = {w: diffusion.places(8, w) for w in (8, 16)}

        def loss_of(step):
            g = torch.Generator().manual_seed(step)
            is_wide = step % 10 == 9
            n = BATCH // 2 if is_wide else BATCH
            x, text, pooled, layouts, _ = (wides if is_wide else scenes).batch(n, g)
            sigma = torch.sigmoid(torch.special.ndtri(spread(n, g).clamp(1e-4, 1 - 1e-4)))
            x = diffusion.pack(x)
            noise = torch.randn(x.shape, generator=g)
            s = sigma[:, None, None]
            with torch.autocast("cpu", torch.bfloat16):
                noisy, where = (1 - s) * x + s * noise, places[x.shape[1] // 8]
                v, middle = predict(noisy, sigma, text, pooled, where)
                named = whole["reader"](middle, layouts)
            return F.mse_loss(v.float(), noise - x) + NAMING * named, n

        trainer.run(loss_of)
    if args.ship:
        record = dict(minutes=round(trainer.minutes), steps=trainer.step, images=trainer.seen)
        ship("flow", trainer.mean()["model"], scheduler=SCHEDULER, training=record)


if __name__ == "__main__":
    main()
