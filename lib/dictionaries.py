"""Sparse autoencoders of activations: train one, use it, measure it.

A *dictionary* is a plain dict of tensors: ``W_enc`` and ``W_dec`` [m, d] (a latent a row, rows of
``W_dec`` of length 1), ``b_enc`` [m], ``b_dec`` [d] and ``scale`` [], by which activations are
divided first, so that a token's mean square norm is d. With u = x / scale,

    f = choose(W_enc (u − b_dec) + b_enc),    x̂ = scale · (W_decᵀ f + b_dec).

A *choice* decides which latents speak: ``choice(sae, u, extra) -> Chosen`` with ``u`` [n, d]
already scaled and ``extra`` [n, …] whatever else it wants to know of the tokens, or None.
``topk(k)`` is the baseline (Gao et al. 2024, arXiv 2406.04093); ``mutual(k)`` gives a whole batch
one budget and ``by_latent(share)`` each latent its own (Ayonrinde 2024, arXiv 2411.02124). Chapters
write others. The products run in ``lib.kernels.topk_sae``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lib import hooks
from lib.errors import BookError
from lib.kernels import topk_sae
from lib.kernels.topk_sae import Chosen

Dictionary = dict[str, Tensor]
Choice = Callable[[Dictionary, Tensor, Tensor | None], Chosen]
PARTS = ("W_enc", "b_enc", "W_dec", "b_dec")


# --- choices --------------------------------------------------------------------------------------


def topk(k: int) -> Choice:
    """The k greatest latents of every token."""
    return lambda sae, u, extra: _encode(sae, u, k)


def mutual(k: int) -> Choice:
    """The n·k greatest of a batch of n tokens, wherever they are (mutual choice)."""
    return lambda sae, u, extra: _encode(sae, u, k * len(u), "batch")


def by_latent(share: Tensor) -> Choice:
    """Every latent i its own number of tokens, ``share[i]`` of the batch (feature choice)."""
    return lambda sae, u, extra: _encode(
        sae, u, (share * len(u)).round().long().clamp(1, len(u)), "latent"
    )


def _encode(sae: Dictionary, u: Tensor, k, by: str = "token") -> Chosen:
    return topk_sae.encode(u, sae["W_enc"], sae["b_enc"], k, by, centre=sae["b_dec"])


# --- use ------------------------------------------------------------------------------------------


def encode(
    sae: Dictionary, x: Tensor, choice: Choice, extra: Tensor | None = None, batch: int = 2048
) -> Chosen:
    """The latents chosen for tokens x [n, d] (in the model's units); ragged, token by token.

    Choices by batch see ``batch`` tokens at once.

    Returns:
        Chosen(values [pairs], indices [pairs], starts [n + 1]); values are in units of ``scale``.
    """
    _fits(sae, x)
    values, indices, counts = [], [], [torch.zeros(1, dtype=torch.int64)]
    for first in range(0, len(x), batch):
        part = slice(first, first + batch)
        got = choice(sae, x[part] / sae["scale"], None if extra is None else extra[part])
        starts = starts_of(got)
        values.append(got.values.flatten())
        indices.append(got.indices.flatten())
        counts.append(starts.diff().cpu())
    starts = torch.cat(counts).cumsum(0)
    return Chosen(torch.cat(values), torch.cat(indices), starts.to(x.device))


def decode(sae: Dictionary, chosen: Chosen) -> Tensor:
    """The reconstruction [n, d] in the model's units."""
    u = topk_sae.decode(
        chosen.values, chosen.indices, sae["W_dec"], sae["b_dec"], starts=chosen.starts
    )
    return u * sae["scale"]


def reconstruct(sae: Dictionary, x: Tensor, choice: Choice, extra: Tensor | None = None) -> Tensor:
    """``decode(encode(x))`` for x [..., d]; leading axes are kept."""
    flat = x.flatten(0, -2)
    return decode(sae, encode(sae, flat, choice, extra)).view_as(x)


def ordinary(x: Tensor, times: float = 5.0) -> Tensor:
    """Tokens without a massive activation: norm below ``times`` the median. [...] for x [..., d].

    A few tokens a passage can be a hundred times longer than all others (chapter sinks); one of
    them would outweigh everything else in a squared error, so dictionaries leave them alone.
    """
    norm = x.norm(dim=-1)
    return norm < times * norm.median()


def splice(sae: Dictionary, choice: Choice, extra: Tensor | None = None) -> Callable:
    """For ``hooks.edit``: ordinary tokens are reconstructed, the others stay what they were.

    extra: [tokens, …], for all tokens of x in their order.
    """

    def fn(x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).clone()
        keep = ordinary(flat)
        own = None if extra is None else extra[keep]
        flat[keep] = decode(sae, encode(sae, flat[keep], choice, own))
        return flat.view_as(x)

    return fn


def dense(chosen: Chosen, m: int) -> Tensor:
    """Latents as a matrix [n, m]; mostly zeros, so keep n small."""
    starts = starts_of(chosen)
    f = torch.zeros(len(starts) - 1, m, dtype=chosen.values.dtype, device=chosen.values.device)
    f[owner(starts), chosen.indices.flatten()] = chosen.values.flatten()
    return f


def owner(starts: Tensor) -> Tensor:
    """The token that owns each pair: [pairs], from ``starts`` [n + 1]."""
    return torch.repeat_interleave(
        torch.arange(len(starts) - 1, device=starts.device), starts.diff()
    )


def starts_of(chosen: Chosen) -> Tensor:
    """``chosen.starts``, also where every token has the same number of latents."""
    if chosen.starts is not None:
        return chosen.starts
    n, k = chosen.indices.shape
    return torch.arange(n + 1, device=chosen.indices.device) * k


def _fits(sae: Dictionary, x: Tensor) -> None:
    d = sae["W_dec"].shape[1]
    if x.ndim != 2 or x.shape[1] != d:
        raise BookError(f"activations of shape {tuple(x.shape)}; this dictionary reads [n, {d}]")


# --- training -------------------------------------------------------------------------------------


def start(x: Tensor, m: int, seed: int = 0) -> Dictionary:
    """A dictionary before training: random directions, encoder and decoder alike, mean as bias."""
    if x.ndim != 2 or not len(x):
        raise BookError(f"activations must be [tokens, d]; got {tuple(x.shape)}")
    mean = x.mean(0)
    scale = ((x - mean).square().sum(1).mean() / x.shape[1]).sqrt()
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(m, x.shape[1], generator=g), dim=1).to(x)
    return {
        "W_enc": W.clone(), "b_enc": W.new_zeros(m), "W_dec": W, "b_dec": mean / scale,
        "scale": scale,
    }  # fmt: skip


def train(
    x: Tensor,
    m: int,
    choice: Choice | Callable[[int, Tensor], Choice],
    steps: int = 1200,
    batch: int = 1024,
    lr: float = 1e-3,
    seed: int = 0,
    extra: Tensor | None = None,
    weak: Callable[[Tensor], Tensor] | None = None,
    k_aux: int = 64,
    aux: float = 1 / 32,
    penalty: Callable[[Dictionary, Tensor, Chosen], Tensor] | None = None,
    begin: Dictionary | None = None,
) -> tuple[Dictionary, dict]:
    """Fit a dictionary of m latents to activations.

    Mean squared error by Adam, the learning rate warmed up over 5 % of the steps and let down to
    zero over the last 20 %; decoder rows are brought back to length 1 after every step. Latents
    that ``weak`` names share an auxiliary loss: the ``k_aux`` greatest of them reconstruct the
    error that is left (Gao et al. 2024, appendix A.2).

    Args:
        x: [tokens, d], float32.
        choice: which latents speak; ``extra`` [tokens, …] is cut like x and handed to it.
        weak: rate [m] -> bool [m], which latents need help; by default those that spoke for less
            than one token in ten thousand lately.
        penalty: (sae, u [n, d], chosen) -> scalar, added to the loss.
        begin: a dictionary to go on from, in place of a random one.

    Returns:
        (dictionary, {"loss": [steps] relative squared errors, "rate": [m] share of tokens}).

    Raises:
        BookError: activations or extras of the wrong shape.
    """
    sae = start(x, m, seed) if begin is None else {k: v.clone() for k, v in begin.items()}
    if extra is not None and len(extra) != len(x):
        raise BookError(f"extra has {len(extra)} rows for {len(x)} tokens; it must have as many")
    weak = weak or (lambda rate: rate < 1e-4)
    parameters = [sae[name].requires_grad_() for name in PARTS]
    optimiser = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    g = torch.Generator().manual_seed(seed)
    rate, losses = torch.full((m,), 32 / m, device=x.device), []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * min(
            1, (step + 1) / (0.05 * steps), (steps - step) / (0.2 * steps)
        )
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=g).to(x.device)
        u = x[rows] / sae["scale"]
        chosen = choice(sae, u, None if extra is None else extra[rows])
        error = u - _decode(sae, chosen)
        loss = error.square().mean()
        losses.append(loss.item())
        if penalty is not None:
            loss = loss + penalty(sae, u, chosen)
        spoke = chosen.values.detach().flatten() > 0
        counts = torch.bincount(chosen.indices.flatten()[spoke], minlength=m)
        rate = 0.98 * rate + 0.02 * counts / len(rows)
        if aux:
            loss = loss + aux * _auxiliary(sae, u, error.detach(), weak(rate), k_aux)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            sae["W_dec"].div_(sae["W_dec"].norm(dim=1, keepdim=True).clamp(min=1e-8))
    variance = (x / sae["scale"] - (x / sae["scale"]).mean(0)).square().mean()
    sae = {name: tensor.detach() for name, tensor in sae.items()}
    return sae, {"loss": torch.tensor(losses) / variance.cpu(), "rate": rate}


def _decode(sae: Dictionary, chosen: Chosen) -> Tensor:
    return topk_sae.decode(
        chosen.values, chosen.indices, sae["W_dec"], sae["b_dec"], starts=chosen.starts
    )


def _auxiliary(sae, u, error, weak, k_aux) -> Tensor:
    which = weak.nonzero().flatten()
    if not len(which):
        return error.new_zeros(())
    few = {"W_enc": sae["W_enc"][which], "b_enc": sae["b_enc"][which]}
    few |= {"W_dec": sae["W_dec"][which], "b_dec": sae["b_dec"]}
    got = _encode(few, u, min(k_aux, len(which)))
    back = topk_sae.decode(got.values, got.indices, few["W_dec"], torch.zeros_like(sae["b_dec"]))
    return (back - error).square().mean() / error.square().mean().clamp(min=1e-8)


# --- measures -------------------------------------------------------------------------------------


def explained_variance(x: Tensor, back: Tensor) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖², over tokens [n, d]."""
    return float(1 - (x - back).square().sum() / (x - x.mean(0)).square().sum())


def rates(chosen: Chosen, m: int) -> Tensor:
    """The share of tokens for which each latent is above zero: [m]."""
    spoke = chosen.values.flatten() > 0
    n = len(starts_of(chosen)) - 1
    return torch.bincount(chosen.indices.flatten()[spoke], minlength=m) / n


def l0(chosen: Chosen) -> float:
    """Latents above zero, in the mean over tokens."""
    return float((chosen.values > 0).sum() / (len(starts_of(chosen)) - 1))


@torch.inference_mode()
def spliced_loss(model, ids: Tensor, site: str, fn=None, batch: int = 4, first: int = 1) -> Tensor:
    """Next-token loss of ``model`` on ids [n, pos] when ``site`` is put through ``fn``.

    Args:
        fn: x [batch, pos - first, d] -> the same shape, for example a reconstruction; None leaves
            the model alone.
        first: positions before it are left alone, and the losses at them left out. In the middle
            layers of most models position 0 holds a massive activation.

    Returns:
        [n, pos - 1 - first], in nats.
    """
    losses = []
    for part in ids.split(batch):
        part = part.to(model.device)
        edits = {} if fn is None else {site: fn}
        with hooks.edit(model, edits, positions=slice(first, None)):
            logits = model(part).logits[:, first:-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1 + first :].flatten(), reduction="none"
        )
        losses.append(loss.view(len(part), -1))
    return torch.cat(losses)


def recovered(whole: Tensor, spliced: Tensor, ablated: Tensor) -> float:
    """Share of the loss that ablation costs which the reconstruction saves: 1 is perfect."""
    return float(1 - (spliced.mean() - whole.mean()) / (ablated.mean() - whole.mean()))


# --- files ----------------------------------------------------------------------------------------


def pack(sae: Dictionary) -> Dictionary:
    """For a small file: matrices as int8 with a float16 step a row, the rest float16."""
    packed = {}
    for name, tensor in sae.items():
        if tensor.ndim == 2:
            step = (tensor.abs().amax(1, keepdim=True) / 127).clamp(min=1e-6).half()
            packed[name] = (tensor / step.float()).round().clamp(-127, 127).to(torch.int8)
            packed[f"{name}.step"] = step
        else:
            packed[name] = tensor.half()
    return packed


def unpack(packed: Dictionary) -> Dictionary:
    """The dictionary that ``pack`` made small, in float32; decoder rows of length 1 again."""
    sae = {}
    for name, tensor in packed.items():
        if not name.endswith(".step"):
            step = packed.get(f"{name}.step")
            sae[name] = tensor.float() if step is None else tensor.float() * step.float()
    sae["W_dec"] = torch.nn.functional.normalize(sae["W_dec"], dim=1)
    return sae
