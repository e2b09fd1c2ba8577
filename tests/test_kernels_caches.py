"""Packed bits, the quantized key-value cache, XQuant and XQuant-CL."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lib import datasets, hooks, models
from lib.errors import BookError
from lib.kernels.bitpack import BITS, PLANES, dequantize, quantize
from lib.kernels.dispatch import numba, triton, using
from lib.kernels.layer_input_cache import LayerInputCache, _factored
from lib.kernels.quantized_cache import (
    QuantizedKVCache,
    Stream,
    bytes_kept,
    logits_through,
    loss_through,
)

examples = settings(max_examples=25, deadline=None)
BACKENDS = ["reference"] + ["cpu"] * (numba is not None) + ["triton"] * (triton is not None)


# Bits.


def naive_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The codes of one row, bit by bit, from the layout that the module's docstring states."""
    width = len(codes) * 8 // bits
    found, start = np.zeros(width, int), 0
    for plane, shift in PLANES[bits]:
        run = width * plane // 8
        for c in range(width):
            byte = np.unpackbits(codes[start + c % run : start + c % run + 1], bitorder="little")
            for bit in range(plane):
                found[c] += int(byte[c // run * plane + bit]) << (bit + shift)
        start += run
    return found


def naive(x: np.ndarray, bits: int) -> np.ndarray:
    """One group: round to the nearest of 2^bits levels between the float16 ends."""
    low = np.float32(np.float16(x.min()))
    span = max(x.max() - low, np.float32(0))  # `low`, rounded up, may pass the largest value
    step = np.float32(np.float16(span / np.float32(2**bits - 1)))
    levels = low + step * np.arange(2**bits, dtype=np.float32)
    return levels[np.abs(x[:, None] - levels).argmin(1)]


@st.composite
def packable(draw):
    bits, per = draw(st.sampled_from(BITS)), draw(st.sampled_from(["channel", "token"]))
    group = draw(st.sampled_from([8, 16]))
    batch, blocks = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    length, width = (
        (group * blocks, 8 * draw(st.integers(1, 3)))
        if per == "channel"
        else (
            draw(st.integers(0, 9)),
            group * draw(st.integers(1, 3)),
        )
    )
    x = torch.randn(
        (batch, length, width), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    x = x * draw(st.sampled_from([1e-3, 1.0, 300.0])) + draw(st.sampled_from([0.0, 5.0]))
    if draw(st.booleans()):  # the same values, strided
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
    return (
        x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))),
        bits,
        group,
        per,
    )


@examples
@given(packable())
def test_every_backend_packs_and_unpacks_as_the_reference(case):
    x, bits, group, per = case
    with using("reference"):
        packed = quantize(x, bits, group, per)
        want = dequantize(packed, bits, group, per)
    assert packed.codes.shape == (*x.shape[:2], x.shape[2] * bits // 8)
    assert packed.codes.nbytes * 8 == x.numel() * bits  # the bits are really packed
    for backend in BACKENDS:
        with using(backend):
            again = quantize(x, bits, group, per)
            out = torch.full((len(x), x.shape[1] + 2, x.shape[2]), -7.0)
            dequantize(packed, bits, group, per, out)
        for a, b in zip(packed, again, strict=True):
            assert torch.equal(a, b), backend
        torch.testing.assert_close(out[:, : x.shape[1]], want, rtol=1e-6, atol=1e-6)
        assert (out[:, x.shape[1] :] == -7).all()  # nothing written behind the packed rows


@examples
@example((torch.full((1, 1, 8), 4.9985) + torch.arange(8) * 2e-4, 2, 8, "token"))
@given(packable())
def test_the_reference_rounds_each_group_to_its_nearest_level(case):
    x, bits, group, per = case
    with using("reference"):
        packed = quantize(x, bits, group, per)
        got = dequantize(packed, bits, group, per).numpy()
    scale = packed.scale.float().numpy()
    x = x.float().numpy()
    for b in range(len(x)):
        for t in range(min(x.shape[1], 2)):
            codes = naive_codes(packed.codes[b, t].numpy(), bits)
            low = packed.low.float().numpy()
            at = (b, t // group) if per == "channel" else (b, t)
            repeat = 1 if per == "channel" else group
            rebuilt = np.repeat(low[at], repeat) + np.repeat(scale[at], repeat) * codes
            np.testing.assert_allclose(got[b, t], rebuilt, rtol=1e-5, atol=1e-6)
        lines = x[b].T if per == "channel" else x[b]
        seen = got[b].T if per == "channel" else got[b]
        for line, found in zip(lines[:6], seen[:6], strict=False):
            for g in range(0, len(line), group):
                part, back = line[g : g + group], found[g : g + group]
                step = (part.max() - part.min()) / (2**bits - 1)
                slack = 2e-3 * np.abs(part).max() + 1e-6  # float16 ends
                assert np.abs(part - back).max() <= 0.5 * step + slack
                nearest = np.abs(part - naive(part, bits))
                assert (np.abs(part - back) <= nearest + 1e-3 * step + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_a_value_without_a_float16_spoils_its_own_group_only(backend, per, bad):
    x = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    x[0, 3, 5] = bad
    with using(backend), np.errstate(invalid="ignore"):
        got = dequantize(quantize(x, 4, 8, per), 4, 8, per)
    spoiled = torch.zeros(16, 16, dtype=torch.bool)
    if per == "channel":
        spoiled[:8, 5] = True
    else:
        spoiled[3, :8] = True
    assert torch.isfinite(got[0][~spoiled]).all()
    assert not torch.isfinite(got[0][3, 5])


def test_constant_groups_and_single_rows_come_back():
    for value in (0.0, 3.0, -0.5):
        x = torch.full((1, 8, 8), value)
        assert torch.equal(dequantize(quantize(x, 2, 8, "channel"), 2, 8, "channel"), x)
        assert torch.equal(dequantize(quantize(x[:, :1], 3, 8, "token"), 3, 8, "token"), x[:, :1])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.zeros(1, 8, 8), 5, 8, "token"), "bits is 5"),
        ((torch.zeros(1, 8, 8), 4, 8, "row"), "per is"),
        ((torch.zeros(8, 8), 4, 8, "token"), "x is"),
        ((torch.zeros(1, 8, 8, dtype=torch.int64), 4, 8, "token"), "x is int64"),
        ((torch.zeros(1, 8, 12), 4, 4, "token"), "x is 12 wide"),
        ((torch.zeros(1, 9, 8), 4, 8, "channel"), "group is 8"),
        ((np.zeros((1, 8, 8)), 4, 8, "token"), "x is a ndarray"),
    ],
)
def test_bad_input_is_named(arguments, named):
    with pytest.raises(BookError, match=named) as error:
        quantize(*arguments)
    assert "\n" not in str(error.value)


def test_a_buffer_that_does_not_fit_is_refused():
    packed = quantize(torch.randn(1, 8, 8), 4, 8, "token")
    for out in (torch.zeros(1, 7, 8), torch.zeros(1, 8, 16), torch.zeros(1, 8, 8).half()):
        with pytest.raises(BookError, match="out is"):
            dequantize(packed, 4, 8, "token", out)


# A stream.


@examples
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.sampled_from([2, 3, 4, 8, 16, 32]),
    st.sampled_from(["channel", "token"]),
    st.integers(0, 20),
    st.integers(0, 100),
)
def test_a_stream_reads_back_packed_blocks_and_an_exact_window(pieces, bits, per, window, cut):
    x = torch.randn(2, sum(pieces), 24, generator=torch.Generator().manual_seed(len(pieces)))
    stream, seen = Stream(bits, 8, per, 8, window), 0
    for n in pieces:
        new = x[:, seen : seen + n]
        whole = stream.read(new)
        stored = stream.stored
        want = x[:, : seen + n].clone()
        if stored:
            want[:, :stored] = (
                want[:, :stored].to(torch.float16 if bits == 16 else torch.float32)
                if bits in (16, 32)
                else dequantize(quantize(x[:, :stored], bits, 8, per), bits, 8, per)
            )
        assert torch.equal(whole, want)
        due = stream.append(new)
        if due is not None:
            stream.store(due)
        seen += n
        assert len(stream) == seen
        assert stream.stored == max(0, (seen - window) // 8 * 8)
    before = stream.read(x[:, :0])
    stream.select(torch.tensor([1, 1, 0]))
    assert torch.equal(stream.read(x[[1, 1, 0], :0]), before[[1, 1, 0]])
    keep = min(cut, seen)
    stream.crop(keep)
    assert len(stream) == keep
    assert torch.equal(stream.read(x[[1, 1, 0], :0]), before[[1, 1, 0], :keep])


# Whole caches.


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=1,  # K and V together are half as wide as X
        num_hidden_layers=5,
        vocab_size=97,
        max_position_embeddings=256,
        attention_bias=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for block in model.model.layers:
        for linear in (block.self_attn.k_proj, block.self_attn.v_proj):
            torch.nn.init.normal_(linear.bias)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(1))


SMALL = dict(group=8, window=5)
FORMS = {
    "kv": partial(QuantizedKVCache, **SMALL),
    "x": partial(LayerInputCache, **SMALL),
    "latents": partial(LayerInputCache, latents=True, **SMALL),
    "cl": partial(LayerInputCache, cross_layer=True, base_layers=2, **SMALL),
    "cl latents": partial(LayerInputCache, cross_layer=True, latents=True, base_layers=2, **SMALL),
}
forms = pytest.mark.parametrize("form", FORMS)


def active(cache):
    return cache if isinstance(cache, LayerInputCache) else nullcontext()


def generate(model, ids, cache, **more):
    with active(cache):
        return model.generate(
            ids, past_key_values=cache, do_sample=False, max_new_tokens=30, use_cache=True, **more
        )


@forms
@settings(max_examples=5, deadline=None)
@given(chunk=st.integers(1, 60))
def test_floats_are_exact_and_fewer_bits_are_worse(model, ids, form, chunk):
    want, errors = model(ids).logits, {}
    for bits in (32, 16, 8, 4, 2):
        cache = FORMS[form](model, bits=bits)
        with active(cache):
            got = logits_through(model, ids, cache, chunk)
        errors[bits] = float((got - want).abs().max())
    assert errors[32] < 1e-4
    if chunk < 20:  # the packed past is read
        assert 0 < errors[16] < 0.05 < errors[2]
        assert errors[16] < errors[8] < errors[2] and errors[8] < errors[4]


@forms
def test_a_call_reads_its_own_tokens_exactly(model, ids, form):
    cache = FORMS[form](model, bits=2)
    with active(cache):
        got = logits_through(model, ids, cache, chunk=60)
    torch.testing.assert_close(got, model(ids).logits)


@forms
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_left_padding_and_beams_equals_the_dynamic_cache(model, ids, form, beams):
    mask = torch.ones_like(ids[:, :30])
    mask[1, :11] = 0
    padded = ids[:, :30] * mask
    want = generate(model, padded, DynamicCache(), attention_mask=mask, num_beams=beams)
    got = generate(model, padded, FORMS[form](model, bits=32), attention_mask=mask, num_beams=beams)
    assert torch.equal(got, want)
    alone = generate(model, ids[1:, 11:30], FORMS[form](model, bits=32), num_beams=beams)
    assert torch.equal(alone[0], got[1, 11:])  # its own positions, whatever the padding
    low = generate(model, padded, FORMS[form](model, bits=4), attention_mask=mask, num_beams=beams)
    assert low.shape == want.shape


@forms
def test_reorder_repeat_and_select_act_as_if_the_batch_had_been_so(model, ids, form):
    order = torch.tensor([1, 0, 1])

    def filled(batch):
        cache = FORMS[form](model, bits=4)
        with active(cache):
            logits_through(model, batch[:, :30], cache, chunk=9)
        return cache

    def after(cache, batch):
        with active(cache):
            return logits_through(model, batch[:, 30:], cache, chunk=9)

    want = after(filled(ids[order]), ids[order])
    moved = filled(ids)
    moved.reorder_cache(order)
    torch.testing.assert_close(after(moved, ids[order]), want)
    twice = filled(ids)
    twice.batch_repeat_interleave(2)
    twice.batch_select_indices(torch.tensor([2, 0, 3]))
    torch.testing.assert_close(after(twice, ids[order]), want)


@forms
@pytest.mark.parametrize("drop", [0, 3, 17, 38, 40])
def test_crop_forgets_the_end_only(model, ids, form, drop):
    want = model(ids).logits
    cache = FORMS[form](model, bits=32)
    with active(cache):
        logits_through(model, ids[:, :40], cache, chunk=9)
        cache.crop(-drop)
        assert cache.get_seq_length() == 40 - drop
        got = logits_through(model, ids[:, 40 - drop :], cache, chunk=9)
    torch.testing.assert_close(got, want[:, 40 - drop :], rtol=1e-4, atol=1e-4)
    with pytest.raises(BookError, match=r"crop\(5\)"):
        cache.crop(5)
    with pytest.raises(BookError, match=r"crop\(-61\)"):
        cache.crop(-61)


@forms
def test_crop_leaves_what_was_packed_as_it_read(model, ids, form):
    """At low bits, too: a cropped cache reads its kept rows as it did before."""
    cache = FORMS[form](model, bits=3)
    with active(cache):
        logits_through(model, ids[:, :40], cache, chunk=9)
        whole = model(ids[:, 40:42], past_key_values=cache).logits
        cache.crop(-2)
        again = model(ids[:, 40:42], past_key_values=cache).logits
        cache.crop(-2)
        cache.crop(-40)
        assert cache.get_seq_length() == 0
        fresh = logits_through(model, ids[:, :40], cache, chunk=9)
    torch.testing.assert_close(again, whole)
    other = FORMS[form](model, bits=3)
    with active(other):
        torch.testing.assert_close(logits_through(model, ids[:, :40], other, chunk=9), fresh)


@forms
def test_two_calls_with_one_cache_and_reset(model, ids, form):
    want = DynamicCache()
    first = generate(model, ids[:, :20], want)
    second = generate(model, torch.cat([first, ids[:, 20:25]], 1), want)
    cache = FORMS[form](model, bits=32)
    assert torch.equal(generate(model, ids[:, :20], cache), first)
    assert torch.equal(generate(model, torch.cat([first, ids[:, 20:25]], 1), cache), second)
    kept = bytes_kept(cache)
    cache.reset()
    assert bytes_kept(cache) == cache.get_seq_length() == 0 < kept
    assert torch.equal(generate(model, ids[:, :20], cache), first)


@forms
def test_prompt_lookup_decoding_crops_and_agrees(model, ids, form):
    text = ids[:1, :12].repeat(1, 3)
    want = generate(model, text, DynamicCache())
    got = generate(model, text, FORMS[form](model, bits=32), prompt_lookup_num_tokens=3)
    assert torch.equal(got[:, : want.shape[1]], want)


@forms
def test_bfloat16_models_get_bfloat16_back(model, ids, form):
    half = LlamaForCausalLM(model.config).to(torch.bfloat16).eval().requires_grad_(False)
    half.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    cache = FORMS[form](half, bits=8)
    with active(cache), torch.inference_mode():
        for part in ids.split(9, 1):
            assert half(part, past_key_values=cache).logits.dtype == torch.bfloat16


def test_bytes_are_what_the_formats_say(model, ids):
    def kept(form, bits):
        cache = FORMS[form](model, bits=bits)
        with active(cache):
            logits_through(model, ids, cache, chunk=9)
        return bytes_kept(cache)

    batch, length, layers, stored, tail = 2, 60, 5, 48, 12
    for bits in (2, 3, 4, 8):
        # a scale and a minimum for 8 tokens of a channel (K) or 8 channels of a token (V)
        packed = stored * 32 * bits // 8 + stored * 32 * 4 // 8
        want = batch * layers * (packed + tail * 32 * 4)
        assert kept("kv", bits) == want
        assert kept("latents", bits) == want + batch * length * 4  # and a position a token
        wide = batch * layers * (stored * 64 * bits // 8 + stored * 64 * 4 // 8 + tail * 64 * 4)
        assert kept("x", bits) == wide + batch * length * 4 > want
    assert kept("cl", 2) < kept("x", 4)
    dynamic = DynamicCache()
    logits_through(model, ids, dynamic, chunk=9)
    assert bytes_kept(dynamic) == batch * length * layers * 32 * 4


def test_hooks_come_off_on_any_exit_and_each_cache_sees_its_own_calls(model, ids):
    def count():
        return sum(len(m._forward_pre_hooks) for m in model.modules())

    before, want = count(), model(ids).logits
    one, two = FORMS["x"](model, bits=32), FORMS["cl latents"](model, bits=32)
    with one, two, torch.no_grad():
        assert count() == before + 10
        for part in ids.split(20, 1):
            got = [model(part, past_key_values=c).logits for c in (one, two)]
        model(ids)  # without a cache: seen by neither
        with pytest.raises(BookError, match="already active"):
            one.__enter__()
    assert count() == before
    for g in got:
        torch.testing.assert_close(g, want[:, 40:], rtol=1e-4, atol=1e-4)

    class Stop(Exception):
        pass

    def stop(x):
        raise Stop

    with pytest.raises(Stop), one, hooks.edit(model, "attn_out.2", stop):
        model(ids[:, :1], past_key_values=one)
    assert count() == before
    with pytest.raises(BookError, match="inside `with"):
        model(ids[:, :1], past_key_values=one)
    with pytest.raises(BookError, match="half-way"), one:
        model(ids[:, :1], past_key_values=one)
    one.reset()
    with one:
        torch.testing.assert_close(logits_through(model, ids, one), want, rtol=1e-4, atol=1e-4)


def test_an_edit_of_the_layers_input_is_kept(model, ids):
    with hooks.edit(model, "attn_in.1", hooks.scale(0.5)):
        want = model(ids).logits
        for form in ("x", "latents", "cl", "cl latents"):
            cache = FORMS[form](model, bits=32)
            with cache:
                got = logits_through(model, ids, cache, chunk=9)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_factors_follow_their_weights(model):
    linear = torch.nn.Linear(24, 16)
    first = _factored(linear)
    assert _factored(linear) is first
    with torch.no_grad():
        linear.weight.mul_(2)
    down, up = _factored(linear)
    torch.testing.assert_close(down @ up, linear.weight.T)
    torch.testing.assert_close(down.T @ down, torch.eye(16), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda m: QuantizedKVCache(m, bits=5), "bits is 5"),
        (lambda m: QuantizedKVCache(m, bits=(4, 1)), "bits is 1"),
        (lambda m: QuantizedKVCache(m, group=12), "group is 12"),
        (lambda m: QuantizedKVCache(m, window=-1), "window is -1"),
        (lambda m: LayerInputCache(m, bits=7), "bits is 7"),
        (lambda m: LayerInputCache(m, group=24), "group is 24"),
        (lambda m: LayerInputCache(m, cross_layer=True, base_layers=9), "base_layers is 9"),
        (lambda m: LayerInputCache(torch.nn.Linear(2, 2)), "model is a Linear"),
    ],
)
def test_bad_settings_are_named(model, make, named):
    with pytest.raises(BookError, match=named) as error:
        make(model)
    assert "\n" not in str(error.value)


def test_a_gradient_is_refused_instead_of_lost(model, ids):
    for form in ("kv", "latents"):
        cache = FORMS[form](model)
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        with active(cache), pytest.raises(BookError, match="no gradient"):
            model(inputs_embeds=embedded, past_key_values=cache)


def test_on_smollm2_the_papers_order_holds():
    """Latents beat K and V, and differences beat X, where bits are few (Moby Dick, 2 bits)."""
    model, tokenizer = models.load("smollm2", device="cpu")
    ids = tokenizer(datasets.moby_dick()[60_000:64_000], return_tensors="pt").input_ids[:, :144]
    short = dict(group=32, window=16)
    losses = {"float": loss_through(model, ids, DynamicCache(), 48)}
    for name, cache in {
        "exact": LayerInputCache(model, 32, latents=True, cross_layer=True, **short),
        "kv": QuantizedKVCache(model, 2, **short),
        "latents": LayerInputCache(model, 2, latents=True, **short),
        "x": LayerInputCache(model, 2, **short),
        "cl": LayerInputCache(model, 2, cross_layer=True, **short),
    }.items():
        with active(cache):
            losses[name] = loss_through(model, ids, cache, 48)
    assert abs(losses["exact"] - losses["float"]) < 1e-3
    assert losses["float"] < losses["latents"] < losses["kv"]
    assert losses["cl"] < losses["x"] - 0.2
