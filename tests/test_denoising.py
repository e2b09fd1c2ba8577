"""The sampler of lib/denoising.py against diffusers' own pipelines, on tiny random networks."""

import pytest
import tiny_diffusion
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
)

from lib import denoising, diffusion, hooks, models
from lib.errors import BookError

PROMPTS = ["a red circle and a blue square", "two yellow stars on a beach"]


def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.1,
    )


@pytest.fixture(scope="module")
def text():
    model, tokenizer = models.load("minilm")
    tokenizer.model_max_length = 16
    return model, tokenizer


def unet_pipe(text, prediction="epsilon", **settings):
    unet = tiny_diffusion.unet(text=384)
    scheduler = DDIMScheduler(
        clip_sample=False, steps_offset=1, prediction_type=prediction, **settings
    )
    pipe = StableDiffusionPipeline(
        autoencoder(), text[0], text[1], unet, scheduler, None, None, requires_safety_checker=False
    )
    return quiet(pipe)


def flow_pipe(text, **settings):
    transformer = tiny_diffusion.flow(text=384, joint=1, single=1)
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    pipe = FluxPipeline(scheduler, autoencoder(), text[0], text[1], text[0], text[1], transformer)
    return quiet(pipe)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    denoising.network(pipe).requires_grad_(False).eval()
    return pipe


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(timestep_spacing="trailing"), dict(set_alpha_to_one=False)],
)
def test_a_u_net_is_sampled_as_its_pipeline_samples(text, prediction, settings):
    pipe = unet_pipe(text, prediction, **settings)
    x = denoising.noise(2, seed=0)
    want = pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=3.0, latents=x, output_type="latent"
    ).images
    denoiser = denoising.Denoiser(pipe, PROMPTS, guidance=3.0)
    got = denoising.sample(denoiser, x, denoising.levels(pipe, 4))
    assert torch.allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, dict(shift=2.0), dict(use_dynamic_shifting=True)])
def test_a_flow_is_sampled_as_its_pipeline_samples(text, settings):
    pipe = flow_pipe(text, **settings)
    x = denoising.noise(2, seed=0, size=(8, 16))
    want = pipe(
        PROMPTS,
        negative_prompt=["", ""],
        true_cfg_scale=3.0,
        height=32,
        width=64,
        num_inference_steps=4,
        latents=diffusion.pack(x),
        max_sequence_length=16,
        output_type="latent",
    ).images
    denoiser = denoising.Denoiser(pipe, PROMPTS, guidance=3.0)
    got = denoising.sample(denoiser, x, denoising.levels(pipe, 4, tokens=32))
    assert torch.allclose(diffusion.pack(got), want, atol=1e-4, rtol=1e-4)


def test_packing_comes_back():
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(diffusion.unpack(diffusion.pack(x), (6, 8)), x)
    assert torch.equal(diffusion.pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 8))


@pytest.mark.parametrize("make", [unet_pipe, flow_pipe])
def test_latents_and_pictures(text, make):
    denoiser = denoising.Denoiser(make(text), PROMPTS)
    pictures = denoiser.decode(denoising.noise(2, seed=1))
    assert pictures.shape == (2, 3, 64, 64) and 0 <= pictures.min() and pictures.max() <= 1
    x = denoiser.encode(pictures)
    vae = denoiser.pipe.vae
    raw = vae.encode(2 * pictures - 1).latent_dist.mean
    assert torch.allclose(x, (raw - 0.1) * 0.7, atol=1e-6)


@pytest.mark.parametrize("make", [unet_pipe, flow_pipe])
def test_what_is_put_into_the_loop_acts_where_it_says(text, make):
    pipe = make(text)
    denoiser, path = denoising.Denoiser(pipe, PROMPTS), denoising.levels(pipe, 3)
    x = denoising.noise(2, seed=0)
    told, seen = [], []

    def before(i, x, level):
        told.append((i, level.t))
        return x + 1

    def change(i, x, clean, noise):
        return torch.full_like(clean, 5.0), torch.zeros_like(noise)

    out = denoising.sample(denoiser, x, path, before, change, lambda i, x, clean: seen.append(x))
    assert told == [(i, level.t) for i, level in enumerate(path[:-1])]
    assert torch.allclose(out, torch.full_like(out, 5.0 * path[-1].alpha)) and len(seen) == 3


@pytest.mark.parametrize("make", [unet_pipe, flow_pipe])
def test_inversion_ends_where_sampling_begins(text, make):
    pipe = make(text)
    denoiser, path = denoising.Denoiser(pipe, PROMPTS), denoising.levels(pipe, 100)
    x = denoising.noise(2, seed=0)
    drawn = denoising.sample(denoiser, x, path)
    found = denoising.invert(denoiser, drawn, path)
    assert len(found) == 101 and torch.equal(found[-1], drawn)
    assert (found[0] - x).norm() < 0.1 * x.norm()
    coarse = denoising.invert(denoiser, drawn, denoising.levels(pipe, 5))
    assert (coarse[0] - x).norm() > (found[0] - x).norm()


@pytest.mark.parametrize("make", [unet_pipe, flow_pipe])
def test_text_maps_are_shares_of_attention(text, make):
    pipe = make(text)
    denoiser, path = denoising.Denoiser(pipe, PROMPTS, guidance=2.0), denoising.levels(pipe, 2)
    x = denoising.noise(2, seed=0)
    kind = "self_pattern" if denoiser.flow else "cross_pattern"
    with hooks.capture(denoiser.model, kind) as acts:
        denoiser(x, path[0])
    maps = denoising.text_maps(denoiser, acts, (16, 16))
    assert maps.shape == (2, 16, 16, 16)
    total = maps.sum(1)
    assert (total < 1).all() if denoiser.flow else torch.allclose(total, torch.ones_like(total))
    alone = denoising.Denoiser(pipe, PROMPTS[1:], guidance=2.0)
    with hooks.capture(denoiser.model, kind) as acts:
        alone(x[1:], path[0])
    assert torch.allclose(denoising.text_maps(alone, acts, (16, 16))[0], maps[1], atol=1e-5)
    with pytest.raises(BookError, match="of these layers"):
        denoising.text_maps(denoiser, acts, (16, 16), layers=[99])


@pytest.mark.parametrize("make", [unet_pipe, flow_pipe])
def test_the_gradient_is_that_of_the_loss(text, make):
    pipe = make(text)
    denoiser, path = denoising.Denoiser(pipe, PROMPTS), denoising.levels(pipe, 2)
    x = denoising.noise(2, seed=0)
    kind = "self_pattern" if denoiser.flow else "cross_pattern"

    def loss(acts):
        return denoising.text_maps(denoiser, acts, (8, 8))[:, 3, :4].sum((1, 2))

    slope, values = denoising.attention_gradient(denoiser, x, path[0], kind, loss)
    assert slope.shape == x.shape and values.shape == (2,) and float(slope.abs().max()) > 0
    step = 1e-2 * slope / slope.flatten(1).norm(dim=1)[:, None, None, None]
    _, after = denoising.attention_gradient(denoiser, x + step, path[0], kind, loss)
    predicted = (slope * step).sum((1, 2, 3))
    assert torch.allclose(after - values, predicted, rtol=0.1, atol=1e-7)
    other = x.clone()
    other[1] += 1  # a picture's gradient does not depend on its neighbours
    again, _ = denoising.attention_gradient(denoiser, other, path[0], kind, loss)
    assert torch.allclose(again[0], slope[0], atol=1e-7, rtol=1e-4)


def test_word_tokens(text):
    tokenizer = text[1]
    prompt = "a striped blue square"
    at = denoising.word_tokens(tokenizer, prompt, [(10, 14), (15, 21)])
    ids = tokenizer(prompt).input_ids
    assert tokenizer.convert_ids_to_tokens([ids[i] for i in at]) == ["blue", "square"]
    with pytest.raises(BookError, match="'square' has no token"):
        long = "a red circle and " * 5 + "a square"
        denoising.word_tokens(tokenizer, long, [(len(long) - 6, len(long))])


def test_noise_of_a_row_does_not_depend_on_the_batch():
    assert torch.equal(denoising.noise(5, 3)[2], denoising.noise(3, 3)[2])
    assert not torch.equal(denoising.noise(2, 3)[0], denoising.noise(2, 4)[0])
