"""Train the image prompt of the U-Net: makes adapter.safetensors and adapter.json.

    python data/diffusion/make_adapter.py [--minutes 180] [--scratch DIR] [--ship]

IP-Adapter (Ye et al., arXiv 2308.06721): the U-Net stays as it is, every cross-attention gets keys
and values of its own for four tokens that a projection makes of a picture's embedding. As there,
the picture is the training picture itself, its ground included, and caption, picture or both are
dropped now and then. No vision model comes with the book, so that the encoder, a small
convolutional net, is trained along.
"""

import json

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from scenes import Scenes
from torch import nn
from training import HERE, Trainer, arguments, attention, spread

from lib import diffusion

BATCH, SHARDS = 32, 8


class Whole(nn.Module):
    """What is trained: the image encoder and the adapter's weights, that live in the U-Net."""

    def __init__(self, encoder, unet):
        super().__init__()
        self.encoder, self.projection = encoder, unet.encoder_hid_proj
        self.processors = nn.ModuleList(
            p for p in unet.attn_processors.values() if isinstance(p, nn.Module)
        )


def main():
    args = arguments("adapter", 180, __doc__)
    torch.manual_seed(0)
    unet = diffusion.build(UNet2DConditionModel, "unet")
    encoder = diffusion.ImageEncoder().requires_grad_(True)
    diffusion.install(unet, diffusion.fresh_adapter(unet))
    whole = Whole(encoder, unet).requires_grad_(True)
    trainer = Trainer(whole, args, lr=3e-4, warmup=200)
    if args.minutes or args.decay:
        F.scaled_dot_product_attention = attention
        scenes = Scenes(args.scratch.parent / "scenes", SHARDS)
        vae = diffusion.autoencoder()
        signal = DDIMScheduler.from_config(diffusion.read("unet")["scheduler"]).alphas_cumprod

        def loss_of(step):
            g = torch.Generator().manual_seed(step)
            x, text, _ = scenes.batch(BATCH, g, drop=0.1)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                pictures = vae.decode(x).sample.float().clamp(-1, 1) / 2 + 0.5
            t = (spread(BATCH, g) * 1000).long()
            noise = torch.randn(x.shape, generator=g)
            seen = (torch.rand(BATCH, 1, generator=g) > 0.1).float()
            a = signal[t][:, None, None, None]
            with torch.autocast("cpu", torch.bfloat16):
                embeds = encoder(pictures).image_embeds * seen  # a dropped picture is zero
                v = unet(
                    a.sqrt() * x + (1 - a).sqrt() * noise, t, text, return_dict=False,
                    added_cond_kwargs={"image_embeds": [embeds[:, None]]},
                )[0]  # fmt: skip
            error = (v.float() - (a.sqrt() * noise - (1 - a).sqrt() * x)).square().mean((1, 2, 3))
            snr = signal[t] / (1 - signal[t])
            return (error * (5 / (snr + 1)).clamp(max=1)).mean(), BATCH

        trainer.run(loss_of)
    trainer.mean()
    if args.ship:
        state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
        for kind, part in diffusion.adapter_weights(unet).items():
            state |= {f"{kind}.{k}": v for k, v in part.items()}
        state = {k: v.detach().half().contiguous() for k, v in state.items()}
        save_file(state, HERE / "adapter.safetensors")
        (HERE / "adapter.safetensors").chmod(0o644)
        record = dict(minutes=round(trainer.minutes), steps=trainer.step, images=trainer.seen)
        (HERE / "adapter.json").write_text(json.dumps({"training": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
