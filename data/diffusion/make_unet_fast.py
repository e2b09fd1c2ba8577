"""Distil the U-Net to a few steps without guidance: makes unet_fast.safetensors and its json.

    python data/diffusion/make_unet_fast.py [--pairs 8192] [--minutes 18] [--scratch DIR]
    python data/diffusion/make_unet_fast.py --decay 8 --ship [--scratch DIR]

Reflow (Liu, Gong and Liu, arXiv 2209.03003), with the U-Net's own v and schedule: the guided
12-step DDIM sampler turns noise into latents, and a copy of the U-Net is trained on the straight
way between the two ends of each such pair. Its paths hardly bend, so that one to four steps follow
them, and the same noise still gives the same picture. Half of each batch starts where the student's
own four steps have come (as backward simulation in DMD2, Yin et al., arXiv 2405.14867), so that a
step mends what the one before it got wrong. The pairs are made first, in files of 512, as many as
are missing.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from look import look
from safetensors.torch import load_file, save_file
from scenes import Scenes
from torch import Tensor
from training import Trainer, arguments, attention, compiled, ship, spread

from lib import diffusion

BATCH, SHARDS, FILE = 32, 8, 512
STEPS, FEW = 12, 4  # the teacher's, the student's


@torch.no_grad()
def walk(v_of, scheduler, x: Tensor, steps: int, until: int | None = None) -> Tensor:
    """Where DDIM of ``steps`` steps is after ``until`` of them: latents [n, 4, 16, 16]."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps[:until]:
        with torch.autocast("cpu", torch.bfloat16):
            v = v_of(x, t).float()
        x = scheduler.step(v, t, x).prev_sample
    return x


def make_pairs(folder: Path, scenes: Scenes, args) -> list[dict]:
    """Files of FILE pairs, float16: noise, latents, the captions' states [.., TOKENS, 384]."""
    folder.mkdir(parents=True, exist_ok=True)
    unet = diffusion.build(UNet2DConditionModel, "unet")
    scheduler = DDIMScheduler.from_config(diffusion.read("unet")["scheduler"])
    run = compiled(lambda x, t, text: unet(x, t, text, return_dict=False)[0], args)
    empty = torch.zeros(1, diffusion.TOKENS, 384)
    empty[0, : len(scenes.empty)] = scenes.empty
    paths = [folder / f"pairs_{i}.safetensors" for i in range(args.pairs // FILE)]
    for i, path in enumerate(paths):
        if path.exists():
            continue
        g = torch.Generator().manual_seed(1_000_000 + i)
        kept: dict[str, list[Tensor]] = {"noise": [], "end": [], "text": []}
        for _ in range(FILE // 64):
            _, text, *_ = scenes.batch(64, g, drop=0)
            noise = torch.randn(64, 4, 16, 16, generator=g)
            both = torch.cat([empty.expand_as(text), text])

            def guided(x, t, both=both):
                free, told = run(torch.cat([x, x]), t.expand(len(both)), both).float().chunk(2)
                return free + diffusion.GUIDANCE * (told - free)

            found = noise, walk(guided, scheduler, noise, STEPS), text
            for name, value in zip(kept, found, strict=True):
                kept[name].append(value.half())
        part = path.with_suffix(".part")
        save_file({name: torch.cat(values) for name, values in kept.items()}, part)
        part.replace(path)
        print(f"pairs {i + 1} of {len(paths)} files", flush=True)
    return [load_file(path) for path in paths]


def main():
    args = arguments("unet_fast", 18, __doc__, pairs=8192)
    if args.pairs < FILE:
        raise SystemExit(f"--pairs {args.pairs} is less than a file of them; give {FILE} or more")
    scheduler = DDIMScheduler.from_config(diffusion.read("unet")["scheduler"])
    model = diffusion.build(UNet2DConditionModel, "unet").requires_grad_(True)
    trainer = Trainer(model, args, lr=3e-4, warmup=100)
    if args.look:
        pipe = diffusion.assemble("unet", trainer.mean(), scheduler)
        for steps in (1, 2, 4):
            how = dict(steps=steps, guidance=1.0)
            folder = args.scratch.parent / f"fast_{steps}" / "fast"
            print(steps, json.dumps(look(pipe, args.look, folder, trainer.step, **how)))
        return
    if args.minutes or args.decay:
        F.scaled_dot_product_attention = attention
        scenes = Scenes(args.scratch.parent / "scenes", SHARDS)
        pairs = make_pairs(args.scratch / "pairs", scenes, args)
        signal = scheduler.alphas_cumprod
        scheduler.set_timesteps(FEW)
        stops = scheduler.timesteps
        predict = compiled(lambda x, t, text: model(x, t, text, return_dict=False)[0], args)

        def loss_of(step):
            g = torch.Generator().manual_seed(step)
            part = pairs[torch.randint(len(pairs), (1,), generator=g).item()]
            rows = torch.randint(FILE, (BATCH,), generator=g)
            noise, x, text = (part[name][rows].float() for name in ("noise", "end", "text"))
            t = (spread(BATCH, g) * 1000).long()
            last = torch.randint(FEW, (1,), generator=g).item()
            t[::2] = stops[last]
            a = signal[t][:, None, None, None]
            mixed = a.sqrt() * x + (1 - a).sqrt() * noise
            mixed[::2] = walk(
                lambda x, t: predict(x, t.expand(len(x)), text[::2]),
                scheduler, noise[::2], FEW, last,
            )  # fmt: skip
            with torch.autocast("cpu", torch.bfloat16):
                v = predict(mixed, t, text)
            covering = (mixed - a.sqrt() * x) / (1 - a).sqrt()  # the noise, if x is what it covers
            return F.mse_loss(v.float(), a.sqrt() * covering - (1 - a).sqrt() * x), BATCH

        trainer.run(loss_of)
    if args.ship:
        record = dict(
            minutes=round(trainer.minutes),
            steps=trainer.step,
            images=trainer.seen,
            pairs=args.pairs,
        )
        ship("unet_fast", trainer.mean(), scheduler=dict(scheduler.config), training=record)


if __name__ == "__main__":
    main()
