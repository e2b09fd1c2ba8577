"""Small image classifiers (lib/vision.py) and what is done to their images (lib/corruptions.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import corruptions, hooks, vision
from lib.errors import BookError


def some(n=200):
    x, y, *_ = vision.images("mnist")
    return x[:n], y[:n]


def test_images_are_in_the_unit_range_with_a_label_each():
    x_train, y_train, x_test, y_test = vision.images()
    assert x_train.shape == (10000, 1, 28, 28) and x_test.shape == (2000, 1, 28, 28)
    assert 0 <= float(x_train.min()) < float(x_train.max()) <= 1
    assert y_train.unique().tolist() == y_test.unique().tolist() == list(range(10))
    with pytest.raises(BookError, match="give fashion_mnist or mnist"):
        vision.images("cifar")


@pytest.mark.parametrize("make", [vision.conv_net, vision.vit])
def test_a_network_learns_and_the_same_seeds_learn_the_same(make):
    x, y = some()
    nets = [make(seed=3), make(seed=3)]
    logs = [vision.train(net, x, y, epochs=10, rate=3e-3, batch=20, seed=5) for net in nets]
    assert logs[0] == logs[1] and logs[0][-1] < logs[0][0]
    assert torch.equal(vision.logits(nets[0], x), vision.logits(nets[1], x, batch=200))
    assert vision.accuracy(nets[0], x, y) > 0.4
    assert not nets[0].training


def test_train_hands_over_what_it_is_asked_to():
    x, y = some(40)
    net, seen, orders = vision.conv_net(width=2, norm=False), [], []

    def augment(xb, generator):
        orders.append(float(torch.rand(1, generator=generator)))
        return xb + 1

    def loss(model, xb, yb):
        assert model.training and float(xb.min()) >= 1
        return model(xb).square().mean()

    def each(epoch, model):
        seen.append(epoch)
        model.eval()

    asked = dict(optimizer="sgd", schedule="constant", loss=loss, augment=augment, each=each)
    vision.train(net, x, y, epochs=2, batch=16, **asked)
    assert seen == [1, 2] and len(set(orders)) == 6
    for wrong in (dict(optimizer="lion"), dict(schedule="step")):
        with pytest.raises(BookError, match="is unknown; give"):
            vision.train(net, x, y, epochs=1, **wrong)
    with pytest.raises(BookError, match="40 images and 39 labels"):
        vision.train(net, x, y[:-1], epochs=1)


def test_the_networks_names_and_refusals():
    names = [name for name, _ in vision.conv_net().named_children()]
    stage = "conv{0} norm{0} relu{0} pool{0}"
    assert names == " ".join(map(stage.format, (1, 2, 3))).split()[:-1] + ["mean", "head"]
    assert not any(n.startswith("norm") for n, _ in vision.conv_net(norm=False).named_children())
    with pytest.raises(BookError, match="come out even"):
        vision.vit(patch=5)


def test_a_convolution_is_a_site_like_any_other():
    x, _ = some(2)
    net = vision.conv_net(width=4)
    with hooks.capture(net, ["relu1"]) as seen:
        vision.logits(net, x)
    assert seen["relu1"].shape == (2, 4, 28, 28)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(corruptions.KINDS),
    severity=st.integers(1, 5),
    seed=st.integers(0, 9),
    channels=st.sampled_from((1, 3)),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
)
def test_corrupted_images_are_images_and_a_seed_repeats_them(
    kind, severity, seed, channels, height, width
):
    x = torch.rand(3, channels, height, width, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    found = corruptions.corrupt(x, kind, severity, seed)
    assert found.shape == x.shape and found.dtype == x.dtype and found.isfinite().all()
    assert 0 <= float(found.min()) and float(found.max()) <= 1
    assert torch.equal(found, corruptions.corrupt(x, kind, severity, seed))
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_each_severity_is_further_from_the_clean_image(kind):
    x, _ = some(100)
    distances = [
        float((corruptions.corrupt(x, kind, severity) - x).square().mean())
        for severity in range(1, 6)
    ]
    assert distances == sorted(distances) and distances[0] > 0


def test_a_shift_moves_and_nothing_else():
    x = torch.zeros(20, 1, 28, 28)
    x[:, :, 14, 14] = 1
    moved = corruptions.corrupt(x, "shift", 5)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(20))
    at = moved.flatten(1).argmax(1)
    steps = torch.stack([at // 28 - 14, at % 28 - 14]).float().norm(dim=0)
    assert ((steps - 7).abs() <= 0.71).all() and len(at.unique()) > 5


def test_what_corrupt_refuses():
    x = torch.rand(1, 1, 8, 8)
    with pytest.raises(BookError, match="noise, blur, fog"):
        corruptions.corrupt(x, "snow", 1)
    with pytest.raises(BookError, match="from 1 to 5, not 0"):
        corruptions.corrupt(x, "noise", 0)
    with pytest.raises(BookError, match="uint8"):
        corruptions.corrupt(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "noise", 1)


def test_a_linear_probe_reads_what_is_linear_in_the_features_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    found = torch.randn(300, 8, generator=g) + 4 * torch.eye(8)[y]
    seen, test = found[:200], found[200:]
    read = vision.linear_probe(seen, y[:200], test, classes=3)
    assert (read == y[200:]).float().mean() > 0.95
    # Neither the scale nor the origin of a feature matters, and noise tells nothing.
    moved = vision.linear_probe(100 * seen + 7, y[:200], 100 * test + 7, classes=3)
    assert (moved == read).float().mean() > 0.98
    noise = torch.randn(300, 8, generator=g)
    blind = vision.linear_probe(noise[:200], y[:200], noise[200:], classes=3)
    assert (blind == y[200:]).float().mean() < 0.55
