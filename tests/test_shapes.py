"""The shapes world: drawing, captions and their reading, the scorer, subjects, the reader."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from lib import shapes, shapes_look, shapes_reader, shapes_score, shapes_subjects, shapes_text
from lib.corruptions import corrupt
from lib.errors import BookError
from lib.shapes import Scene, Thing
from lib.shapes_text import Want, Wanted


def everything(scene):
    """A prompt that leaves nothing about a scene open."""
    wants = tuple(Want(t.shape, t.colour, t.size, t.texture) for t in scene.things)
    return Wanted(wants, scene.background, scene.relations)


def painted(*things, background="white"):
    """One picture [1, 3, 64, 64]; a thing is (shape, colour, x, y) or a Thing."""
    things = [t if isinstance(t, Thing) else Thing(*t[:2], x=t[2], y=t[3]) for t in things]
    return shapes.draw(Scene(tuple(things), background))[0][None]


# --- the world ----------------------------------------------------------------------------------


def test_a_drawing_is_its_masks_filled_with_their_colours():
    things = (Thing("square", "red", "large", x=0.3, y=0.4), Thing("ring", "blue", x=0.7, y=0.7))
    for size in (32, 64, 128):
        image, masks = shapes.draw(Scene(things, "grey"), size)
        assert image.shape == (3, size, size) and masks.shape == (2, size, size)
        assert image.dtype == masks.dtype == torch.float32
        ground = torch.from_numpy(shapes.ground("grey", size)) * (1 - masks.sum(0))
        tones = torch.tensor([shapes.COLOURS[t.colour] for t in things])
        filled = ground + torch.einsum("kc,khw->chw", tones, masks)
        torch.testing.assert_close(image, filled, atol=1e-5, rtol=0)
        # A square of 0.9 × its size across, a ring between two radii: their areas are known.
        areas = masks.sum((1, 2)) / size**2
        across = [shapes.SIZES[t.size] for t in things]
        known = (0.9 * across[0]) ** 2, torch.pi / 4 * across[1] ** 2 * 2 * 0.3975
        torch.testing.assert_close(areas, torch.tensor(known), rtol=0.02, atol=0)
        rows = torch.arange(size)[:, None] + 0.5
        middle = (masks * rows).sum((1, 2)) / masks.sum((1, 2)) / size
        torch.testing.assert_close(middle, torch.tensor([t.y for t in things]), atol=5e-3, rtol=0)


def test_a_later_thing_covers_an_earlier_one_and_textures_darken():
    under = Thing("square", "red", "large")
    image, masks = shapes.draw(Scene((under, Thing("circle", "blue", "small"))))
    assert masks.sum(0).max() <= 1 + 1e-6
    torch.testing.assert_close(image[:, 32, 32], torch.tensor(shapes.COLOURS["blue"]))
    for texture, low, high in (("plain", 0, 0), ("striped", 0.35, 0.65), ("dotted", 0.15, 0.45)):
        image, masks = shapes.draw(Scene((replace(under, texture=texture),)))
        dark = (image[0] < 0.6)[masks[0] == 1].float().mean()
        assert low <= dark <= high
        assert torch.equal(masks[0], shapes.draw(Scene((under,)))[1][0])


def test_no_two_tones_of_the_world_are_near():
    things = [torch.tensor(c) * k for c in shapes.COLOURS.values() for k in (1, shapes.DARK)]
    full = torch.stack(things[::2])
    assert torch.pdist(full).min() > 0.35
    grounds = torch.tensor([tone for tones in shapes.BACKGROUNDS.values() for tone in tones])
    assert torch.cdist(torch.stack(things), grounds).min() > 0.15


def test_sampled_scenes_are_apart_true_and_of_every_kind():
    scenes = shapes.sample(2000, 0)
    assert scenes == shapes.sample(2000, 0) and scenes != shapes.sample(2000, 1)
    seen, relations, counts = Counter(), Counter(), Counter()
    for scene in scenes:
        counts[len(scene.things)] += 1
        for thing in scene.things:
            half = 0.5 * shapes.SIZES[thing.size]
            assert half < thing.x < 1 - half and half < thing.y < 1 - half
            seen[thing.shape, thing.colour] += 1
        for i, relation, j in scene.relations:
            assert shapes.holds(scene.things[i], relation, scene.things[j])
            relations[relation] += 1
    assert len(seen) == len(shapes.SHAPES) * len(shapes.COLOURS)
    assert set(relations) == set(shapes.RELATIONS)
    assert {s.background for s in scenes} == set(shapes.BACKGROUNDS)
    for count, weight in zip((1, 2, 3, 4), shapes.WEIGHTS, strict=True):
        assert abs(counts[count] / 2000 - weight) < 0.04
    for scene in scenes[:200]:
        _, masks = shapes.draw(scene)
        assert masks.gt(0).sum(0).max() <= 1  # not even the smooth edges share a pixel


def test_what_is_held_out_never_occurs():
    alone, red = ("star", "purple"), ("circle", "red")
    together = [(red, ("square", colour)) for colour in shapes.COLOURS]

    def seen(**how):
        """Scenes with the look that is never shown, with the pairs that never are, with red."""
        scenes = shapes.sample(4000, 3, counts=(0, 1), **how)
        looks = [{(t.shape, t.colour) for t in scene.things} for scene in scenes]
        apart = sum(any(set(pair) <= look for pair in together) for look in looks)
        return sum(alone in look for look in looks), apart, sum(red in look for look in looks)

    assert min(seen()) > 3
    held = seen(without=[alone, *together])
    assert held[:2] == (0, 0) and held[2] > 3


def test_relations_are_clear_or_do_not_hold():
    a, right, diagonal = (Thing("circle", "red", x=x, y=y) for x, y in ((0.2, 0.2), (0.6, 0.3),
                                                                        (0.6, 0.9)))  # fmt: skip
    assert shapes.holds(a, "left of", right) and shapes.holds(right, "right of", a)
    assert not any(shapes.holds(a, r, right) for r in ("right of", "above", "below"))
    assert not shapes.holds(a, "left of", diagonal) and shapes.holds(a, "above", diagonal)
    with pytest.raises(BookError, match="relation 'near' is unknown; give one of left of"):
        shapes.holds(a, "near", right)


@pytest.mark.parametrize(
    "wrong", [dict(shape="cube"), dict(colour="teal"), dict(size="vast"), dict(texture="furry")]
)
def test_draw_names_what_it_does_not_know(wrong):
    ((kind, word),) = wrong.items()
    with pytest.raises(BookError, match=f"{kind} '{word}' is unknown; give one of") as caught:
        shapes.draw(Scene((replace(Thing("circle", "red"), **wrong),)))
    assert "\n" not in str(caught.value)
    with pytest.raises(BookError, match="background 'moon' is unknown"):
        shapes.draw(Scene((), "moon"))
    with pytest.raises(BookError, match="sample takes n ≥ 1"):
        shapes.sample(0, 0)


# --- captions -----------------------------------------------------------------------------------


def test_captions_are_read_back_as_what_they_tell():
    scenes, named, coloured = shapes.sample(3000, 5), 0, []
    for seed, scene in enumerate(scenes):
        caption = shapes.caption(scene, seed)
        assert caption == shapes.caption(scene, seed)
        wanted = shapes_text.parse(caption)
        said = Counter(want.shape for want in wanted.things)
        assert said == Counter(thing.shape for thing in scene.things)
        assert (wanted.background or "white") == scene.background
        assert len(wanted.relations) == len(scene.relations)
        named += wanted.background is not None
        coloured += [want.colour is not None for want in wanted.things]
        # Each thing's own words stand in the caption where `words` says.
        for thing, spans in zip(scene.things, shapes_text.words(caption, scene), strict=True):
            text = {kind: caption[a:b] for kind, (a, b) in spans.items()}
            assert text["shape"].startswith(thing.shape)
            assert text.get("colour", thing.colour) == thing.colour
            assert text.get("size") in (None, *shapes.SAID.get(thing.size, ()))
            if "texture" in text:
                told = shapes_text.parse(f"a {thing.texture} star").things[0].texture
                assert told == thing.texture and text["texture"].split()[-1][0] == told[0]
        for i, relation, j in wanted.relations:
            a, b = wanted.things[i], wanted.things[j]
            (k, true, m), t = scene.relations[0], scene.things
            assert (a.shape, relation, b.shape) == (t[k].shape, true, t[m].shape)
    assert 0.4 < named / 3000 < 0.6 and 0.8 < sum(coloured) / len(coloured) < 0.95
    assert len({shapes.caption(scenes[1], seed) for seed in range(40)}) > 5


def test_captions_tell_of_their_own_scene_only():
    scenes = shapes.sample(300, 6)
    wrong = 0
    for seed, (scene, other) in enumerate(zip(scenes, scenes[1:], strict=False)):
        if Counter(t.shape for t in scene.things) == Counter(t.shape for t in other.things):
            continue
        wrong += 1
        with pytest.raises(BookError, match="does not tell of this scene"):
            shapes_text.words(shapes.caption(scene, seed), other)
    assert wrong > 200


@pytest.mark.parametrize(
    "prompt, things, background, relations",
    [
        ("a red circle and a blue square", "circle red - -, square blue - -", None, ()),
        ("two yellow stars", "star yellow - -, star yellow - -", None, ()),
        (
            "a red circle to the left of a blue square",
            "circle red - -, square blue - -",
            None,
            ((0, "left of", 1),),
        ),
        ("a large striped green ring on a beach", "ring green large striped", "beach", ()),
        ("A photo of an orange Heart with dots.", "heart orange - dotted", None, ()),
        (
            "at night, two tiny crosses below a big polka-less star".replace("polka-less ", ""),
            "cross - small -, cross - small -, star - large -",
            "night",
            ((0, "below", 2), (1, "below", 2)),
        ),
        (
            "a star above a ring, and a plain medium-sized heart against a gray background",
            "star - - -, ring - - -, heart - medium plain",
            "grey",
            ((0, "above", 1),),
        ),
    ],
)
def test_prompts_of_the_papers_are_read(prompt, things, background, relations):
    wanted = shapes_text.parse(prompt)
    rows = [[w.shape, w.colour, w.size, w.texture] for w in wanted.things]
    assert ", ".join(" ".join(value or "-" for value in row) for row in rows) == things
    assert (wanted.background, wanted.relations) == (background, relations)
    if background:
        begin, end = wanted.where
        assert shapes_text.parse(f"a ring {prompt[begin:end]}").background == background


@pytest.mark.parametrize(
    "prompt, why",
    [
        ("a red dog", "'dog' is no word of the shapes world here; it knows circle, square"),
        ("a red blue circle", "'blue' follows 'red' before a shape"),
        ("a red and a blue square", "'a' belongs to no shape, 'and' follows"),
        ("red circles", "say how many circles: two, three or four"),
        ("a circle above", "it ends before its last shape"),
        ("left of a circle", "'left of' needs a shape before and after it"),
        ("with dots", "'with dots' belongs to no shape"),
        ("on a beach", "it names no things; a picture has one to four"),
        ("three stars and two rings", "it names 5 things"),
        ("a circle on a beach at night", "it names two backgrounds, beach and night"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(prompt, why):
    with pytest.raises(BookError) as caught:
        shapes_text.parse(prompt)
    assert why in str(caught.value) and prompt in str(caught.value)
    assert "\n" not in str(caught.value)


def test_test_sets_are_what_they_are_called():
    for kind in ("single", "two", "three", "relation", "count", "size", "texture", "background"):
        prompts = shapes_text.prompts(kind, 112, 1)
        assert prompts == shapes_text.prompts(kind, 112, 1) != shapes_text.prompts(kind, 112, 2)
        for prompt in prompts:
            wanted = shapes_text.parse(prompt)
            things = wanted.things
            assert all(want.colour for want in things)
            assert bool(wanted.relations) == (kind == "relation")
            assert bool(wanted.background) == (kind == "background")
            assert all(bool(getattr(w, k)) == (k == kind) for w in things
                       for k in ("size", "texture"))  # fmt: skip
            if kind in ("two", "three", "relation"):
                many = 3 if kind == "three" else 2
                assert len({w.shape for w in things}) == len({w.colour for w in things}) == many
            else:
                assert len({(w.shape, w.colour) for w in things}) == 1
                assert (len(things) > 1) == (kind == "count")
        if kind == "single":
            assert set(Counter(prompts).values()) == {2}  # every look equally often
    held = [(("circle", "red"), ("square", "blue"))]
    assert set(shapes_text.prompts("two", 9, 0, among=held)) == {
        "a red circle and a blue square",
        "a blue square and a red circle",
    }
    assert shapes_text.prompts("single", 2, 0, among=[("star", "pink")]) == ["a pink star"] * 2
    for wrong in (("four", 1, 0), ("two", 0, 0), ("three", 1, 0, held), ("two", 1, 0, [])):
        with pytest.raises(BookError):
            shapes_text.prompts(*wrong)
    with pytest.raises(BookError, match="need 2 looks without a shape in common"):
        shapes_text.prompts("two", 1, 0, among=[("star", "pink"), ("star", "red")])


# --- the scorer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    return shapes.sample(300, 77)


@pytest.fixture(scope="module")
def images(scenes):
    return shapes.pictures(scenes)


def share(rows, right=lambda row: row["all"]):
    return sum(bool(right(row)) for row in rows) / len(rows)


def test_clean_drawings_are_right_and_placed(scenes, images):
    rows = shapes_score.score(images, [everything(scene) for scene in scenes])
    assert share(rows) >= 0.995 and share(rows, lambda row: row["sure"]) >= 0.995
    captions = [shapes.caption(scene, seed) for seed, scene in enumerate(scenes)]
    assert share(shapes_score.score(images[:50], captions[:50])) >= 0.995
    for scene, row in zip(scenes, rows, strict=True):
        _, masks = shapes.draw(scene)
        for thing, mask in zip(scene.things, masks, strict=True):
            at = {max(abs(f.x - thing.x), abs(f.y - thing.y)): f for f in row["seen"].things}
            assert min(at) < 0.02
            both, either = (mask > 0.5) & at[min(at)].mask, (mask > 0.5) | at[min(at)].mask
            assert both.sum() / either.sum() > 0.75


def test_every_look_is_told_from_every_other():
    looks = list(product(shapes.SHAPES, shapes.COLOURS, ("white", "night", "beach")))
    scenes = [Scene((Thing(s, c, "small"),), ground) for s, c, ground in looks]
    for scene, seen in zip(scenes, shapes_look.look(shapes.pictures(scenes)), strict=True):
        (thing,) = seen.things
        assert (thing.shape, thing.colour) == (scene.things[0].shape, scene.things[0].colour)
        assert seen.background == scene.background


def test_another_picture_is_wrong(scenes, images):
    """Each scene with one thing about it changed, judged by what it was before."""
    wrong = {}
    for scene in scenes[:45]:
        first, *rest = scene.things
        shape = shapes.SHAPES[shapes.SHAPES.index(first.shape) - 1]
        colours = list(shapes.COLOURS)
        colour = colours[colours.index(first.colour) - 1]
        for kind, thing in {
            "shape": replace(first, shape=shape),
            "colour": replace(first, colour=colour),
            "size": replace(first, size="large" if first.size == "small" else "small"),
            "texture": replace(first, texture="plain" if first.texture != "plain" else "dotted"),
        }.items():
            changed = Scene((thing, *rest), scene.background)
            wrong.setdefault(kind, []).append((changed, replace(everything(scene), relations=())))
        missing = Scene(tuple(rest), scene.background)
        wrong.setdefault("count", []).append((missing, everything(scene)))
        ground = "snow" if scene.background != "snow" else "grey"
        wrong.setdefault("background", []).append((replace(scene, background=ground),
                                                   everything(scene)))  # fmt: skip
    for kind, cases in wrong.items():
        rows = shapes_score.score(shapes.pictures([c for c, _ in cases]), [w for _, w in cases])
        assert share(rows) == 0, kind
        if kind in ("count", "background"):
            assert not any(row[kind] for row in rows)
        else:
            assert share(rows, lambda row: row["count"]) > 0.97
            of = [[thing[kind] for thing in row["things"]] for row in rows]  # noqa: B023
            assert all(False in values for values in of), kind


def test_swapped_missing_and_extra_are_told():
    prompt = "a red circle and a blue square"
    circle, square = ("circle", "red", 0.25, 0.3), ("square", "blue", 0.7, 0.7)
    (right,) = shapes_score.score(painted(circle, square), prompt)
    assert right["all"] and right["count"] and not right["swapped"]
    assert right["relation"] is None and right["background"] is None
    assert [row["leak"] for row in right["things"]] == [0, 0]

    swapped = painted(("circle", "blue", 0.25, 0.3), ("square", "red", 0.7, 0.7))
    (row,) = shapes_score.score(swapped, prompt)
    assert row["swapped"] and row["count"] and not row["all"] and row["missing"] == 0
    assert [r["leak"] for r in row["things"]] == [1, 1]

    (row,) = shapes_score.score(painted(circle), prompt)
    assert (row["missing"], row["extra"], row["count"], row["all"]) == (1, 0, False, False)
    assert row["things"][0]["both"] and row["things"][1]["found"] is None
    assert row["things"][1]["leak"] is None

    (row,) = shapes_score.score(painted(circle, square, ("star", "pink", 0.75, 0.2)), prompt)
    assert (row["missing"], row["extra"], row["all"]) == (0, 1, False)
    assert all(r["both"] for r in row["things"])

    (row,) = shapes_score.score(painted(circle, circle[:2] + (0.7, 0.7)), "a red circle")
    assert row["things"][0]["both"] and not row["count"] and not row["all"]


def test_a_colour_that_leaks_is_measured():
    """A circle that is blue to a third, beside the blue square it takes the colour from."""
    image = painted(("circle", "red", 0.25, 0.3), ("square", "blue", 0.7, 0.7))
    blue = painted(("circle", "blue", 0.25, 0.3), ("square", "blue", 0.7, 0.7))
    image[..., 23:32, :32] = blue[..., 23:32, :32]
    (row,) = shapes_score.score(image, "a red circle and a blue square")
    circle, square = row["things"]
    assert circle["shape"] and circle["colour"] and 0.15 < circle["leak"] < 0.35
    assert square["both"] and square["leak"] == 0


@pytest.mark.parametrize(
    "relation, at",
    list(zip(shapes.RELATIONS, [(0.2, 0.5), (0.8, 0.5), (0.5, 0.2), (0.5, 0.8)], strict=True)),
)
def test_relations_are_judged(relation, at):
    image = painted(("star", "red", *at), ("ring", "blue", 0.5, 0.5))
    for said in shapes.RELATIONS:
        (row,) = shapes_score.score(image, f"a red star {shapes.SAID[said][0]} a blue ring")
        assert row["relation"] == row["all"] == (said == relation)
    (row,) = shapes_score.score(image, f"a green star {shapes.SAID[relation][0]} a blue ring")
    assert row["relation"] is False and not row["all"]


def test_counts_and_things_of_one_look():
    places = [(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)]
    for many in (1, 2, 3, 4):
        image = painted(*[("heart", "pink", x, y) for x, y in places[:many]])
        for said, word in ((2, "two"), (3, "three"), (4, "four")):
            (row,) = shapes_score.score(image, f"{word} pink hearts")
            assert row["count"] == row["all"] == (said == many)
            assert row["missing"] == max(said - many, 0)


def test_things_that_touch_and_mixtures():
    """Two things of one colour that touch are two; one thing half and half is one, of no colour."""
    touching = painted(Thing("square", "red", "large", x=0.3), Thing("circle", "red", x=0.64))
    (seen,) = shapes_look.look(touching)
    assert sorted(thing.shape for thing in seen.things) == ["circle", "square"]
    halves = painted(("circle", "red", 0.5, 0.5))
    halves[..., 32:] = painted(("circle", "green", 0.5, 0.5))[..., 32:]
    (seen,) = shapes_look.look(halves)
    (thing,) = seen.things
    assert thing.shape == "circle" and thing.colour is None
    assert abs(thing.colours["red"] - 0.5) < 0.1
    (row,) = shapes_score.score(halves, "a red circle")
    assert not row["all"] and not row["sure"]


def test_pictures_of_nothing_known_are_unsure():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(8, 3, 64, 64, generator=generator)
    blots = torch.rand(8, 3, 5, 5, generator=generator)
    blots = F.interpolate(blots, (64, 64), mode="bicubic").clamp(0, 1)
    blank = torch.full((1, 3, 64, 64), 0.3)
    for row in shapes_score.score(torch.cat([noise, blots, blank]), "a red circle"):
        assert not row["all"] and not row["sure"]
    (row,) = shapes_score.score(painted(), "a red circle")
    assert row["sure"] and row["missing"] == 1 and not row["all"]


@pytest.mark.parametrize(
    "kind, severity, least", [("noise", 1, 0.97), ("noise", 2, 0.93), ("blur", 1, 0.98),
                              ("pixelate", 1, 0.95)]
)  # fmt: skip
def test_damage_leaves_the_score_or_makes_it_unsure(scenes, images, kind, severity, least):
    few = slice(0, 80)
    wanted = [replace(everything(s), relations=()) for s in scenes[few]]
    rows = shapes_score.score(corrupt(images[few], kind, severity), wanted)

    def looks(row):
        return row["count"] and all(thing["both"] for thing in row["things"])

    assert share(rows, looks) >= least
    assert share(rows, lambda row: row["sure"] and not looks(row)) <= 0.015


def test_off_tones_and_bent_outlines_are_still_read(scenes, images):
    generator = torch.Generator().manual_seed(1)
    few = images[:60]
    off = (few + 0.05 * torch.randn(60, 3, 1, 1, generator=generator)).clamp(0, 1)
    bend = torch.randn(60, 2, 10, 10, generator=generator) * 0.5 / 32
    bend = F.interpolate(bend, (64, 64), mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(60, 2, 3), list(few.shape), align_corners=False)
    bent = F.grid_sample(few, grid + bend, padding_mode="border", align_corners=False)
    wanted = [everything(scene) for scene in scenes[:60]]
    for damaged in (off, bent):
        rows = shapes_score.score(damaged, wanted)
        assert share(rows, lambda row: all(t["both"] for t in row["things"])) >= 0.95


def test_other_sizes_types_and_refusals(scenes, images):
    wanted = [everything(scene) for scene in scenes[:40]]
    large = shapes.pictures(scenes[:40], 128)
    assert share(shapes_score.score(large, wanted)) >= 0.98
    small = shapes_score.score(shapes.pictures(scenes[:40], 32), wanted)
    assert share(small, lambda row: all(thing["both"] for thing in row["things"])) >= 0.95
    assert share(shapes_score.score(images[:20].bfloat16(), wanted[:20])) >= 0.95
    assert shapes_look.look(images[:3]) == shapes_look.look(images[:3])
    assert shapes_score.score(images[:0], []) == []
    with pytest.raises(BookError, match=r"float images \[n, 3, side, side\]"):
        shapes_look.look(images[0])
    with pytest.raises(BookError, match="these hold NaN"):
        shapes_look.look(images[:1] * float("nan"))
    with pytest.raises(BookError, match="a prompt a picture, not 2 for 3"):
        shapes_score.score(images[:3], ["a star", "a ring"])
    with pytest.raises(BookError, match="'dog' is no word"):
        shapes_score.score(images[:1], "a dog")


# --- subjects -----------------------------------------------------------------------------------


def test_subjects_are_all_different_and_recur():
    assert len({shapes_subjects.subject(seed) for seed in range(1000)}) == 1000
    one = shapes_subjects.subject(3)
    image, mask = shapes_subjects.reference(one, 5, "grey")
    assert torch.equal(image, shapes_subjects.reference(one, 5, "grey")[0])
    assert not torch.equal(image, shapes_subjects.reference(one, 6, "grey")[0])
    assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and 0 <= mask.min() < mask.max()
    ground = torch.from_numpy(shapes.ground("grey"))
    assert torch.equal(image[:, mask == 0], ground[:, mask == 0])
    inside = image[:, mask == 1]
    for colour in (one.colour, one.second):
        away = (inside - torch.tensor(shapes.COLOURS[colour])[:, None]).norm(dim=0)
        assert (away < 0.01).float().mean() > 0.1
    with pytest.raises(BookError, match="scale 'vast' is unknown"):
        shapes_subjects.reference(one, 0, scale="vast")


def test_likeness_tells_subjects_apart(images):
    subjects = [shapes_subjects.subject(seed) for seed in range(16)]
    shown = [shapes_subjects.reference(s, 50 + k)[0] for k, s in enumerate(subjects)]
    shown = torch.stack(shown)
    likeness = torch.stack([shapes_subjects.likeness(shown, s) for s in subjects])
    own, other = likeness.diag(), likeness[~torch.eye(16, dtype=torch.bool)]
    assert own.min() > 0.85 and other.max() < own.min() and other.mean() < 0.15
    assert shapes_subjects.likeness(images[:40], subjects[0]).max() < 0.6
    small = torch.stack([shapes_subjects.reference(s, 9, scale="small")[0] for s in subjects[:6]])
    for k, s in enumerate(subjects[:6]):
        assert shapes_subjects.likeness(small[k : k + 1], s) > 0.8
    one = shapes_subjects.subject(7)
    image, _ = shapes_subjects.reference(one, 1)
    damaged = [corrupt(image[None], "noise", severity) for severity in (1, 2, 3, 4)]
    values = [float(shapes_subjects.likeness(x, one)) for x in (image[None], *damaged)]
    assert values == sorted(values, reverse=True)
    with pytest.raises(BookError, match="pictures are float images"):
        shapes_subjects.likeness(image, one)


# --- the reader ---------------------------------------------------------------------------------


def test_the_reader_sees_what_is_drawn_and_agrees_with_the_scorer(scenes, images):
    few = slice(0, 120)
    wanted = [everything(scene) for scene in scenes[few]]
    assert share(shapes_score.score(images[few], wanted, shapes_reader.look)) >= 0.97
    noisy = corrupt(images[few], "noise", 2, seed=3)
    read = shapes_score.score(noisy, wanted, shapes_reader.look)
    scored = shapes_score.score(noisy, wanted)

    def looks(row):
        return sorted((t.shape or "", t.colour or "") for t in row["seen"].things)

    pairs = [(a, b) for a, b in zip(read, scored, strict=True) if b["sure"]]
    assert len(pairs) > 100 and sum(looks(a) == looks(b) for a, b in pairs) >= 0.97 * len(pairs)
    # It is no copy of the prompt: of another scene's it says no.
    other = shapes_score.score(images[few], [*wanted[1:], wanted[0]], shapes_reader.look)
    assert share(other) < 0.03
    weights = sum(t.numel() for t in shapes_reader.reader().parameters())
    assert 2 * weights < 1_000_000  # bytes in float16


def test_a_reader_that_is_missing_says_how_to_make_it(tmp_path, monkeypatch, images):
    monkeypatch.setattr(shapes_reader, "DATA", tmp_path)
    shapes_reader.reader.cache_clear()
    with pytest.raises(BookError, match="make it with data/diffusion/make_reader.py"):
        shapes_reader.look(images[:1])
    shapes_reader.reader.cache_clear()
