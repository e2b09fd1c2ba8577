"""Makes frontier_omniquant.json and omniquant_learned.safetensors: OmniQuant (arXiv 2308.13137)
on SmolLM2, block after block, against round-to-nearest and a fixed (SmoothQuant) transformation.

A block's own weights stay as they are; what is learned is how far each group's range is clipped
(LWC) and, where activations are rounded too, by how much each channel is scaled before rounding
(LET). The paper takes 128 texts of 2048 tokens and 20 epochs; this takes 8 of 256 and three, with
ten to fifteen times the learning rates. About four minutes a row on one shared core; resumable.

    python data/quantization/make_omniquant.py --scratch /tmp/omniquant
"""

import argparse
import copy
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

import own_setting  # noqa: E402

from lib import metrics, models, quantization  # noqa: E402
from lib.kernels import fake_quant  # noqa: E402

EPOCHS, TEXTS = 3, 8
CLIP_RATE, LET_RATE = 0.15, 0.05
NORMS = {"self_attn": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}
SETTINGS = {  # bits, group, bits of activations
    "W3 g64": (3, 64, 16),
    "W6A6": (6, None, 6),
    "W2 g32": (2, 32, 16),
    "W4A4": (4, None, 4),
}


def linears(block) -> list[str]:
    return [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]


def scales_of(block, peaks: dict, power: float = 0.5) -> dict[str, torch.Tensor]:
    """SmoothQuant's scales (arXiv 2211.10438, eq. 4) as logarithms: where OmniQuant starts.

    ``peaks`` [in] is the largest |x| of a channel by linear. ``attn`` and ``mlp`` [d] scale what
    the norms give, ``value`` [kv] what values give to the output projection, ``query`` [kv heads,
    d_head / 2] queries against keys (both halves of a rotated pair alike); the last two start at 0.
    """
    own = dict(block.named_parameters())

    def smooth(readers):
        heights = torch.stack([own[f"{n}.weight"].abs().amax(0) for n in readers]).amax(0)
        x = peaks[readers[0]].clamp(min=1e-5)
        return power * x.log() - (1 - power) * heights.clamp(min=1e-5).log()

    attention = block.self_attn
    kv = own["self_attn.v_proj.weight"].shape[0]
    return {
        "attn": smooth([f"self_attn.{x}_proj" for x in "qkv"]),
        "mlp": smooth(["mlp.gate_proj", "mlp.up_proj"]),
        "value": peaks["self_attn.v_proj"].new_zeros(kv),
        "query": peaks["self_attn.v_proj"].new_zeros(
            kv // attention.head_dim, attention.head_dim // 2
        ),
    }


def transformed(block, scales: dict) -> dict[str, torch.Tensor]:
    """The block's parameters after the equivalent transformation: same outputs, other insides."""
    own = {n: p.detach() for n, p in block.named_parameters()}
    if not scales:
        return own
    s = {k: v.exp() for k, v in scales.items()}
    repeat = block.self_attn.num_key_value_groups
    head = block.self_attn.head_dim
    for part, readers in (("attn", "qkv"), ("mlp", ("gate", "up"))):
        inner = "self_attn" if part == "attn" else "mlp"
        own[NORMS[inner]] = own[NORMS[inner]] / s[part]
        for x in readers:
            own[f"{inner}.{x}_proj.weight"] = own[f"{inner}.{x}_proj.weight"] * s[part]
    wide = s["value"].view(-1, head).repeat_interleave(repeat, 0).flatten()
    own["self_attn.v_proj.weight"] = own["self_attn.v_proj.weight"] / s["value"][:, None]
    own["self_attn.o_proj.weight"] = own["self_attn.o_proj.weight"] * wide
    pairs = s["query"].repeat(1, 2)  # rotary embeddings turn channels i and i + d/2 together
    wide = pairs.repeat_interleave(repeat, 0).flatten()[:, None]
    own["self_attn.q_proj.weight"] = own["self_attn.q_proj.weight"] / wide
    own["self_attn.k_proj.weight"] = own["self_attn.k_proj.weight"] * pairs.flatten()[:, None]
    return own


def clips_of(block, bits: int, group: int | None, start: float = 4.0) -> dict[str, torch.Tensor]:
    """Gamma and beta of every linear, stacked: [2, out] or [2, out, in / group]."""
    own = {n: dict(block.named_parameters())[f"{n}.weight"] for n in linears(block)}
    return {
        n: w.new_full((2, len(w), *([w.shape[1] // group] if group else [])), start)
        for n, w in own.items()
    }


def quantized(block, scales: dict, clips: dict, bits: int, group: int | None):
    """Parameters after transformation and rounding: learned clipping where ``clips`` has it."""
    params = transformed(block, scales)
    for n in linears(block):
        w = params[f"{n}.weight"].contiguous()
        if clips:
            per = "channel" if group is None else "group"
            gamma, beta = clips[n]
            w = fake_quant.learned_clip(w, gamma, beta, f"int{bits}", per, group or 128)
        else:
            w = quantization.nearest(w, bits, group)
        params[f"{n}.weight"] = w
    return params


def run(block, params, x, positions, activation_bits=16):
    """The block's output on x [1, pos, d] with ``params``, inputs of linears rounded per token."""

    def hook(_, args):
        return fake_quant.fake_quantize(args[0].contiguous(), f"int{activation_bits}", per="token")

    handles = []
    if activation_bits < 16:
        handles = [block.get_submodule(n).register_forward_pre_hook(hook) for n in linears(block)]
    try:
        return torch.func.functional_call(
            block, params, (x,), dict(position_embeddings=positions), strict=False
        )
    finally:
        for handle in handles:
            handle.remove()


def learn(block, inputs, goals, positions, setting, scales, epochs=EPOCHS, clip=True):
    """Block-wise minimization: clips and scales that bring the rounded block near ``goals``.

    Args:
        inputs: states that reach the block through the blocks already quantized, [n, pos, d].
        goals: what the block gave in the unquantized model, [n, pos, d].
        scales: SmoothQuant's, to start from; empty: no transformation (weights only).

    Returns:
        clips, scales, and the loss of every step.
    """
    bits, group, activation_bits = setting
    clips = clips_of(block, bits, group) if clip else {}
    scales = {k: v.clone() for k, v in scales.items()}
    groups = [
        dict(params=[v.requires_grad_() for v in clips.values()], lr=CLIP_RATE),
        dict(params=[v.requires_grad_() for v in scales.values()], lr=LET_RATE),
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0)
    losses = []
    for _ in range(epochs):
        for x, y in zip(inputs, goals, strict=True):
            params = quantized(block, scales, clips, bits, group)
            loss = (run(block, params, x[None], positions, activation_bits) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    found = ({k: v.detach() for k, v in part.items()} for part in (clips, scales))
    return *found, losses


def watched(block, states, positions):
    """Its outputs on ``states`` [n, pos, d], and its linears' largest inputs: {name: [in]}."""
    found = {}

    def watch(name, x):
        found.setdefault(name, []).append(x.abs().amax((0, 1)))

    handles = [
        block.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: watch(n, args[0]))
        for n in linears(block)
    ]
    try:
        out = torch.cat([block(x[None], position_embeddings=positions) for x in states])
    finally:
        for handle in handles:
            handle.remove()
    return out, {n: torch.stack(seen).amax(0) for n, seen in found.items()}


def quantize_model(model, tokenizer, setting, seed, method, state: Path):
    """All blocks in turn; ``state`` keeps each finished block. Returns the parameters by block."""
    bits, group, activation_bits = setting
    ids = own_setting.calibration(tokenizer, seed, TEXTS)
    state.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        plain = model.model.embed_tokens(ids)
        positions = model.model.rotary_emb(plain, torch.arange(ids.shape[1])[None])
    rounded = plain.clone()
    for i, block in enumerate(model.model.layers):
        path, kept = state / f"{i}.safetensors", {}
        with torch.no_grad():
            if path.is_file():
                kept = load_file(path)
                if "goals" in kept and (state / f"{i + 1}.safetensors").is_file():
                    continue  # a later block's file carries the states that matter
            if "goals" not in kept:
                goals, peaks = watched(block, plain, positions)
        if "goals" in kept:
            plain, rounded = kept["goals"], kept["outputs"]
            continue
        scales = scales_of(block, peaks) if activation_bits < 16 and method != "RTN" else {}
        clips, losses = {}, []
        if method == "OmniQuant":
            clips, scales, losses = learn(block, rounded, goals, positions, setting, scales)
        with torch.no_grad():
            params = quantized(block, scales, clips, bits, group)
            rounded = torch.cat(
                [run(block, params, x[None], positions, activation_bits) for x in rounded.unbind(0)]
            )
        plain = goals
        out = {f"clip.{n}": v for n, v in clips.items()} | {
            f"let.{n}": v for n, v in scales.items()
        }
        out |= {"goals": goals, "outputs": rounded, "losses": torch.tensor(losses)}
        save_file({k: v.contiguous() for k, v in out.items()}, path)
        error = (rounded - goals).square().mean().item()
        print(method, setting, seed, "block", i, f"error {error:.4g}", losses[:1], losses[-1:],
              flush=True)  # fmt: skip
    found = []
    for i, block in enumerate(model.model.layers):
        kept = load_file(state / f"{i}.safetensors")
        clips = {k[5:]: v for k, v in kept.items() if k.startswith("clip.")}
        scales = {k[4:]: v for k, v in kept.items() if k.startswith("let.")}
        with torch.no_grad():
            found.append(quantized(block, scales, clips, bits, group))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args(argv)
    model, tokenizer = models.load("smollm2", device="cpu")
    ids = own_setting.held_out(tokenizer)
    path = HERE / "frontier_omniquant.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    layers = quantization.linears(model)
    jobs = [(seed, name) for name in args.settings for seed in args.seeds]
    for seed, name in jobs:
        bits, group, activation_bits = setting = SETTINGS[name]
        methods = ["OmniQuant"] if activation_bits == 16 else ["SmoothQuant", "OmniQuant"]
        if activation_bits < 16 and seed == 0:
            methods = ["RTN", *methods]
        for method in methods:
            if any((r["method"], r["setting"], r["seed"]) == (method, name, seed) for r in rows):
                continue
            state = args.scratch / f"{method}_{name.replace(' ', '_')}_{seed}"
            blocks = quantize_model(model, tokenizer, setting, seed, method, state)
            other = copy.deepcopy(model)
            for block, params in zip(other.model.layers, blocks, strict=True):
                block.load_state_dict(params)
            with ExitStack() as stack:
                if activation_bits < 16:
                    stack.enter_context(quantization.rounded_inputs(other, activation_bits))
                found = metrics.losses(other, ids)
            size = {
                k: own_setting.stored_bytes(m.weight.shape, bits, group) for k, m in layers.items()
            }
            row = own_setting.frontier_row(method, name, seed, found, size, activation_bits)
            rows = json.loads(path.read_text()) if path.is_file() else []  # another may have run
            rows.append(row)
            print(row, flush=True)
            path.write_text(json.dumps(rows, indent=0))
    keep_learned(args.scratch)


def keep_learned(scratch: Path) -> None:
    """For the chapter's figures: what seed 0 learned in six blocks (float16), and how much of the
    stream's largest value is left after every block, [30], under each method."""
    found = {}
    for name in SETTINGS:
        for method in ("RTN", "SmoothQuant", "OmniQuant"):
            state = scratch / f"{method}_{name.replace(' ', '_')}_0"
            files = [state / f"{i}.safetensors" for i in range(30)]
            if not files[-1].is_file():
                continue
            left = []
            for i, file in enumerate(files):
                kept = load_file(file)
                goals, outputs = kept["goals"], kept["outputs"]
                at = int(goals[0].abs().argmax())
                left.append(float(outputs[0].flatten()[at] / goals[0].flatten()[at]))
                if i not in (0, 5, 11, 17, 23, 29) or method != "OmniQuant":
                    continue
                for key, v in kept.items():
                    if key.startswith("clip."):
                        shares = torch.quantile(v.sigmoid().flatten(), torch.linspace(0, 1, 101))
                        found[f"{name}|{i}|{key}"] = shares.half()
                    elif key.startswith("let."):
                        found[f"{name}|{i}|{key}"] = v.half()
            found[f"{name}|{method}|spike"] = torch.tensor(left)
    save_file(found, HERE / "omniquant_learned.safetensors")
    print(f"kept {len(found)} tensors", flush=True)


if __name__ == "__main__":
    main()
