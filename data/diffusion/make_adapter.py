"""Train the image prompt of the U-Net: makes adapter.safetensors and adapter.json.

    python data/diffusion/make_adapter.py [--minutes 30] [--scratch DIR]
    python data/diffusion/make_adapter.py --decay 8 --ship [--scratch DIR]

IP-Adapter (Ye et al., arXiv 2308.06721): the U-Net stays as it is, every cross-attention gets keys
and values of its own for four tokens that a projection makes of a picture's embedding. As there,
the picture is the training picture itself, its ground included, and caption, picture or both are
dropped now and then. No vision model comes with the book, so that the encoder, a small
convolutional net, first learns to say from its embedding what lies where, and goes on with that
while it is trained along.
Captions of the web leave out most of what their picture shows, and what they leave out the adapter
has to bring. So half of the pictures show a single thing, by turns a plain one and a subject of
``lib.shapes_subjects``, under a caption that never says its colours and says its ground half of the
time. Subjects are the numbers 1,000 to 1,259; tests keep to the first thousand.
"""

import json
import random

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from scenes import KINDS, SHARD, Reader, Scenes, layout, states
from torch import nn
from training import HERE, Trainer, arguments, attention, spread

from lib import diffusion, shapes, shapes_subjects

BATCH, SHARDS = 32, 4
FIRST = 5000  # steps of the encoder alone
NAMING = 0.1  # weight of its task from then on


def subject_layout(subject, picture: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As ``scenes.layout``, of a subject: each pixel has the nearer of its two colours."""
    pair = (subject.colour, subject.second)
    tones = torch.tensor([shapes.COLOURS[colour] for colour in pair])[:, :, None, None]
    far = (picture - tones).square().sum(1)
    parts = torch.stack([far[0] <= far[1], far[0] > far[1]]) * mask
    cells = lambda x: x.unflatten(1, (8, 8)).unflatten(0, (8, 8)).mean((1, 3))  # noqa: E731
    found = torch.zeros(sum(len(names) + 1 for names in KINDS), 8, 8)
    shape, colour = 1 + len(KINDS[0]), 1 + len(KINDS[1])
    found[1 + KINDS[0].index(subject.shape)] = cells(mask)
    for name, part in zip(pair, parts, strict=True):
        found[shape + 1 + list(KINDS[1]).index(name)] += cells(part)
    found[shape + colour + 1 + KINDS[2].index("plain")] = cells(mask)
    for start in (0, shape, shape + colour):
        found[start] = 1 - cells(mask)
    return (found.clamp(0, 1) * 255).round().byte()


@torch.no_grad()
def single_shard(seed: int = 0, n: int = SHARD // 2) -> dict[str, torch.Tensor]:
    """A shard of pictures of one thing, with captions that leave out its looks."""
    rng, vae, grounds = random.Random(seed), diffusion.autoencoder(), list(shapes.BACKGROUNDS)
    pictures, layouts, captions, latents = [], [], [], []
    for i in range(n):
        ground, scale = rng.choice(grounds), rng.choice(("medium", "large"))
        if i % 2:
            thing = shapes_subjects.subject(rng.randrange(1000, 1260))
            picture, mask = shapes_subjects.reference(thing, seed * n + i, ground, scale=scale)
            layouts.append(subject_layout(thing, picture, mask))
        else:
            low = 0.56 * shapes.SIZES[scale] + 0.01
            looks = rng.choice(shapes.SHAPES), rng.choice(list(shapes.COLOURS)), scale
            thing = shapes.Thing(*looks, x=rng.uniform(low, 1 - low), y=rng.uniform(low, 1 - low))
            scene = shapes.Scene((thing,), ground)
            picture, _ = shapes.draw(scene)
            layouts.append(layout(scene))
        where = f" {rng.choice(shapes.SAID[ground])}" if rng.random() < 0.5 else ""
        captions.append(f"a {thing.shape}{where}")
        pictures.append((picture * 255).round().byte())
    for part in torch.stack(pictures).split(64):
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(part / 127.5 - 1).latent_dist.mean.half())
    rows, begin = states(captions)
    return {
        "states": rows, "begin": begin, "latents": torch.cat(latents),
        "layouts": torch.stack(layouts), "pictures": torch.stack(pictures),
    }  # fmt: skip


class Whole(nn.Module):
    """What is trained: the image encoder and the adapter's weights, that live in the U-Net."""

    def __init__(self, encoder, unet):
        super().__init__()
        self.encoder, self.projection = encoder, unet.encoder_hid_proj
        self.spread = nn.Linear(diffusion.EMBED, 64 * 32)  # over the places that the reader names
        self.reader = Reader(32)
        self.processors = nn.ModuleList(
            p for p in unet.attn_processors.values() if isinstance(p, nn.Module)
        )


def main():
    args = arguments("adapter", 30, __doc__)
    torch.manual_seed(0)
    unet = diffusion.build(UNet2DConditionModel, "unet")
    encoder = diffusion.ImageEncoder().requires_grad_(True)
    diffusion.install(unet, diffusion.fresh_adapter(unet))
    whole = Whole(encoder, unet).requires_grad_(True)
    trainer = Trainer(whole, args, lr=1e-3, warmup=200, muon=True)
    if args.minutes or args.decay:
        F.scaled_dot_product_attention = attention
        scenes = Scenes(args.scratch.parent / "scenes", SHARDS, pictures=True)
        scenes.parts += SHARDS * [single_shard()]
        signal = DDIMScheduler.from_config(diffusion.read("unet")["scheduler"]).alphas_cumprod

        def loss_of(step):
            g = torch.Generator().manual_seed(step)
            x, text, _, layouts, pictures = scenes.batch(BATCH, g, drop=0.3)
            t = (spread(BATCH, g) * 1000).long()
            noise = torch.randn(x.shape, generator=g)
            seen = (torch.rand(BATCH, 1, generator=g) > 0.1).float()
            a = signal[t][:, None, None, None]
            with torch.autocast("cpu", torch.bfloat16):
                embeds = encoder(pictures / 255).image_embeds
                named = whole.reader(whole.spread(embeds).unflatten(1, (64, 32)), layouts)
                if step < FIRST:
                    return named, BATCH
                embeds = embeds * seen  # a dropped picture is zero
                v = unet(
                    a.sqrt() * x + (1 - a).sqrt() * noise, t, text, return_dict=False,
                    added_cond_kwargs={"image_embeds": [embeds[:, None]]},
                )[0]  # fmt: skip
            error = (v.float() - (a.sqrt() * noise - (1 - a).sqrt() * x)).square().mean((1, 2, 3))
            snr = signal[t] / (1 - signal[t])
            return (error * (5 / (snr + 1)).clamp(max=1)).mean() + NAMING * named, BATCH

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
