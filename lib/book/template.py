"""The cells that `book new` begins a chapter with: a small real measurement in every part."""

# (kind, tags, source); $slug, $title, $aim and $reading are filled in.
CELLS = (
    (
        "markdown",
        (),
        """\
# $title

$aim It has just begun: what stands here now reads one text with SmolLM2 and measures how its
residual stream grows from layer to layer, in every part that a chapter has.

```{chapter-card}
```""",
    ),
    ("markdown", (), "## Parameters"),
    (
        "code",
        ("parameters",),
        """\
text: str = "When Mary and John went to the store"  # any text; what the model reads
n_random: int = 200  # 10–2000 directions; random directions in the baseline
seed: int = 0  # 0–1000 seed; of the random directions""",
    ),
    (
        "markdown",
        (),
        """\
```{parameters-table}
```""",
    ),
    (
        "code",
        (),
        """\
import matplotlib.pyplot as plt
import torch

from lib import hooks, models, plots, widgets

model, tokenizer = models.load("smollm2")""",
    ),
    (
        "markdown",
        (),
        """\
## The idea

A decoder adds every layer's output to one vector a token, the residual stream $$x_\\ell$$. You read
it after each layer $$\\ell$$ at the site `resid_post` and ask two things: how long it is, and how
much of its direction the next layer keeps, as the cosine between $$x_\\ell$$ and $$x_{\\ell+1}$$.
Random directions in the same space are the baseline for the second.""",
    ),
    (
        "code",
        (),
        """\
inputs = tokenizer(text, return_tensors="pt").to(model.device)
acts = hooks.read(model, inputs, "resid_post")
n_layers = hooks.shape(model)["n_layers"]
stream = torch.stack([acts[f"resid_post.{layer}"][0] for layer in range(n_layers)]).cpu()
norms = stream.norm(dim=-1)  # [layer, pos]
kept = torch.cosine_similarity(stream[:-1, -1], stream[1:, -1], dim=-1)  # [layer - 1]
generator = torch.Generator().manual_seed(seed)
directions = torch.randn(n_random, stream.shape[-1], generator=generator)
chance = torch.cosine_similarity(directions[:-1], directions[1:], dim=-1).abs().mean()""",
    ),
    (
        "markdown",
        (),
        """\
Look at the last token: each layer keeps most of the direction it is given, far more than two
random directions have in common.""",
    ),
    (
        "code",
        (),
        """\
fig, ax = plt.subplots(figsize=(6, 3))
ax.plot(range(1, n_layers), kept, marker="o", label="neighbouring layers")
ax.axhline(chance, linestyle="--", color=plots.COLOURS["orange"], label="random directions")
ax.set(xlabel="layer", ylabel="cosine at the last token", ylim=(0, 1.05))
ax.legend()
plots.show(fig, alt="Cosine between the residual stream after neighbouring layers at the last "
           f"token: lowest {kept.min():.2f}, against {chance:.2f} for random directions.")""",
    ),
    (
        "markdown",
        (),
        """\
## Explore

Choose a layer to see how long the residual stream is at every token after it.""",
    ),
    (
        "code",
        (),
        """\
tokens = [tokenizer.decode(token) for token in inputs.input_ids[0]]


def draw(layer):
    fig, ax = plt.subplots(figsize=(5, 2.5))
    ax.bar(range(len(tokens)), norms[layer])
    ax.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right")
    ax.set(ylabel="length", yscale="log", title=f"after layer {layer}")
    return fig


def describe(layer):
    longest = int(norms[layer].argmax())
    return f"Length of the residual stream after layer {layer}; longest at token {longest}."


widgets.explore(draw, alt=describe, layer=list(range(0, n_layers, 3)))""",
    ),
    (
        "markdown",
        (),
        """\
## Exercises

```{exercise} The longest vector (easy, 5 min)
:label: $slug-longest

After which layer is the residual stream of the first token longest? `norms` is [layer, pos].
```""",
    ),
    ("code", ("exercise-answer",), "longest_layer = ..."),
    (
        "code",
        ("exercise-check",),
        """\
def check_longest(answer):
    right = answer is not ... and int(answer) == int(norms[:, 0].argmax())
    return "correct" if right else "not yet: take the argmax over layers of norms[:, 0]"


print(check_longest(longest_layer))""",
    ),
    (
        "code",
        ("exercise-solution", "hide-cell"),
        """\
print(check_longest(norms[:, 0].argmax()))""",
    ),
    (
        "markdown",
        (),
        """\
```{exercise} From start to end (medium, 10 min)
:label: $slug-ends

What is the cosine between the last token's residual stream after the first layer and after the
last? `stream` is [layer, pos, d_model].
```""",
    ),
    ("code", ("exercise-answer",), "end_cosine = ..."),
    (
        "code",
        ("exercise-check",),
        """\
def check_ends(answer):
    first, last = stream[0, -1], stream[-1, -1]
    expected = first @ last / (first.norm() * last.norm())
    right = answer is not ... and abs(float(answer) - float(expected)) < 1e-3
    return "correct" if right else "not yet: compare stream[0, -1] with stream[-1, -1]"


print(check_ends(end_cosine))""",
    ),
    (
        "code",
        ("exercise-solution", "hide-cell"),
        """\
print(check_ends(torch.cosine_similarity(stream[0, -1], stream[-1, -1], dim=0)))""",
    ),
    (
        "markdown",
        (),
        """\
```{exercise} What one layer adds (medium, 10 min)
:label: $slug-update

How long is the vector that each layer after the first adds at the last token? Fill in a tensor
with one length for each.
```""",
    ),
    ("code", ("exercise-answer",), "update_norms = ..."),
    (
        "code",
        ("exercise-check",),
        """\
def check_updates(answer):
    expected = stream[:, -1].diff(dim=0).norm(dim=-1)
    right = answer is not ... and answer.shape == expected.shape
    right = right and torch.allclose(answer, expected, rtol=1e-3)
    return "correct" if right else "not yet: subtract neighbouring layers, then take the norm"


print(check_updates(update_norms))""",
    ),
    (
        "code",
        ("exercise-solution", "hide-cell"),
        """\
print(check_updates((stream[1:, -1] - stream[:-1, -1]).norm(dim=-1)))""",
    ),
    (
        "markdown",
        (),
        """\
## What held up

No paper of this chapter has been put to the test yet, so there is no claim to judge and nothing
to tabulate. The measurement above is an observation on one model and one text, and supports no
more than that.""",
    ),
    (
        "markdown",
        (),
        """\
## Further reading

$reading""",
    ),
)

# A section on one paper. Its claim stops the run until it is written: nothing can pass on it.
SECTION = (
    (
        "markdown",
        (),
        """\
(paper-$key)=
## $title

{cite:t}`$key` asks: the question, and the answer, in two to six sentences of your own, with the
equation that matters. Then the method in code, prose before each cell.""",
    ),
    (
        "code",
        (),
        """\
from lib.claims import claim

measured = ...  # the experiment, on the most real thing that runs here""",
    ),
    (
        "code",
        ("nbval-check-output",),
        """\
claim("$key", says="", paper_value="", ours=measured, holds=measured)""",
    ),
)
