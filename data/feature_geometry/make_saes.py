"""Train the sparse autoencoders of this chapter: 13 of SmolLM2's 30 blocks, all 6 of MiniLM.

Passages of 128 SmolLM2 tokens from Moby Dick: 768 to train on, 48 held out from its last tenth.
MiniLM reads the same passages; its rows are the last piece of every word. 1,024 latents, k = 16,
Adam at 2e-3 falling to 0, eight epochs of batches of 1,024 tokens; unit decoder rows. The first
token of a passage (an attention sink of huge norm) is left out. Inputs are scaled to unit mean
square for training, and the scale is folded back, so weights act on the raw residual stream.

    python data/feature_geometry/make_saes.py     # about 20 minutes on one core; resumes
writes saes.safetensors (int8 rows with float16 scales), after which make_matches.py can run.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from lib import checkpoint, datasets, hooks, models  # noqa: E402
from lib.kernels import topk_sae  # noqa: E402

WORK = Path(os.environ.get("WORK", Path(tempfile.gettempdir()) / "feature_geometry"))
LATENTS, K, LENGTH, TRAIN, TEST = 1024, 16, 128, 768, 48
LAYERS = (0, 1, 2, 3, 4, 5, 10, 11, 13, 14, 15, 16, 29)
SHIPPED = {"smollm2": (14, 15, 16), "minilm": (3,)}


def passages(tokenizer, n=TRAIN, held_out=False, length=LENGTH):
    """`n` passages of Moby Dick, evenly spread: ids [n, length]; the last tenth is held out."""
    ids = torch.tensor(tokenizer(datasets.moby_dick(), verbose=False).input_ids)
    cut = len(ids) * 9 // 10
    ids = ids[cut:] if held_out else ids[2000:cut]
    starts = torch.linspace(0, len(ids) - length, n).long()
    return torch.stack([ids[s : s + length] for s in starts])


def words(text, offsets):
    """Word number -> index of its last token, from the tokens' character spans."""
    ends = {}
    number, place = [], -1
    for i, c in enumerate(text):
        place += (not c.isspace()) and (i == 0 or text[i - 1].isspace())
        number.append(place)
    for index, (first, last) in enumerate(offsets):
        inside = [i for i in range(first, last) if not text[i].isspace()]
        if inside:
            ends[number[inside[-1]]] = index
    return ends


def aligned(tokenizer, other, ids):
    """One passage: its text, pairs (token of `tokenizer`, token of `other`), and their words."""
    text = tokenizer.decode(ids)
    ours = tokenizer(text, return_offsets_mapping=True)
    theirs = other(text, return_offsets_mapping=True, truncation=True, max_length=256)
    if ours.input_ids != ids.tolist():  # a passage that does not survive decoding
        return text, [], []
    a, b = (words(text, x.offset_mapping) for x in (ours, theirs))
    both = [w for w in sorted(set(a) & set(b)) if a[w] > 0]
    return text, [(a[w], b[w]) for w in both], [text.split()[w] for w in both]


@torch.inference_mode()
def capture():
    """Residual streams in float16, one file a block; word pairs for the two models."""
    model, tokenizer = models.load("smollm2")
    small, other = models.load("minilm")
    for split, n in (("test", TEST), ("train", TRAIN)):
        ids = passages(tokenizer, n, held_out=split == "test")
        if not (WORK / f"smollm2.29.{split}.safetensors").exists():
            parts = [hooks.read(model, part, "resid_post").stack("resid_post") for part in
                     ids.split(16)]  # fmt: skip
            for layer in range(30):
                x = torch.cat([p[layer, :, 1:].half() for p in parts])  # [n, 127, 576]
                checkpoint.save(WORK / f"smollm2.{layer}.{split}.safetensors", x)
        if not (WORK / f"words.{split}.safetensors").exists():
            streams, ours = [[] for _ in range(6)], []
            for row, passage in enumerate(ids):
                text, pairs, _ = aligned(tokenizer, other, passage)
                if not pairs:
                    continue
                enc = other(text, return_tensors="pt", truncation=True, max_length=256)
                acts = hooks.read(small, dict(enc), "resid_post").stack("resid_post")[:, 0]
                a, b = torch.tensor(pairs).T
                ours.append(row * (LENGTH - 1) + a - 1)  # rows of the flattened SmolLM2 stream
                for layer in range(6):
                    streams[layer].append(acts[layer, b].half())
            for layer in range(6):
                path = WORK / f"minilm.{layer}.{split}.safetensors"
                checkpoint.save(path, torch.cat(streams[layer]))
            checkpoint.save(WORK / f"words.{split}.safetensors", torch.cat(ours))
        print("captured", split, flush=True)


def stream(model, layer, split):
    """Captured activations as float32 rows [tokens, d] (MiniLM: [words, d])."""
    x = checkpoint.load(WORK / f"{model}.{layer}.{split}.safetensors").float()
    return x.flatten(0, -2)


def encode(sae, x, k=K):
    """Codes of x [n, d]: values and indices, both [n, k]."""
    return topk_sae.encode(x, sae["W_enc"], sae["b_enc"], k, centre=sae["b_dec"])


def dense(sae, x, k=K):
    """Codes of x [n, d] as a dense matrix [n, latents]."""
    code = encode(sae, x, k)
    return torch.zeros(len(x), len(sae["b_enc"])).scatter_(1, code.indices, code.values)


def train(x, seed, latents=LATENTS, k=K, epochs=8, batch=1024, lr=2e-3):
    """A TopK autoencoder on x [n, d]; thresholds are measured at the end. Returns its weights."""
    g = torch.Generator().manual_seed(seed)
    scale = x.pow(2).mean().sqrt()
    x = x / scale
    mean = x.mean(0)
    rows = x[torch.randperm(len(x), generator=g)[:latents]] - mean
    rows = rows + 0.3 * torch.randn(rows.shape, generator=g)  # apart where data rows repeat
    rows = rows / rows.norm(dim=1, keepdim=True)
    w = {"W_enc": rows.clone(), "W_dec": rows.clone(), "b_enc": torch.zeros(latents)}
    w = {name: v.requires_grad_() for name, v in (w | {"b_dec": mean.clone()}).items()}
    optimiser = torch.optim.Adam(w.values(), lr=lr, betas=(0.9, 0.99))
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: 1 - s / steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g)[: len(x) // batch * batch].split(batch):
            part = x[rows]
            code = encode(w, part, k)
            error = topk_sae.decode(code.values, code.indices, w["W_dec"], w["b_dec"]) - part
            loss = error.pow(2).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    w = {name: v.detach() for name, v in w.items()}
    w["b_enc"], w["b_dec"] = w["b_enc"] * scale, w["b_dec"] * scale
    return w | {"theta": thresholds(w, x * scale, k)}


@torch.inference_mode()
def thresholds(w, x, k=K):
    """A JumpReLU threshold a latent: the 5 % quantile of its values where it is chosen."""
    code = encode(w, x, k)
    theta = torch.zeros(len(w["b_enc"]))
    order = code.indices.flatten().argsort(stable=True)
    values, latents = code.values.flatten()[order], code.indices.flatten()[order]
    counts = torch.bincount(latents, minlength=len(theta))
    for j, own in enumerate(values.split(counts.tolist())):
        own = own[own > 0]
        theta[j] = own.quantile(0.05) if len(own) else values[values > 0].median()
    return theta


@torch.inference_mode()
def explained(w, x, k=K):
    """Share of the variance of x [n, d] that the autoencoder explains."""
    code = encode(w, x, k)
    back = topk_sae.decode(code.values, code.indices, w["W_dec"], w["b_dec"])
    return float(1 - (back - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def pack(w):
    """Weights as int8 rows with float16 scales: half the size of float16."""
    packed = {}
    for name, v in w.items():
        if v.ndim == 2:
            step = v.abs().amax(1) / 127
            packed[f"{name}.rows"] = (v / step[:, None]).round().to(torch.int8)
            packed[f"{name}.step"] = step.half()
        else:
            packed[name] = v.half()
    return packed


def unpack(packed, prefix):
    """One autoencoder from the tensors of saes.safetensors, e.g. prefix "smollm2.15"."""
    own = {n[len(prefix) + 1 :]: v for n, v in packed.items() if n.startswith(f"{prefix}.")}
    w = {n: v.float() for n, v in own.items() if "." not in n}
    for name in ("W_enc", "W_dec"):
        w[name] = own[f"{name}.rows"].float() * own[f"{name}.step"].float()[:, None]
    return w


def plan():
    """(model, layer, seed) of every autoencoder: seed 0 everywhere, two more where seeds matter."""
    jobs = [("smollm2", layer, 0) for layer in SHIPPED["smollm2"]]
    jobs += [("minilm", layer, 0) for layer in range(6)]
    for seed in (1, 2):
        jobs += [(model, layer, seed) for model in SHIPPED for layer in SHIPPED[model]]
    return jobs + [("smollm2", layer, 0) for layer in LAYERS if layer not in SHIPPED["smollm2"]]


def load(model, layer, seed=0):
    return checkpoint.load(WORK / f"sae.{model}.{layer}.{seed}.safetensors")


def main():
    from safetensors.torch import save_file

    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / "words.train.safetensors").exists():
        capture()
    for model, layer, seed in plan():
        path = WORK / f"sae.{model}.{layer}.{seed}.safetensors"
        if not path.exists():
            w = train(stream(model, layer, "train"), seed)
            checkpoint.save(path, w)
            test = explained(w, stream(model, layer, "test"))
            print(model, layer, "seed", seed, f"explains {test:.3f}", flush=True)
    kept = {}
    for model, layers in SHIPPED.items():
        for layer in layers:
            packed = pack(load(model, layer)).items()
            kept |= {f"{model}.{layer}.{name}": v.contiguous() for name, v in packed}
    save_file(kept, HERE / "saes.safetensors")


if __name__ == "__main__":
    main()
