"""Five agents on a ring or a complete graph train, merge and train again (DIMAT, arXiv 2404.08079).

Each agent starts from its own initialization and has 1,000 images of Fashion-MNIST at 14 × 14
pixels: a fifth of every class (``iid``), five classes (``half``) or two (``classes``). It trains
alone for fifteen epochs; then the agents communicate in one of five ways. ``matched`` (DIMAT):
every two epochs, average with the neighbours after matching their channels. ``once``: match at
the first meeting only. ``plain``: the same schedule without matching. ``consensus`` (CDMSGD):
average with the neighbours before every step. ``alone``: never. Writes ``dimat_runs.json`` (a row
a seed) and ``dimat_nets.safetensors`` (the agents before they meet).
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import own_merge as om  # noqa: E402

from lib import vision  # noqa: E402

AGENTS, WIDTH, SHARE, PROXY = 5, 12, 1000, 250
ALONE, EPOCHS, BATCH, RATE = 15, 2, 100, 0.05
ROUNDS = {"iid": 4, "half": 4, "classes": 1}
GRAPHS, SPLITS, SEEDS = ("ring", "complete"), ("iid", "half", "classes"), (0, 1, 2)
# The best of 0.005 to 0.2 for each, on a seed that is not used otherwise (half: in between).
LOCAL, CONSENSUS = 0.02, {"iid": 0.1, "half": 0.05, "classes": 0.02}


def data():
    """Images at 14 × 14 and labels: (5,000 for the agents, 250 unlabelled proxies, 1,000 tests)."""
    x, y, test, labels = vision.images()
    x, test = om.halve(x), om.halve(test)
    return x[: AGENTS * SHARE], y[: AGENTS * SHARE], x[-PROXY:], test[:1000], labels[:1000]


def shares(y, split: str, seed: int) -> list[torch.Tensor]:
    """Which images each agent has, [AGENTS][about SHARE]: of all classes, of five or of two."""
    g = torch.Generator().manual_seed(seed)
    if split == "iid":
        return list(torch.randperm(len(y), generator=g).split(SHARE))
    order, many = torch.randperm(10, generator=g), {"half": 5, "classes": 2}[split]
    mine = [[] for _ in range(AGENTS)]
    for place, name in enumerate(order.tolist()):
        holders = [a for a in range(AGENTS) if (place - 2 * a) % 10 < many]
        rows = (y == name).nonzero()[:, 0]
        for holder, part in zip(holders, rows.tensor_split(len(holders)), strict=True):
            mine[holder].append(part)
    return [torch.cat(parts) for parts in mine]


def mixing(graph: str, agents: int = AGENTS) -> torch.Tensor:
    """Π [agents, agents]: agent i gives weight Π[i, j] to agent j; every row and column sums to 1.

    On a ring an agent hears its two neighbours, on a complete graph everyone; all weigh the same.
    """
    if graph == "complete":
        return torch.full((agents, agents), 1 / agents)
    near = torch.eye(agents)
    return (near + near.roll(1, 1) + near.roll(-1, 1)) / 3


def meet(nets, weights, proxy, matched=True, reset=True):
    """Every agent averages its neighbours into its own order of channels, all at once.

    Where all hear all with the same weights, every agent would get one and the same net, up to
    its order: it is made once.
    """
    seen = [om.units(net, proxy) for net in nets] if matched else None
    alike, met = bool((weights == weights[0]).all()), []
    for i, row in enumerate(weights[:1] if alike else weights):
        others = [j for j in row.nonzero()[:, 0].tolist() if j != i]
        group = [nets[i]]
        for j in others:
            group.append(om.permute(nets[j], om.match(seen[i], seen[j])) if matched else nets[j])
        mixed = om.average(group, [float(row[j]) for j in (i, *others)])
        met.append(om.reset_norm(mixed, proxy) if reset else mixed.eval())
    return [copy.deepcopy(met[0]) for _ in nets] if alike else met


def consensus_steps(nets, momenta, x, y, mine, weights, epochs, rate, seed):
    """CDMSGD in place: before each step every agent takes its neighbours' mean, then its own
    gradient's step with momentum 0.9."""
    orders = []
    for agent, rows in enumerate(mine):
        g = torch.Generator().manual_seed(seed * 100 + agent)
        orders.append(
            [
                b
                for _ in range(epochs)
                for b in rows[torch.randperm(len(rows), generator=g)].split(BATCH)
            ]
        )
    to_vector = torch.nn.utils.parameters_to_vector
    for net in nets:
        net.train()
    steps = min(len(order) for order in orders)
    for step in range(steps):
        theta = torch.stack([to_vector(net.parameters()).detach() for net in nets])
        slopes = []
        for net, order in zip(nets, orders, strict=True):
            loss = F.cross_entropy(net(x[order[step]]), y[order[step]])
            slopes.append(to_vector(torch.autograd.grad(loss, list(net.parameters()))))
        momenta.mul_(0.9).add_(torch.stack(slopes))
        for net, new in zip(nets, weights @ theta - rate * momenta, strict=True):
            torch.nn.utils.vector_to_parameters(new, net.parameters())
    return steps


def read(nets, proxy, test, labels) -> float:
    """Mean test accuracy of the agents; each is read with its statistics measured on the proxy."""
    nets = [om.reset_norm(copy.deepcopy(net), proxy) for net in nets]
    return sum(1 - om.score(net, test, labels)[1] for net in nets) / len(nets)


def pretrained(seed: int, split: str, x, y):
    """The agents after ``ALONE`` epochs by themselves, each from its own initialization."""
    mine, nets = shares(y, split, seed), []
    for agent, rows in enumerate(mine):
        net = vision.conv_net(WIDTH, seed=100 * seed + agent)
        vision.train(
            net,
            x[rows],
            y[rows],
            epochs=ALONE,
            batch=BATCH,
            rate=RATE,
            optimizer="sgd",
            seed=100 * seed + agent,
        )
        nets.append(net)
    return nets, mine


def run(method, nets, mine, graph, seed, sets, rate=LOCAL, rounds=2) -> dict:
    """One schedule: accuracy after each meeting and after each training, and bytes sent."""
    x, y, proxy, test, labels = sets
    nets, weights = [copy.deepcopy(net) for net in nets], mixing(graph)
    size = 4 * sum(p.numel() for p in nets[0].parameters())
    edges = int((weights > 0).sum()) - AGENTS  # who sends a model to whom
    merges = method in ("matched", "once", "plain")
    sent = (AGENTS - 1) * proxy.numel() if merges else 0  # a byte a pixel
    momenta = torch.zeros(AGENTS, size // 4)
    row = dict(method=method, graph=graph, met=[], trained=[], sent=[])
    for at in range(rounds):
        if method == "consensus":
            steps = consensus_steps(
                nets, momenta, x, y, mine, weights, EPOCHS, rate, seed + 10 * at
            )
            sent += edges * size * steps
        else:
            if merges:
                match = method == "matched" or method == "once" and at == 0
                nets = meet(nets, weights, proxy, matched=match)
                sent += edges * size
                some = nets[:1] if graph == "complete" else nets
                row["met"].append(round(read(some, proxy, test, labels), 4))
            for agent, (net, rows) in enumerate(zip(nets, mine, strict=True)):
                vision.train(
                    net,
                    x[rows],
                    y[rows],
                    epochs=EPOCHS,
                    batch=BATCH,
                    rate=rate,
                    optimizer="sgd",
                    schedule="constant",
                    seed=1000 * at + 10 * seed + agent,
                )
        row["trained"].append(round(read(nets, proxy, test, labels), 4))
        row["sent"].append(sent)
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "dimat_state",
        help="folder for finished rows",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args(argv)
    state = args.scratch
    state.mkdir(parents=True, exist_ok=True)
    sets = data()
    x, y, proxy, test, labels = sets
    found = []
    for seed in args.seeds:
        for split in SPLITS:
            path = state / f"{split}_{seed}.json"
            if not path.exists():
                start = time.time()
                nets, mine = pretrained(seed, split, x, y)
                row = dict(seed=seed, split=split, first={}, runs=[])
                row["before"] = round(read(nets, proxy, test, labels), 4)
                for graph in GRAPHS:
                    for name, how in (
                        ("matched", (True, True)),
                        ("plain", (False, True)),
                        ("matched, old statistics", (True, False)),
                        ("plain, old statistics", (False, False)),
                    ):
                        met = meet(nets, mixing(graph), proxy, *how)
                        some = met[:1] if graph == "complete" else met
                        got = sum(1 - om.score(n, test, labels)[1] for n in some) / len(some)
                        row["first"][f"{graph}: {name}"] = round(got, 4)
                    for method in ("matched", "once", "plain", "consensus"):
                        rate = CONSENSUS[split] if method == "consensus" else LOCAL
                        how = (graph, seed, sets, rate, ROUNDS[split])
                        row["runs"].append(run(method, nets, mine, *how))
                if split == "iid":
                    row["runs"].append(
                        run("alone", nets, mine, "ring", seed, sets, rounds=ROUNDS[split])
                    )
                if seed == SEEDS[0] and split != "half":
                    save_file(
                        {
                            f"{split}.{i}.{k}": v.half() if v.is_floating_point() else v
                            for i, net in enumerate(nets)
                            for k, v in net.state_dict().items()
                        },
                        state / f"{split}.safetensors",
                    )
                path.write_text(json.dumps(row))
                print(f"{split} {seed}: {time.time() - start:.0f} s", row["before"], row["first"])
                for r in row["runs"]:
                    print("  ", r["graph"], r["method"], r["met"], r["trained"], flush=True)
            found.append(json.loads(path.read_text()))
    settings = dict(
        agents=AGENTS,
        width=WIDTH,
        share=SHARE,
        proxy=PROXY,
        alone=ALONE,
        epochs=EPOCHS,
        batch=BATCH,
        rate=RATE,
        local=LOCAL,
        consensus=CONSENSUS,
    )
    lines = ",\n".join(json.dumps(row) for row in found)
    (HERE / "dimat_runs.json").write_text(
        f'{{"settings": {json.dumps(settings)},\n"rows": [\n{lines}\n]}}\n'
    )
    tensors = {}
    for split in ("iid", "classes"):
        tensors |= load_file(state / f"{split}.safetensors")
    save_file(tensors, HERE / "dimat_nets.safetensors")


if __name__ == "__main__":
    main()
