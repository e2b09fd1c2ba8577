"""Sample from a ``diffusers`` pipeline step by step: read each step, change it, turn it round.

Latents at a noise level are ``x = α x_0 + σ ε``. Whatever a model predicts (noise, velocity, flow)
gives ``x_0`` and ``ε``, and a deterministic step takes both to the next level's α and σ: DDIM for a
diffusion model, Euler for a flow. So one short loop serves U-Net and transformer, and chapters put
their method into it: ``before`` a step the latents, ``change`` the prediction, ``hooks`` the rest.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib import hooks
from lib.diffusion import pack, places, unpack
from lib.errors import BookError


class Level(NamedTuple):
    """A noise level: what the model is told (0 to 1,000), and the shares of picture and noise."""

    t: float
    alpha: float
    sigma: float


def is_flow(pipe) -> bool:
    """Whether the pipeline's model is a flow transformer (of the Flux kind), not a U-Net."""
    return getattr(pipe, "transformer", None) is not None


def network(pipe) -> torch.nn.Module:
    """The model that denoises: ``pipe.transformer`` or ``pipe.unet``."""
    return pipe.transformer if is_flow(pipe) else pipe.unet


def levels(pipe, steps: int, tokens: int = 64) -> list[Level]:
    """The ``steps`` + 1 levels through which the pipeline's own scheduler goes, noise first.

    Args:
        tokens: of a picture; only a flow's dynamic shift asks for them.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    if is_flow(pipe):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        shift = calculate_shift(tokens, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=shift)
        return [Level(1000 * s, 1 - s, s) for s in scheduler.sigmas.tolist()]
    scheduler.set_timesteps(steps)
    times, shares = scheduler.timesteps.tolist(), scheduler.alphas_cumprod
    end = times[-1] - scheduler.config.num_train_timesteps // steps
    kept = [float(shares[t]) for t in times]
    kept.append(float(shares[end] if end >= 0 else scheduler.final_alpha_cumprod))
    return [
        Level(t, share**0.5, (1 - share) ** 0.5)
        for t, share in zip([*times, max(end, 0)], kept, strict=True)
    ]


def noise(n: int, seed: int, size: int | tuple[int, int] = 16, channels: int = 4) -> Tensor:
    """Where sampling starts: float32 [n, channels, height, width], row i the same for every n."""
    height, width = (size, size) if isinstance(size, int) else size
    rows = []
    for i in range(n):
        generator = torch.Generator().manual_seed(1_000_003 * seed + i)
        rows.append(torch.randn(channels, height, width, generator=generator))
    return torch.stack(rows)


class Denoiser:
    """A pipeline's model together with the states of its prompts.

    Args:
        prompts: one a picture.
        guidance: weight of classifier-free guidance; 1 for none, which halves the work.
        negative: what guidance leads away from.
        extra: further keyword arguments of every forward, such as ``added_cond_kwargs``.
    """

    def __init__(
        self, pipe, prompts: Sequence[str], guidance: float = 1.0, negative: str = "", **extra
    ):
        self.pipe, self.model, self.flow = pipe, network(pipe), is_flow(pipe)
        self.prompts, self.guidance, self.extra = list(prompts), float(guidance), extra
        self.states = self._encoded(self.prompts)
        self.empty = self._encoded([negative] * len(self.prompts)) if guidance != 1 else None

    @property
    def n_text(self) -> int:
        """Tokens of text that the model sees, padding included."""
        return self.states[0].shape[1]

    @torch.no_grad()
    def _encoded(self, prompts: list[str]) -> tuple[Tensor, ...]:
        pipe, device = self.pipe, self.model.device
        if self.flow:
            length = pipe.tokenizer_2.model_max_length
            states, pooled, _ = pipe.encode_prompt(
                prompts, prompts, device=device, max_sequence_length=length
            )
            return states, pooled
        return (pipe.encode_prompt(prompts, device, 1, False)[0],)

    def inputs(self, x: Tensor, level: Level, guided: bool = False) -> dict:
        """Keyword arguments of one forward; rows without the prompts come first, if ``guided``."""
        states = self.states
        if guided and self.empty is not None:
            x = torch.cat([x, x])
            states = tuple(torch.cat(pair) for pair in zip(self.empty, states, strict=True))
        if not self.flow:
            return dict(
                sample=x, timestep=level.t, encoder_hidden_states=states[0], **self.extra
            )  # fmt: skip
        n, _, height, width = x.shape
        return dict(
            hidden_states=pack(x),
            timestep=torch.full((n,), level.t / 1000, device=x.device),
            encoder_hidden_states=states[0],
            pooled_projections=states[1],
            txt_ids=torch.zeros(states[0].shape[1], 3, device=x.device),
            img_ids=places(height // 2, width // 2).to(x.device),
            **self.extra,
        )

    def __call__(self, x: Tensor, level: Level, guided: bool = True) -> tuple[Tensor, Tensor]:
        """Predicted picture x_0 and noise ε, like ``x`` [n, channels, height, width]."""
        return self.split(x, self.raw(x, level, guided), level)

    def raw(self, x: Tensor, level: Level, guided: bool = True) -> Tensor:
        """What the model puts out, like ``x``, guided: ``split`` takes it apart."""
        out = self.model(**self.inputs(x, level, guided), return_dict=False)[0]
        out = unpack(out, x.shape[-2:]) if self.flow else out
        if guided and self.empty is not None:
            without, out = out.chunk(2)
            out = without + self.guidance * (out - without)
        return out

    def split(self, x: Tensor, out: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """x_0 and ε from what the model put out."""
        _, alpha, sigma = level
        if self.flow:  # out = ε − x_0
            return x - sigma * out, x + alpha * out
        kind = self.pipe.scheduler.config.prediction_type
        if kind == "epsilon":
            return (x - sigma * out) / alpha, out
        if kind == "v_prediction":  # out = α ε − σ x_0
            return alpha * x - sigma * out, alpha * out + sigma * x
        raise BookError(f"a scheduler that predicts {kind!r}; give epsilon or v_prediction")

    def decode(self, x: Tensor) -> Tensor:
        """Latents to pictures, float32 [n, 3, height, width] in [0, 1]."""
        vae = self.pipe.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with torch.no_grad():
            pictures = vae.decode(x / vae.config.scaling_factor + shift, return_dict=False)[0]
        return (pictures / 2 + 0.5).clamp(0, 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, height, width] in [0, 1] to latents (their mean, no sampling)."""
        vae = self.pipe.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with torch.no_grad():
            latents = vae.encode(2 * pictures - 1).latent_dist.mean
        return (latents - shift) * vae.config.scaling_factor


Before = Callable[[int, Tensor, Level], Tensor]
Change = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x: Tensor,
    path: Sequence[Level],
    before: Before | None = None,
    change: Change | None = None,
    each: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Latents ``x`` at ``path[0]`` taken to ``path[-1]``; downwards it samples.

    Args:
        before: ``before(i, x, level)`` gives the latents with which step i is made.
        change: ``change(i, x, clean, noise)`` gives the prediction that step i goes on with.
        each: told ``(i, x, clean)`` after every step.
    """
    for i, (here, there) in enumerate(pairwise(path)):
        if before is not None:
            x = before(i, x, here)
        clean, noise_ = denoiser(x, here)
        if change is not None:
            clean, noise_ = change(i, x, clean, noise_)
        x = there.alpha * clean + there.sigma * noise_
        if each is not None:
            each(i, x, clean)
    return x


@torch.no_grad()
def invert(denoiser: Denoiser, x: Tensor, path: Sequence[Level]) -> list[Tensor]:
    """DDIM inversion: the noise that leads to the latents ``x`` of a picture, and all in between.

    Each step up assumes that the prediction at the upper level, made from the lower latents, is
    the one that the step down will make; what that costs is what reconstruction loses (Song et al.,
    arXiv 2010.02502).

    Args:
        path: as for ``sample``, noise first.

    Returns:
        the latents at each level of ``path``, noise first, ``x`` last.
    """
    found = [x]
    for low, high in pairwise(reversed(path)):
        clean, noise_ = denoiser.split(x, denoiser.raw(x, high), low)
        x = high.alpha * clean + high.sigma * noise_
        found.append(x)
    return found[::-1]


# --- where the model looks for a word -------------------------------------------------------------


def word_tokens(tokenizer, prompt: str, spans: Iterable[tuple[int, int]]) -> list[int]:
    """Indices of the tokens in which the characters of ``spans`` lie, special tokens counted.

    Raises:
        BookError: a span with no token, as when the prompt was cut off before it.
    """
    told = tokenizer(
        prompt,
        return_offsets_mapping=True,
        truncation=True,
        max_length=tokenizer.model_max_length,
    )
    found = []
    for begin, end in spans:
        inside = [i for i, (a, b) in enumerate(told["offset_mapping"]) if a < end and b > begin]
        if not inside:
            raise BookError(
                f"prompt {prompt!r}: {prompt[begin:end]!r} has no token; the text encoder reads "
                f"{tokenizer.model_max_length}"
            )
        found += inside
    return sorted(set(found))


def text_maps(denoiser: Denoiser, acts, size: tuple[int, int], layers=None) -> Tensor:
    """How much each place looks at each token of the prompt.

    Args:
        acts: of ``hooks.capture`` or ``read``: ``"cross_pattern"`` of a U-Net, ``"self_pattern"``
            of a flow transformer.
        size: height and width of the maps; each layer's are scaled to it.
        layers: numbers of blocks; None for all that were captured.

    Returns:
        [n, tokens, height, width]: mean over heads and layers, for the rows with prompts. Over all
        keys that a place can look at the maps sum to 1; a flow's places look at places, too.
    """
    kind = "self_pattern" if denoiser.flow else "cross_pattern"
    found = []
    for site in acts:
        name, _, layer = site.rpartition(".")
        if name != kind or layers is not None and int(layer) not in layers:
            continue
        pattern = acts[site][-len(denoiser.prompts) :].mean(1)  # [n, query, key]
        if denoiser.flow:
            pattern = pattern[:, denoiser.n_text :, : denoiser.n_text]
        side = (pattern.shape[1] * size[0] // size[1]) ** 0.5
        grid = (round(side), round(pattern.shape[1] / side))
        maps = pattern.mT.unflatten(2, grid)
        if grid != tuple(size):
            maps = F.interpolate(maps, size, mode="bilinear", antialias=True)
        found.append(maps)
    if not found:
        raise BookError(f'text_maps finds no "{kind}" of these layers among {", ".join(acts)}')
    return torch.stack(found).mean(0)


def attention_gradient(
    denoiser: Denoiser,
    x: Tensor,
    level: Level,
    sites: str | Iterable[str],
    loss: Callable[[hooks.Activations], Tensor],
) -> tuple[Tensor, Tensor]:
    """The slope of a loss on attention, with respect to the latents.

    The forward is without guidance and ends behind the last of ``sites``.

    Args:
        loss: from activations to [n], a value a picture; pictures do not mix.

    Returns:
        the gradient, like ``x``, and the values [n].
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        acts = hooks.read(denoiser.model, denoiser.inputs(x, level), sites, detach=False)
        values = loss(acts)
        (slope,) = torch.autograd.grad(values.sum(), x)
    return slope, values.detach()
