"""Train the autoencoder of the shapes world: makes autoencoder.safetensors and autoencoder.json.

    python data/diffusion/make_autoencoder.py [--minutes 26] [--decay 4] [--scratch DIR] [--ship]

``AutoencoderKL``, pictures of 64 × 64 to latents of 16 × 16 × 4, on drawings made as it goes.
The loss is L1 on pixels, on their differences (edges, thin shapes) and a small divergence, which
leaves the latents so smooth that a sampler's small errors do no harm. Shipped with its first and
last 1 × 1 convolutions rescaled so that every latent channel has mean 0 and sd 1.
"""

import random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from training import Trainer, arguments, compiled, ship

from lib import shapes

BATCH, KL = 16, 3e-4
CONFIG = dict(
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=2,
    sample_size=64, scaling_factor=1.0, shift_factor=0.0, mid_block_add_attention=False,
)  # fmt: skip


def drawings(n: int, seed: int) -> torch.Tensor:
    """Pictures [n, 3, 64, 64] in [-1, 1]; crowded ones more often than captioned ones are."""
    scenes = shapes.sample(n, seed, counts=(1, 2, 2, 2))
    rng = random.Random(seed)
    grounds = list(shapes.BACKGROUNDS)
    scenes = [shapes.Scene(s.things, rng.choice(grounds)) for s in scenes]
    return shapes.pictures(scenes) * 2 - 1


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


@torch.no_grad()
def whiten(model: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Rescale ``quant_conv`` and ``post_quant_conv``: latents of mean 0, sd 1 in every channel."""
    mean = model.encode(pictures).latent_dist.mean
    m, s = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    out, back = model.quant_conv, model.post_quant_conv
    out.bias[:4] -= m
    out.weight[:4] /= s[:, None, None, None]
    out.bias[:4] /= s
    out.bias[4:] -= 2 * s.log()  # log variances
    back.bias += (back.weight[:, :, 0, 0] * m).sum(1)
    back.weight *= s[None, :, None, None]


def main():
    args = arguments("autoencoder", 26, __doc__)
    torch.manual_seed(0)
    model = AutoencoderKL(**CONFIG)
    torch.nn.init.constant_(model.quant_conv.bias[4:], -6.0)  # little noise, or nothing is learnt
    trainer = Trainer(model, args, lr=1.5e-3, ema=0.995, warmup=100, decay=0.0)

    def both(x, noise):
        d = model.encode(x).latent_dist
        z = d.mean + d.std * noise
        return model.decode(z).sample, d.mean, d.logvar

    both = compiled(both, args)

    def loss_of(step):
        x = drawings(BATCH, 1_000_000 + step)
        noise = torch.randn(BATCH, 4, 16, 16, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            y, mean, logvar = both(x, noise)
        y, mean, logvar = y.float(), mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        sharp = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        return F.l1_loss(y, x) + 0.5 * sharp + F.mse_loss(y, x) + KL * kl, BATCH

    trainer.run(loss_of)
    model = trainer.mean()
    whiten(model, drawings(512, 1))
    test = drawings(256, 2)
    with torch.no_grad():
        d = model.encode(test).latent_dist
        back = model.decode(d.mean).sample.clamp(-1, 1)
        rough = model.decode(d.mean + 0.1 * torch.randn_like(d.mean)).sample.clamp(-1, 1)
    record = dict(
        minutes=round(trainer.minutes, 1), steps=trainer.step, images=trainer.seen,
        mean_error=round(float((back - test).abs().mean()) / 2, 5),
        psnr=round(float(-10 * ((back - test) / 2).square().mean().log10()), 2),
        psnr_noise_0_1=round(float(-10 * ((rough - test) / 2).square().mean().log10()), 2),
        posterior_sd=round(float(d.std.mean()), 4),
    )  # fmt: skip
    print(record)
    if args.ship:
        ship("autoencoder", model, training=record)


if __name__ == "__main__":
    main()
