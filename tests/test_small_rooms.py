"""The small rooms of lib: claims, metrics, plots, widgets, datasets, checkpoint."""

import base64
import io
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from lib import checkpoint, claims, datasets, metrics, plots, widgets
from lib.errors import BookError

KEY = "makelov2023subspace"


@pytest.fixture(autouse=True)
def no_claims():
    claims._made.clear()
    yield
    claims._made.clear()


@pytest.fixture
def shown(monkeypatch):
    """Run something and return what it displays, as (data, metadata) pairs."""
    outputs = []

    def display(data, raw, metadata=None):
        assert raw
        outputs.append((data, metadata))

    for room in (claims, plots, widgets):
        monkeypatch.setattr(room, "display", display)

    def run(call) -> list:
        outputs.clear()
        call()
        return list(outputs)

    return run


# --- claims ---


def test_a_claim_leaves_its_record(shown):
    ((data, metadata),) = shown(
        lambda: claims.claim(KEY, "a < b", "0.9 (Table 1)", 0.87, np.bool_(True))
    )
    record = data[claims.MIME]
    assert record == dict(
        paper=KEY, says="a < b", paper_value="0.9 (Table 1)", ours="0.87", holds=True
    )
    json.dumps(record)
    assert "a &lt; b" in data["text/html"] and "held" in data["text/plain"]


def test_held_up_counts_every_claim_once(shown):
    def both():
        claims.claim(KEY, "first", "1", 1, True)
        claims.claim(KEY, "second", "1", 2, torch.tensor(False))
        claims.claim(KEY, "first", "1", 3, False)  # the cell was run again
        claims.held_up()

    table, _ = shown(both)[-1]
    records = table[claims.MIME_TABLE]
    assert [(r["says"], r["ours"], r["holds"]) for r in records] == [
        ("second", "2", False),
        ("first", "3", False),
    ]
    assert "0 of 2 claims held" in table["text/plain"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("makelov2023subspce", "x", "1", 1, True), f'did you mean "{KEY}"'),
        ((KEY, " ", "1", 1, True), "says is empty"),
        ((KEY, "x", "", 1, True), "paper_value is empty"),
        ((KEY, "x", "1", 1, "yes"), "holds must be True or False"),
        ((KEY, "x", "1", 1, None), "holds must be True or False"),
        ((KEY, "x", "1", 1, 0.7), "holds must be True or False"),
        ((KEY, "x", "1", 1, np.array([True, False])), "holds must be True or False"),
    ],
)
def test_a_bad_claim_gets_one_line(arguments, words):
    with pytest.raises(BookError, match=re.escape(words)):
        claims.claim(*arguments)
    with pytest.raises(BookError, match="no claims yet"):
        claims.held_up()


# --- metrics ---


def test_logit_difference():
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, 1.0, 5.0]])
    right, wrong = torch.tensor([1, 2]), torch.tensor([0, 1])
    assert metrics.logit_difference(logits, right, wrong).tolist() == [3.0, 4.0]
    assert metrics.logit_difference(logits, 2, 0).tolist() == [1.0, 5.0]


def test_beats_wants_more_than_the_spread():
    assert metrics.beats([3.0, 3.1, 2.9], [1.0, 1.0, 1.0])
    assert not metrics.beats([3.0, 3.1, 2.9], [1.0, 1.0, 1.0], by=2.0)
    assert not metrics.beats([1.0, 3.0, -1.0], [0.5, 0.5, 0.5])
    assert metrics.beats([10.0, 20.0], [9.0, 19.0])  # paired: a constant lead has no spread
    assert not metrics.beats([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="two seeds"):
        metrics.beats([1.0], [0.0])


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(
        low <= 0 <= high
        for low, high in (metrics.interval(rng.normal(size=60)) for _ in range(200))
    )
    assert 0.88 <= hits / 200 <= 0.99


def test_fmt_shows_what_the_spread_supports():
    assert metrics.fmt(0.8712, 0.021) == "0.87 ± 0.02"
    assert metrics.fmt(22500.4, 130.0) == "22500 ± 130"
    assert metrics.fmt(1.5, 0.0) == "1.50 ± 0.00"


def test_pm_is_mean_and_spread_of_one_number_a_seed():
    assert metrics.pm([1.0, 2.0, 4.0]) == "2 ± 2"
    assert metrics.pm([1.0, 2.0, 4.0], digits=2) == "2.33 ± 1.53"
    assert metrics.pm(torch.tensor([0.87, 0.89, 0.85])) == "0.87 ± 0.02"
    for wrong in ([1.0], 3.0, [[1.0, 2.0], [3.0, 4.0]]):
        with pytest.raises(ValueError, match="two seeds"):
            metrics.pm(wrong)


def test_losses_of_passages_add_up_to_perplexity():
    from test_hooks import inputs_of, tiny

    model, ids = tiny("llama"), inputs_of("llama")["input_ids"]
    each = metrics.losses(model, ids)
    assert len(set(each)) == len(ids) > 1
    assert np.exp(np.mean(each)) == pytest.approx(metrics.perplexity(model, ids), rel=1e-4)


def test_perplexity_is_exp_of_the_models_own_loss():
    from test_hooks import inputs_of, tiny

    model, ids = tiny("llama"), inputs_of("llama")["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss
    assert metrics.perplexity(model, ids) == pytest.approx(float(loss.exp()), rel=1e-4)


# --- plots and widgets ---


def test_a_figure_carries_its_alt_text_and_is_closed(shown):
    fig, ax = plt.subplots()
    plots.heatmap(ax, np.eye(3), x=[1, 2, 3], y="abc", label="share", center=0)
    ((data, metadata),) = shown(lambda: plots.show(fig, "A diagonal of ones on zeros."))
    assert metadata["image/png"]["alt"] == "A diagonal of ones on zeros."
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert not plt.get_fignums()
    with pytest.raises(BookError, match="alt text"):
        plots.show(fig, "figure")


def test_a_figure_has_a_palette_unless_it_holds_a_photograph():
    def drawn(values):
        fig, ax = plt.subplots()
        ax.imshow(values)
        return Image.open(io.BytesIO(base64.b64decode(plots.png(fig))))

    lines, photo = drawn(np.eye(3)), drawn(datasets.photos()["chelsea"])
    assert lines.mode == "P" and photo.mode == "RGB"
    assert lines.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_same_figure_gives_the_same_bytes():
    def draw():
        fig, ax = plt.subplots()
        ax.plot([1, 3, 2])
        return plots.png(fig)

    assert draw() == draw()


def test_a_panel_holds_every_state_and_starts_where_told(shown):
    seen = []

    def render(layer, kind):
        seen.append((layer, kind))
        return f"<p>{layer} {kind}</script></p>"

    start = dict(layer=2, kind="b")
    ((data, metadata),) = shown(
        lambda: widgets.explore(render, "text", start=start, layer=[1, 2, 3], kind=["a", "b"])
    )
    page = data["text/html"]
    states = re.search(r'class="explore-states">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(states) == [f"<p>{n} {k}</script></p>" for n in (1, 2, 3) for k in "ab"]
    assert page.count('type="range"') == 1 and page.count("<select") == 1
    assert 'aria-live="polite"><p>2 b' in page
    assert "application/vnd.jupyter.widget-view+json" in data
    assert set(seen) == {(n, k) for n in (1, 2, 3) for k in "ab"}


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ({}, "list of values"),
        ({"a": []}, "list of values"),
        ({"a": list(range(99))}, "too many"),
        ({"a": [1], "start": {"a": 7}}, "not a state"),
    ],
)
def test_a_bad_panel_gets_one_line(states, words):
    with pytest.raises(BookError, match=words):
        widgets.explore(lambda a: "x", "text", **states)
    with pytest.raises(BookError, match="figure or HTML"):
        widgets.explore(lambda a: 7, "text", a=[1])


# --- datasets ---


def test_ioi_prompts_differ_in_one_token_of_equal_length():
    from lib import models

    tokenizer = models.load("smollm2", device="cpu")[1]
    prompts = datasets.ioi(40, seed=3)
    assert prompts == datasets.ioi(40, seed=3) != datasets.ioi(40, seed=4)
    assert {p["order"] for p in prompts} == {"ABB", "BAB"}
    for p in prompts:
        clean, corrupt = tokenizer(p["prompt"]).input_ids, tokenizer(p["corrupt"]).input_ids
        differ = [i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        assert len(differ) == 1
        assert [clean[differ[0]]] == tokenizer(p["s"]).input_ids
        assert [corrupt[differ[0]]] == tokenizer(p["io"]).input_ids
        words = re.findall(r" \w+", " " + p["prompt"])
        assert words.count(p["s"]) == 2 and words.count(p["io"]) == 1
    with pytest.raises(BookError, match="at least one"):
        datasets.ioi(0)


def test_a_text_of_the_readers_own_takes_the_place_of_moby_dick(tmp_path):
    whole = datasets.moby_dick()
    assert datasets.text() == whole and datasets.text(start=30_000) == whole[30_000:]
    mine = tmp_path / "mine.txt"
    mine.write_text("Ein Käfer.", encoding="utf-8")
    assert datasets.text(str(mine), 10, start=5) == "Ein Käfer."
    with pytest.raises(BookError, match="has 10 characters; this setting needs 1,000"):
        datasets.text(str(mine), 1000)
    with pytest.raises(BookError, match="cannot be read; give moby_dick or the path"):
        datasets.text(str(tmp_path / "none.txt"))
    mine.write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(BookError, match="is not UTF-8"):
        datasets.text(str(mine))


def test_passages_keep_to_their_part_of_the_book():
    class Words:  # a token for each character, so that a token tells where it stands
        def __call__(self, text):
            return type("Out", (), {"input_ids": [ord(c) for c in text]})

    whole = datasets.moby_dick()
    for part, (begin, end) in {"calibration": (0, 0.7), "held out": (0.8, 1)}.items():
        ids = datasets.passages(Words(), part, 3, 64, seed=5)
        assert ids.shape == (3, 64) and torch.equal(ids, datasets.passages(Words(), part, 3, 64, 5))
        assert not torch.equal(ids, datasets.passages(Words(), part, 3, 64, 6))
        for row in ids.tolist():
            at = whole.index("".join(map(chr, row)))
            assert begin * len(whole) - 1 <= at < end * len(whole)
    with pytest.raises(BookError, match="calibration, held out"):
        datasets.passages(Words(), "test", 1)

    class Long(Words):
        def __call__(self, text):
            return type("Out", (), {"input_ids": [0] * (len(text) // 9)})

    with pytest.raises(BookError, match="shorter than 64"):
        datasets.passages(Long(), "held out", 1, 64)


def test_images_and_text_are_what_they_say():
    for images in (datasets.mnist(), datasets.fashion_mnist()):
        assert images["x_train"].shape == (10_000, 28, 28) and images["x_train"].dtype == np.uint8
        assert images["x_test"].shape == (2_000, 28, 28) and set(images["y_test"]) == set(range(10))
    assert "Call me Ishmael." in datasets.moby_dick()
    assert all(p.dtype == np.uint8 and p.shape[2] == 3 for p in datasets.photos().values())


# --- checkpoint --------------------------------------------------------------------------------


def test_a_checkpoint_comes_back(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    tree = dict(
        step=7, rate=0.25, name="a", none=None, flags=[True, False], rows=[{"k": torch.arange(3)}],
        net=net.state_dict(), optimizer=optimizer.state_dict(), scalar=torch.tensor(2.5),
        shared=[net.weight, net.weight], turned=torch.arange(6).view(2, 3).T,
    )  # fmt: skip
    path = tmp_path / "new" / "a.safetensors"
    checkpoint.save(path, tree)
    back = checkpoint.load(path)
    assert list(back) == list(tree)
    assert [back[k] for k in ("step", "rate", "name", "none", "flags")] == [
        7, 0.25, "a", None, [True, False]
    ]  # fmt: skip
    assert torch.equal(back["turned"], tree["turned"]) and float(back["scalar"]) == 2.5
    assert torch.equal(back["rows"][0]["k"], torch.arange(3))
    other = torch.optim.Adam(net.parameters())
    other.load_state_dict(back["optimizer"])
    kept = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], kept)
    net.load_state_dict(back["net"])
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_checkpoint_refuses_what_it_cannot_keep(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, dict(step=1))
    with pytest.raises(BookError, match="not Linear"):
        checkpoint.save(path, dict(net=torch.nn.Linear(1, 1)))
    assert checkpoint.load(path) == dict(step=1), "the old one stays"
    path.write_bytes(b"torn")
    for bad in (path, tmp_path / "none.safetensors"):
        with pytest.raises(BookError, match="is no checkpoint"):
            checkpoint.load(bad)
