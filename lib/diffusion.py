"""The book's own text-to-image models of the shapes world, as ordinary ``diffusers`` pipelines.

Pictures of 64 × 64 pixels live as latents of 16 × 16 × 4; captions are read by the first three
layers of MiniLM. Trained by ``data/diffusion/make_*.py``.
"""

import json
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import models
from lib.errors import BookError

SIDE = 64  # pixels
TOKENS = 32  # every caption is padded to this
GUIDANCE = 5.0  # classifier-free
# The third of MiniLM's six layers knows best whose colour is whose: of captions that name two
# things, a linear probe reads a noun's own colour 98 % right there and 90 % in the last layer, and
# on which side of the other thing it lies 87 % against 62 %.
TEXT_LAYERS = 3


class TextEncoder(nn.Module):
    """MiniLM's lower layers with the manners of the encoders that the pipelines expect.

    Their states are whitened (``data/diffusion/make_text.py``). A padded place is masked for the
    others, and its own state is zero: visible to the picture's attention, with nothing to say.
    """

    def __init__(self, bert: nn.Module, whitened: bool = True):
        super().__init__()
        bert.encoder.layer = bert.encoder.layer[:TEXT_LAYERS]
        self.bert = bert
        self.config = bert.config
        width = bert.config.hidden_size
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whiten", torch.eye(width))
        if whitened:
            for name, value in models.weights("diffusion/text.safetensors").items():
                getattr(self, name).copy_(value)

    @property
    def dtype(self) -> torch.dtype:
        return self.bert.dtype

    @property
    def device(self) -> torch.device:
        return self.bert.device

    def forward(self, input_ids: Tensor, attention_mask=None, output_hidden_states=False):
        """Token ids [batch, tokens] to states [batch, tokens, 384] (the output's item 0) and
        their mean over the caption's own tokens, ``pooler_output`` [batch, 384]."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        mask = input_ids != self.config.pad_token_id if attention_mask is None else attention_mask
        states = self.bert(input_ids, attention_mask=mask.long()).last_hidden_state
        states = (states - self.mean) @ self.whiten * mask[..., None]
        pooled = states.sum(1) / mask.sum(1, keepdim=True)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)


def text_encoder(whitened: bool = True):
    """(encoder, tokenizer): ``TextEncoder`` on the CPU, and MiniLM's tokenizer cut at ``TOKENS``.

    The tokenizer pads to no more than ``TOKENS``, whatever a pipeline asks for: ``FluxPipeline``
    would ask for 512.
    """
    bert, tokenizer = models.load("minilm", device="cpu")
    kind = type(tokenizer)

    def short(self, *args, max_length=None, **kwargs):
        return kind.__call__(self, *args, max_length=min(max_length or TOKENS, TOKENS), **kwargs)

    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": short})
    tokenizer.model_max_length = TOKENS
    return TextEncoder(bert, whitened).eval().requires_grad_(False), tokenizer


def read(name: str) -> dict:
    """``data/diffusion/<name>.json``: a model's configuration, its scheduler's, its training."""
    path = models.DATA / "diffusion" / f"{name}.json"
    if not path.is_file():
        raise BookError(f"no model {name!r}: data/diffusion/make_{name}.py makes it")
    return json.loads(path.read_text())


def build(kind: type[nn.Module], name: str) -> nn.Module:
    """The shipped model ``name`` of a ``diffusers`` class, in eval mode, float32, on the CPU."""
    model = kind.from_config(read(name)["config"])
    model.load_state_dict(models.weights(f"diffusion/{name}.safetensors"))
    return model.eval().requires_grad_(False)


def autoencoder() -> nn.Module:
    """``AutoencoderKL``: pictures [n, 3, 64, 64] in [-1, 1], latents [n, 4, 16, 16] of unit sd."""
    from diffusers import AutoencoderKL

    return build(AutoencoderKL, "autoencoder")


def assemble(kind: str, model: nn.Module, scheduler):
    """An ordinary pipeline around a denoiser: ``StableDiffusionPipeline`` around a
    ``UNet2DConditionModel`` (kind ``unet``), ``FluxPipeline`` around a ``FluxTransformer2DModel``
    (``flow``). Texts of another number of tokens than ``TOKENS`` are cut or padded to it."""
    with models._quiet():  # an import that misses torchvision says so
        from diffusers import FluxPipeline, StableDiffusionPipeline

    encoder, tokenizer = text_encoder()
    if kind == "flow":
        pipe = FluxPipeline(
            scheduler=scheduler, vae=autoencoder(), transformer=model, text_encoder=encoder,
            tokenizer=tokenizer, text_encoder_2=encoder, tokenizer_2=tokenizer,
        )  # fmt: skip
        pipe.default_sample_size = SIDE // pipe.vae_scale_factor
    else:
        pipe = StableDiffusionPipeline(
            vae=autoencoder(), text_encoder=encoder, tokenizer=tokenizer, unet=model,
            scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pack(latents: Tensor) -> Tensor:
    """Latents [n, 4, h, w] as the tokens of ``FluxPipeline``, 2 × 2 each: [n, h/2 · w/2, 16]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """What ``pack`` packed; ``size`` is (h, w)."""
    height, width = size
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


def places(rows: int, columns: int) -> Tensor:
    """Where each token of a picture lies, for rotary positions: float32 [rows · columns, 3]."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(x), y, x], 2).flatten(0, 1).float()


@torch.no_grad()
def draw(pipe, prompts: list[str], seed: int = 0, steps: int = 20, guidance=None, batch=16):
    """Sample one picture a prompt: float32 [n, 3, 64, 64] in [0, 1], on the CPU.

    The starting noise of a prompt depends on the seed and its place in the list alone, not on the
    batch. ``guidance`` by default is the one that the model was shipped with.
    """
    strength = GUIDANCE if guidance is None else guidance
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        noise = [
            torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(len(part))
        ]
        asked = dict(prompt=part, num_inference_steps=steps, generator=noise, output_type="pt")
        if hasattr(pipe, "transformer"):
            asked |= dict(negative_prompt=[""] * len(part), true_cfg_scale=strength)
        else:
            asked |= dict(guidance_scale=strength)
        images.append(pipe(**asked).images.float().cpu())
    return torch.cat(images)


# name -> (the pipeline's kind, the scheduler's class in diffusers)
PIPELINES = {
    "unet": ("unet", "DDIMScheduler"),
    "unet-fast": ("unet", "DDIMScheduler"),
    "flow": ("flow", "FlowMatchEulerDiscreteScheduler"),
}


def pipeline(name: str = "unet", device=None, dtype: torch.dtype | None = None):
    """Load one of the book's samplers.

    Args:
        name: ``unet``, a ``StableDiffusionPipeline`` with a DDIM scheduler; ``unet-fast``, the same
            distilled to four steps without guidance (``num_inference_steps=4, guidance_scale=1``);
            ``flow``, a ``FluxPipeline`` (guide it by ``negative_prompt=""`` and
            ``true_cfg_scale``).
        device, dtype: as ``models.load``.

    Raises:
        BookError: another name, or weights that are not there.
    """
    import diffusers

    if name not in PIPELINES:
        raise BookError(f"no pipeline {name!r}; there are {', '.join(PIPELINES)}")
    kind, scheduler = PIPELINES[name]
    stored = name.replace("-", "_")
    model_class = "FluxTransformer2DModel" if kind == "flow" else "UNet2DConditionModel"
    model = build(getattr(diffusers, model_class), stored)
    step = getattr(diffusers, scheduler).from_config(read(stored)["scheduler"])
    with _silent():
        return assemble(kind, model, step).to(device or models.device(), dtype or torch.float32)


@contextmanager
def _silent():
    """A move of a model makes diffusers warn of dtypes, even where there is but one."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- a picture as a prompt -----------------------------------------------------------------------

EMBED = 256  # width of a picture's embedding


class ImageEncoder(nn.Module):
    """A small convolutional net in the place of CLIP's: pictures [n, 3, 64, 64] in [0, 1] to
    ``image_embeds`` [n, 256]."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        for wide, (a, b) in enumerate(((3, 32), (32, 64), (64, 96), (96, 128))):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.SiLU()]
            layers += [nn.GroupNorm(4, b)] if wide else []
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(128 * 16, EMBED)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, pixel_values: Tensor, output_hidden_states=False):
        from transformers.models.clip.modeling_clip import CLIPVisionModelOutput

        x = self.layers(pixel_values * 2 - 1)
        return CLIPVisionModelOutput(image_embeds=self.head(x.flatten(1)))


def _crosses(unet) -> list[tuple[int, str]]:
    """The cross-attentions by the number that IP-Adapter files know them by: 1, 3, 5, …"""
    names = [n for n in unet.attn_processors if "attn2" in n]
    return [(2 * i + 1, name) for i, name in enumerate(names)]


def fresh_adapter(unet) -> dict[str, dict[str, Tensor]]:
    """Weights to begin an adapter with, in IP-Adapter's form: the keys and values of the text."""
    wide = unet.config.cross_attention_dim
    proj = nn.Linear(EMBED, 4 * wide)
    state = {"proj.weight": proj.weight, "proj.bias": proj.bias}
    state |= {"norm.weight": torch.ones(wide), "norm.bias": torch.zeros(wide)}
    own = {}
    for number, name in _crosses(unet):
        attn = unet.get_submodule(name.removesuffix(".processor"))
        own[f"{number}.to_k_ip.weight"] = attn.to_k.weight
        own[f"{number}.to_v_ip.weight"] = attn.to_v.weight
    copy = lambda part: {k: v.detach().clone() for k, v in part.items()}  # noqa: E731
    return {"image_proj": copy(state), "ip_adapter": copy(own)}


def install(unet, state: dict[str, dict[str, Tensor]]) -> None:
    """Put an adapter's weights, as ``fresh_adapter`` gives them, into a U-Net's attention."""
    with _silent():
        unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)


def adapter_weights(unet) -> dict[str, dict[str, Tensor]]:
    """What ``fresh_adapter`` gives, of a U-Net in which an adapter lives."""
    layer = unet.encoder_hid_proj.image_projection_layers[0]
    state = {k.replace("image_embeds", "proj"): v for k, v in layer.state_dict().items()}
    own = {}
    for number, name in _crosses(unet):
        for key, value in unet.attn_processors[name].state_dict().items():
            own[f"{number}.{key.replace('.0.', '.')}"] = value
    return {"image_proj": state, "ip_adapter": own}


def add_adapter(pipe, scale: float = 1.0):
    """Give the pipeline ``unet`` the book's image prompt, in place; returns it.

    Then ``pipe(prompts, ip_adapter_image=picture)`` takes a picture float32 [1, 3, 64, 64] in
    [0, 1] that all prompts share, and ``pipe.set_ip_adapter_scale`` sets its weight. A picture for
    each prompt goes to the U-Net itself: ``added_cond_kwargs={"image_embeds": [x]}`` with x
    [n, 1, 256], zero where guidance wants none.
    """
    state: dict[str, dict[str, Tensor]] = {"encoder": {}, "image_proj": {}, "ip_adapter": {}}
    for name, value in models.weights("diffusion/adapter.safetensors").items():
        kind, _, rest = name.partition(".")
        state[kind][rest] = value.to(pipe.device, pipe.unet.dtype)
    encoder = ImageEncoder()
    encoder.load_state_dict(state.pop("encoder"))
    encoder = encoder.to(pipe.device, pipe.unet.dtype).eval().requires_grad_(False)
    pipe.register_modules(image_encoder=encoder)
    install(pipe.unet, state)
    pipe.unet.requires_grad_(False)
    pipe.set_ip_adapter_scale(scale)
    return pipe
