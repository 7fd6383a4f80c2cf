import json

import numpy as np
import pytest

import numformer as nf
from numformer import compress
from numformer.quant import QuantizedWeight, QuantSpec
from tests.compress.small import batches, gpt, padded

SPEC = QuantSpec(bits=4, group_size=16)
SHAPES = [{}, {"n_expert": 4, "n_kv_head": 2}, {"bias": True, "norm": "layer", "position": "learned",
                                               "activation": "gelu"}]


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_quantized_model_answers_generates_and_comes_back_with_the_same_bits(tmp_path, options, method):
    pytest.importorskip("safetensors")
    model = gpt(**options)
    before = {name: a.copy() for name, a in model.state_dict().items()}
    small, report = compress.quantize_model(model, SPEC, method, batches(6))
    tokens, targets = batches(1, seed=9)[0]
    with nf.no_grad():
        logits, loss = small(tokens).data, float(small.loss(tokens, targets))
        full = float(model.eval().loss(tokens, targets))
    assert abs(loss - full) < 0.1 and not np.array_equal(logits, model.as_arrays()(tokens))
    row = small.generate([1, 2, 3], 5, temperature=0)
    assert row[3] == small.as_arrays()(np.array([[1, 2, 3]]))[0, -1].argmax()
    small.save_pretrained(tmp_path)
    again = nf.models.load(tmp_path)
    np.testing.assert_array_equal(again.as_arrays()(tokens), logits)
    assert again.generate([1, 2, 3], 5, temperature=0) == row
    assert report.nbytes == sum(a.nbytes for a in again.state_dict().values()) < report.nbytes_before / 2
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("options", [{}, {"n_expert": 4}])
def test_padding_is_no_calibration(options):
    batch, rows = padded(12)
    model = gpt(**options)
    one, of_one = compress.quantize_model(model, SPEC, "gptq", [batch], min_rows=8, held_out=[batch])
    each, of_each = compress.quantize_model(model, SPEC, "gptq", rows, min_rows=8, held_out=rows)
    assert of_one == of_each and of_one.layers[0].rows == sum(tokens.size for tokens, _ in rows) < batch[0].size
    for name, array in one.state_dict().items():
        np.testing.assert_array_equal(array, each.state_dict()[name])
    _, bare = compress.quantize_model(model, SPEC, "gptq", [batch[:1]])
    assert bare.layers[0].rows == batch[0].size


def test_linear_weights_are_quantized_and_all_else_is_not():
    model = gpt(n_expert=4)
    small, report = compress.quantize_model(model, SPEC)
    block = small.blocks[1]
    assert type(block.attention.qkv) is type(block.attention.out) is QuantizedWeight
    assert [type(w) for w in block.mlp.up + block.mlp.down] == [QuantizedWeight] * 8
    assert {name.split(".", 2)[-1] for name, _ in small.named_parameters()} == {
        "weight", "norm_1.weight", "norm_2.weight", "mlp.router"}
    assert small.embedding.weight is model.embedding.weight
    assert [r.name for r in report.layers[:3]] == ["blocks.0.attention.qkv", "blocks.0.attention.out",
                                                   "blocks.0.mlp.up.0"]
    assert len(report.layers) == 3 * 10 and report.bits_per_weight == 5.0
    assert all(r.output_error is None and r.method == "rtn" for r in report.layers)


def test_round_to_nearest_is_that_of_every_weight():
    model = gpt(n_expert=2)
    small, _ = compress.quantize_model(model, SPEC)
    np.testing.assert_array_equal(small.blocks[2].mlp.up[1].data, nf.quant.quantize(model.blocks[2].mlp.up.data[1],
                                                                                    SPEC).data)
    np.testing.assert_array_equal(small.blocks[0].attention.qkv.data,
                                  nf.quant.quantize(model.blocks[0].attention.qkv.data, SPEC).data)


def test_gptq_fits_each_layer_to_what_the_quantized_layers_before_it_give():
    model, data = gpt(n_layer=2), batches(8)
    small, report = compress.quantize_model(model, SPEC, "gptq", data)
    twin = small.as_arrays()
    streams = [twin.enter(tokens) for tokens, _ in data]
    x = np.concatenate([twin.blocks[0](x, r, None, 0) for x, r in streams])
    rows = twin.blocks[1].norm_1(x).reshape(-1, 32)
    expected, single = nf.quant.gptq(model.blocks[1].attention.qkv.data, rows, SPEC)
    np.testing.assert_array_equal(small.blocks[1].attention.qkv.data, expected.data)
    assert report.layers[4].name == "blocks.1.attention.qkv" and report.layers[4].output_error == single.output_error


def test_gptq_has_the_smaller_output_error_on_held_out_rows():
    model, data, other = gpt(), batches(20, rows=8), batches(4, seed=11)
    gptq, rtn = (compress.quantize_model(model, SPEC, method, data, held_out=other)[1] for method in ("gptq", "rtn"))
    assert all(r.output_error_on == "held-out" for r in gptq.layers + rtn.layers)
    assert np.mean([r.output_error for r in gptq.layers]) < np.mean([r.output_error for r in rtn.layers])
    assert "blocks.0.attention.qkv" in str(gptq) and "bytes before" in str(gptq)


def test_an_expert_sees_its_own_rows_and_with_too_few_is_rounded_to_nearest():
    model, data = gpt(n_layer=1, n_expert=4), batches(6)
    model.blocks[0].mlp.router.data[0] = 0
    _, report = compress.quantize_model(model, SPEC, "gptq", data, min_rows=60)
    ups = [r for r in report.layers if ".up." in r.name]
    tokens = sum(t.size for t, _ in data)
    assert sum(r.rows for r in ups) == 2 * tokens and len({r.rows for r in ups}) > 1
    assert [r.method for r in ups] == ["gptq" if r.rows >= 60 else "rtn" for r in ups]
    _, report = compress.quantize_model(model, SPEC, "gptq", data, min_rows=10**6)
    assert {r.method for r in report.layers if ".mlp." in r.name} == {"rtn"}
    assert {r.method for r in report.layers if ".attention." in r.name} == {"gptq"}
    one = [(np.array([[3]]), None)]
    assert [r.rows for r in compress.quantize_model(model, SPEC, "gptq", one)[1].layers].count(0) == 4


def test_asymmetric_and_8_bit_weights_are_saved_too(tmp_path):
    pytest.importorskip("safetensors")
    for spec in (QuantSpec(bits=8, group_size=None), QuantSpec(bits=4, group_size=16, symmetric=False)):
        small, _ = compress.quantize_model(gpt(n_expert=2), spec)
        small.save_pretrained(tmp_path)
        again = nf.models.load(tmp_path)
        assert dict(again.named_quantized())["blocks.0.mlp.up.1"].spec == spec
        for name, array in small.state_dict().items():
            np.testing.assert_array_equal(again.state_dict()[name], array)


@pytest.mark.parametrize(("change", "message"), [
    (lambda q: q.update(quant_method="gptq"), "'gptq' is not known"),
    (lambda q: q.pop("groups"), "quantization_config is broken: 'groups'"),
    (lambda q: q["groups"][0]["spec"].update(bits=8), "must be a uint8 array"),
    (lambda q: q["groups"][0]["weights"].remove("blocks.0.mlp.up.1"), "has 2 experts"),
    (lambda q: q["groups"][0]["weights"].append("blocks.7.attention.qkv"), "is missing")])
def test_a_quantization_config_that_does_not_fit_is_an_error(tmp_path, change, message):
    pytest.importorskip("safetensors")
    compress.quantize_model(gpt(n_expert=2), SPEC)[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        nf.models.load(tmp_path)


EIGHT = QuantSpec(bits=8, group_size=None)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_quantized_where_asked(tmp_path, tied, method):
    pytest.importorskip("safetensors")
    model = gpt(tie_embedding=tied, n_expert=2, recompute=True)
    small, report = compress.quantize_model(model, SPEC, method, batches(6), embedding=EIGHT, head=EIGHT)
    assert small.embedding.weight.spec == EIGHT and type(model.embedding.weight) is nf.Tensor
    nearest = nf.quant.quantize(model.embedding.weight.data, EIGHT)
    np.testing.assert_array_equal(small.embedding.weight.data, nearest.data)
    assert small.head is None if tied else small.head.spec == EIGHT
    names = [r.name for r in report.layers]
    assert names[0] == "embedding.weight" and (names[-1] == "head") == (not tied)
    assert report.layers[0].method == "rtn" and report.layers[-1].method == method
    tokens, targets = batches(1, seed=9)[0]
    with nf.no_grad():
        logits, loss = small(tokens).data, float(small.loss(tokens, targets))
        full = float(model.eval().loss(tokens, targets))
    twin = small.as_arrays()
    assert logits.dtype == np.float32 and abs(loss - full) < 0.1
    np.testing.assert_array_equal(logits, nf.quant.linear(twin.hidden(tokens), small.output_weight))
    np.testing.assert_array_equal(twin.enter(tokens)[0],
                                  small.embedding.weight.dequantize()[tokens] * np.float32(small.scale))
    row = small.generate([1, 2, 3], 5, temperature=0)
    assert row[3] == twin(np.array([[1, 2, 3]]))[0, -1].argmax()
    small.save_pretrained(tmp_path)
    again = nf.models.load(tmp_path)
    np.testing.assert_array_equal(again.as_arrays()(tokens), logits)
    assert again.generate([1, 2, 3], 5, temperature=0) == row
    assert report.nbytes == sum(a.nbytes for a in again.state_dict().values())


def test_a_head_alone_is_fitted_to_what_the_quantized_model_gives_it():
    model, data = gpt(n_layer=1, tie_embedding=False), batches(8)
    small, report = compress.quantize_model(model, SPEC, "gptq", data, head=SPEC)
    assert type(small.embedding.weight) is nf.Tensor
    twin = small.as_arrays()
    rows = np.concatenate([twin.hidden(tokens) for tokens, _ in data]).reshape(-1, 32)
    expected, single = nf.quant.gptq(model.head.data, rows, SPEC)
    np.testing.assert_array_equal(small.head.data, expected.data)
    assert report.layers[-1].output_error == single.output_error
    only, _ = compress.quantize_model(model, SPEC, embedding=SPEC)
    assert type(only.head) is nf.Tensor and type(only.embedding.weight) is QuantizedWeight


def test_bad_requests_are_refused():
    model = gpt()
    for specs in {"head": EIGHT}, {"embedding": EIGHT}, {"embedding": EIGHT, "head": SPEC}:
        with pytest.raises(ValueError, match="give embedding and head the same spec"):
            compress.quantize_model(model, SPEC, **specs)
    with pytest.raises(TypeError, match="quantize_model: head: spec must be a QuantSpec, got int"):
        compress.quantize_model(model, SPEC, head=8)
    with pytest.raises(ValueError, match='"rtn" or "gptq"'):
        compress.quantize_model(model, SPEC, "awq")
    with pytest.raises(ValueError, match="needs calibration batches"):
        compress.quantize_model(model, SPEC, "gptq")
    with pytest.raises(ValueError, match='"rtn" takes no damp'):
        compress.quantize_model(model, SPEC, damp=0.1)
    with pytest.raises(TypeError, match="float32, got float64"):
        compress.quantize_model(gpt(dtype="float64"), SPEC)
    with pytest.raises(TypeError, match="must be a GPT, got Linear"):
        compress.quantize_model(nf.nn.Linear(2, 2, rng=np.random.default_rng(0)), SPEC)
    small, _ = compress.quantize_model(model, SPEC)
    with pytest.raises(TypeError, match="quantized already"):
        compress.quantize_model(small, SPEC)
    with pytest.raises(TypeError, match="prune first"):
        compress.prune_heads(small, {0: [0]})
    weight = small.blocks[0].attention.out
    with pytest.raises(ValueError, match=r"no weight blocks\.9\.attention\.out"):
        small.set_quantized({"blocks.9.attention.out": weight})
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.qkv must have shape \(96, 32\), got \(32, 32\)"):
        small.set_quantized({"blocks.0.attention.qkv": weight})
