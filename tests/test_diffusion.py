"""The book's samplers (lib/diffusion.py) and the loop that trains them (data/diffusion).

Samplers from ``load`` are untrained, and what is tested of them holds for any weights; the shipped
ones are asked for what the book says of them.
"""

import re
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from lib import denoising, diffusion, hooks, models, shapes, shapes_score, shapes_text
from lib.errors import BookError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data" / "diffusion"))


@cache
def load(name):
    """The pipeline of a maker's fresh model, its last layer at random instead of at zero."""
    import make_flow
    import make_unet

    if name == "unet":
        model, last = make_unet.fresh(), "conv_out"
        scheduler = DDIMScheduler(**make_unet.SCHEDULER)
    else:
        model, last = make_flow.fresh(), "proj_out"
        scheduler = FlowMatchEulerDiscreteScheduler(**make_flow.SCHEDULER)
    nn.init.normal_(model.get_submodule(last).weight, std=0.02)
    return diffusion.assemble(name, model.eval().requires_grad_(False), scheduler)


PROMPTS = ["a red circle", "a blue star and a green square"]


@pytest.mark.parametrize("name", ["unet", "flow"])
def test_a_seed_draws_the_same_picture_in_any_batch(name):
    pipe = load(name)
    pictures = diffusion.draw(pipe, PROMPTS, seed=3, steps=2)
    assert pictures.shape == (2, 3, 64, 64) and 0 <= pictures.min() < pictures.max() <= 1
    alone = diffusion.draw(pipe, PROMPTS, seed=3, steps=2, batch=1)
    assert torch.allclose(pictures, alone, atol=2e-3)
    other = diffusion.draw(pipe, PROMPTS, seed=4, steps=2)
    assert (pictures - other).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["unet", "flow"])
def test_hooks_see_attention_from_picture_to_text(name):
    pipe = load(name)
    if name == "unet":
        with hooks.capture(pipe.unet, "cross_pattern") as acts:
            diffusion.draw(pipe, PROMPTS[:1], steps=1)
        sides = {a.shape[2] for a in acts.values()}
        assert sides == {64, 256}  # 8 × 8 and 16 × 16
    else:
        with hooks.capture(pipe.transformer, "self_pattern") as acts:
            diffusion.draw(pipe, PROMPTS[:1], steps=1)
        assert {a.shape[2] for a in acts.values()} == {diffusion.TOKENS + 64}
    for pattern in acts.values():
        assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-4)


@pytest.mark.parametrize("name, least", [("unet", 15), ("flow", 13)])
def test_the_shipped_samplers_draw_the_one_thing_that_is_asked_for(name, least):
    prompts = shapes_text.prompts("single", 16, seed=5)
    rows = shapes_score.score(diffusion.draw(diffusion.pipeline(name, "cpu"), prompts, 5), prompts)
    assert sum(bool(row["things"][0]["both"]) for row in rows) >= least


def test_the_fast_sampler_draws_in_four_steps_without_guidance():
    prompts = shapes_text.prompts("single", 16, seed=5)
    pipe = diffusion.pipeline("unet-fast", "cpu")
    drawn = diffusion.draw(pipe, prompts, 5, steps=4, guidance=1.0)
    assert sum(bool(row["things"][0]["both"]) for row in shapes_score.score(drawn, prompts)) >= 13


@pytest.mark.parametrize("name", diffusion.PIPELINES)
def test_the_maker_that_a_missing_model_is_told_to_come_from_is_there(name, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "DATA", tmp_path)
    with pytest.raises(BookError, match="make_") as told:
        diffusion.pipeline(name, "cpu")
    assert (ROOT / re.search(r"data/diffusion/make_\w+\.py", str(told.value))[0]).is_file()


def test_an_unknown_pipeline_is_named_in_one_line():
    with pytest.raises(BookError, match="no pipeline 'sdxl'; there are unet"):
        diffusion.pipeline("sdxl")


def test_the_text_encoder_keeps_a_caption_from_its_padding():
    encoder, tokenizer = diffusion.text_encoder()
    long = tokenizer(PROMPTS, padding="max_length", max_length=512, return_tensors="pt")
    assert long.input_ids.shape == (2, diffusion.TOKENS)
    out = encoder(long.input_ids)
    bare = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    n = bare.shape[1]
    alone = encoder(bare)
    assert torch.allclose(out[0][0, :n], alone[0][0], atol=1e-5)
    assert (out[0][0, n:] == 0).all()
    assert torch.allclose(out.pooler_output[0], alone[0][0].mean(0), atol=1e-5)


def test_tokens_and_places_are_those_of_the_pipeline():
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 16, 32)
    theirs = FluxPipeline._pack_latents(x, 2, 4, 16, 32)
    assert torch.equal(diffusion.pack(x), theirs)
    ids = FluxPipeline._prepare_latent_image_ids(2, 8, 16, "cpu", torch.float32)
    assert torch.equal(diffusion.places(8, 16), ids)


def test_the_autoencoder_keeps_a_picture_and_its_latents_have_unit_scale():
    vae = diffusion.autoencoder()
    pictures = shapes.pictures(shapes.sample(64, seed=99)) * 2 - 1
    with torch.no_grad():
        z = vae.encode(pictures).latent_dist.mean
        back = vae.decode(z).sample
    assert z.shape == (64, 4, 16, 16)
    assert 0.8 < float(z.std()) < 1.2 and float(z.mean().abs()) < 0.15
    assert float((back - pictures).abs().mean()) / 2 < 0.02


def test_an_adapter_goes_into_the_form_of_ip_adapter_and_back():
    unet = load("unet").unet
    from diffusers import UNet2DConditionModel

    tiny = UNet2DConditionModel.from_config(unet.config)
    fresh = diffusion.fresh_adapter(tiny)
    diffusion.install(tiny, fresh)
    again = diffusion.adapter_weights(tiny)
    for kind in fresh:
        assert fresh[kind].keys() == again[kind].keys()
        assert all(torch.equal(fresh[kind][k], again[kind][k]) for k in fresh[kind])
    embeds = diffusion.ImageEncoder()(torch.rand(1, 3, 64, 64)).image_embeds
    with hooks.capture(tiny, "cross_pattern", steps=True) as acts, torch.no_grad():
        tiny(
            torch.randn(1, 4, 16, 16), 500, torch.randn(1, diffusion.TOKENS, 384),
            added_cond_kwargs={"image_embeds": [embeds[:, None]]},
        )  # fmt: skip
    widths = {a.shape[-1] for steps in acts.values() for a in steps}
    assert widths == {diffusion.TOKENS, 4}


def test_the_shipped_adapter_brings_the_colour_that_the_prompt_leaves_out():
    pipe = diffusion.add_adapter(diffusion.pipeline("unet", "cpu"))
    prompts = [f"a {colour} square" for colour in shapes.COLOURS]
    things = [shapes.Thing("square", colour, "large") for colour in shapes.COLOURS]
    with torch.no_grad():
        seen = pipe.image_encoder(shapes.pictures([shapes.Scene((t,)) for t in things]))
    noise = denoising.noise(len(prompts), 2)

    def right(embeds):
        embeds = torch.cat([torch.zeros_like(embeds), embeds])[:, None]
        den = denoising.Denoiser(
            pipe, ["a square"] * len(prompts), diffusion.GUIDANCE,
            added_cond_kwargs={"image_embeds": [embeds]},
        )  # fmt: skip
        drawn = den.decode(denoising.sample(den, noise, denoising.levels(pipe, 12)))
        return sum(bool(row["things"][0]["both"]) for row in shapes_score.score(drawn, prompts))

    assert right(seen.image_embeds) >= 6
    assert right(torch.zeros_like(seen.image_embeds)) <= 3  # chance is one


def test_training_goes_on_where_it_was_cut(tmp_path):
    from training import Trainer

    class Cut(Exception):
        pass

    def trainer(folder):
        torch.manual_seed(0)
        args = Namespace(minutes=1.0, decay=0.0, scratch=folder, threads=1)
        return Trainer(nn.Linear(3, 1), args, lr=0.1, warmup=2)

    def until(last, saves, one):
        def loss_of(step):
            if step == saves:
                one.save()
            if step == last:
                raise Cut
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (one.model(x) - x.sum(1, keepdim=True)).square().mean(), 8

        with pytest.raises(Cut):
            one.run(loss_of)
        return one

    whole = until(20, -1, trainer(tmp_path / "a"))
    until(15, 12, trainer(tmp_path / "b"))  # killed at step 15, saved at 12
    rest = until(20, -1, trainer(tmp_path / "b"))
    assert rest.step == whole.step == 20 and rest.seen == whole.seen
    assert torch.equal(rest.model.weight, whole.model.weight)
    assert torch.equal(rest.ema["weight"], whole.ema["weight"])
