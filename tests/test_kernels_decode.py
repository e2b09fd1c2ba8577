"""The decode loop gives the plain model's logits and text, whatever its weights are stored in."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lib import models
from lib.errors import BookError
from lib.kernels import decode, lowbit
from lib.kernels.dispatch import using

IDS = torch.tensor([5, 17, 3, 88, 41, 2, 2, 60])


def small(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 600,
            "tie_word_embeddings": True, "eos_token_id": None, "pad_token_id": None, **changes,
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():  # larger than at birth, so that attention is not flat
        p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else 3 * torch.randn_like(p) / 8)
    return model


@torch.inference_mode()
def plain(model, ids=IDS):
    return model(ids[None]).logits[0]


def close(found, expected):
    """To 1e-4 of the logits' spread: float32, summed in another order."""
    return (found - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("bits", lowbit.BITS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_dense_model(bits, tied):
    decoder = decode.quantize(small(tie_word_embeddings=tied), bits, 32, head_bits=8)
    dense = plain(decoder.dense())
    assert close(decoder.logits(IDS), dense)
    with using("reference"):
        torch.testing.assert_close(decoder.logits(IDS), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_weights_in_the_same_loop(dtype):
    model = small(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    decoder = decode.quantize(model, dtype=dtype)
    assert close(decoder.logits(IDS), plain(model if dtype == torch.float32 else decoder.dense()))
    if dtype == torch.bfloat16:
        expected = model.model.layers[1].mlp.up_proj.weight.bfloat16().float()
        assert torch.equal(decoder.dense().model.layers[1].mlp.up_proj.weight, expected)


def test_every_weight_counts():
    """A decoder that skipped a product, a norm or the residual stream would not notice a change."""
    model = small(tie_word_embeddings=False)
    before = decode.quantize(model, 4).logits(IDS)
    for name, p in model.named_parameters():
        kept = p.clone()
        p[...] = p.flip(0) * 0.7
        changed = decode.quantize(model, 4)
        assert not close(changed.logits(IDS), before), name
        p.copy_(kept)


def test_more_bits_less_error():
    model = small()
    off = [
        float((decode.quantize(model, b).logits(IDS) - plain(model)).norm()) for b in lowbit.BITS
    ]
    assert off == sorted(off, reverse=True) and off[-1] < 0.1 * off[0]


@torch.inference_mode()
def test_generate_is_greedy_generate():
    decoder = decode.quantize(small(), 8)
    expected = decoder.dense().generate(IDS[None], max_new_tokens=20, do_sample=False)[0]
    assert torch.equal(decoder.generate(IDS, 20), expected)
    assert torch.equal(decoder.generate(IDS[None], 20), expected)  # the cache starts afresh
    with using("reference"):
        assert torch.equal(decoder.generate(IDS, 20), expected)
    stop = int(expected[len(IDS) + 4])
    first = expected[len(IDS) :].tolist().index(stop)
    for backend in ("cpu", "reference"):
        with using(backend):
            assert torch.equal(
                decoder.generate(IDS, 20, stop=stop), expected[: len(IDS) + first + 1]
            )
            assert torch.equal(decoder.generate(IDS, 0), IDS)


def test_a_long_text_crosses_to_threaded_attention():
    decoder = decode.quantize(small(), 8)
    ids = torch.arange(300) * 7 % 101
    assert close(decoder.logits(ids), plain(decoder.dense(), ids))


def test_the_model_stays_as_it_is():
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    decoder = decode.quantize(model, 3)
    decoder.generate(IDS, 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    kept = decoder.logits(IDS)
    model.model.layers[0].mlp.up_proj.weight.zero_()  # and the decoder does not hang on the model
    assert torch.equal(decoder.logits(IDS), kept)


def test_ready_matrices():
    model, name = small(), "model.layers.1.mlp.down_proj"
    zeros = torch.zeros(64, 96)
    decoder = decode.quantize(model, 4, ready={name: lowbit.pack(zeros, 4, 32)})
    assert not decoder.dense().get_submodule(name).weight.any()
    assert close(decoder.logits(IDS), plain(decoder.dense()))
    with pytest.raises(BookError, match="no product of this model"):
        decode.quantize(model, 4, ready={"model.norm": lowbit.pack(zeros, 4)})
    with pytest.raises(BookError, match=r"is \[96, 64\]; it must be \[64, 96\]"):
        decode.quantize(model, 4, ready={name: lowbit.pack(zeros.T, 4)})


def test_exp():
    x = np.linspace(-87, 88, 4001, dtype=np.float32)
    found = np.array([decode._exp(v) for v in x])
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=3e-7)
    assert decode._exp(np.float32(-500)) < 1e-37


def test_smollm2_lies_on_a_four_bit_grid():
    """The file stores Q4_1 in groups of 32, and ``pack`` finds the same grid again, bit for bit."""
    model, _ = models.load("smollm2", device="cpu")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.29.mlp.down_proj"):
        w = model.get_submodule(name).weight
        assert torch.equal(lowbit.unpack(lowbit.pack(w, 4, 32)), w)
        assert not torch.equal(lowbit.unpack(lowbit.pack(w, 4, 64)), w)


def test_one_line_errors():
    model = small()
    decoder = decode.quantize(model, 4)
    other = MistralForCausalLM(MistralConfig(**{**model.config.to_dict(), "architectures": None}))
    decoder.start(1)
    decoder.position = 256
    for message, run in {
        "MistralForCausalLM": lambda: decode.quantize(other),
        "has biases": lambda: decode.quantize(small(attention_bias=True)),
        "multiples of 16": lambda: decode.quantize(small(intermediate_size=72)),
        "bits is 5": lambda: decode.quantize(model, 5),
        "dtype is torch.float16": lambda: decode.quantize(model, dtype=torch.float16),
        "ids is [2, 8]": lambda: decoder.logits(IDS.repeat(2, 1)),
        "ids is [0]": lambda: decoder.generate(IDS[:0], 3),
        "ids must lie in 0 to 100": lambda: decoder.logits(IDS + 90),
        "max_new_tokens is -1": lambda: decoder.generate(IDS, -1),
        "the text is full at 256": lambda: decoder.step(1),
    }.items():
        with pytest.raises(BookError) as caught:
            run()
        assert message in str(caught.value) and "\n" not in str(caught.value)
