import json
import sys
import threading

import numpy as np
import pytest

import numformer as nf
from numformer import files
from numformer.models import pretrained

pytest.importorskip("safetensors")


def small(seed=0, **options):
    config = nf.models.GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16, **options)
    return nf.models.GPT(config, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("options", [{}, {"position": "learned", "norm": "layer", "bias": True, "activation": "gelu"},
                                     {"tie_embedding": False, "init": "gpt2", "n_kv_head": 1},
                                     {"layer_heads": [[2, 2], [1, 1]]}, {"dtype": "float64"},
                                     {"position": "alibi", "window": 5}])
def test_a_saved_model_comes_back_with_the_same_bits(tmp_path, options):
    model = small(3, **options)
    model.save_pretrained(tmp_path / "m")
    again = nf.models.load(tmp_path / "m")
    assert type(again) is nf.models.GPT and not again.training
    assert list(again.state_dict()) == list(model.state_dict())
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], array)
    ids = np.arange(16)[None]
    np.testing.assert_array_equal(again(ids).data, model(ids).data)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_weights_of_any_float_are_read_and_others_named(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kinds = [np.float16, np.float64, pytest.importorskip("ml_dtypes").bfloat16]
    for dtype in kinds:
        halves = {name: array.astype(dtype) for name, array in model.state_dict().items()}
        pretrained.write_safetensors(path, halves)
        assert all(array.dtype == dtype for array in pretrained.read_safetensors(path).values())
        for name, array in nf.models.load(tmp_path).state_dict().items():
            np.testing.assert_array_equal(array, halves[name].astype(np.float32))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"model\.safetensors: .* is bfloat16, .* the package ml_dtypes: install it"):
        nf.models.load(tmp_path)
    monkeypatch.undo()
    import ml_dtypes
    pretrained.write_safetensors(path, {"a": np.ones(3, ml_dtypes.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"model\.safetensors: a is of a dtype that NumPy lacks, F8_E4M3"):
        pretrained.read_safetensors(path)
    others = {"a": np.array([True]), "b": np.ones((2, 0), np.uint16), "c": np.arange(3), "d": np.array(2, np.int8)}
    pretrained.write_safetensors(path, others)
    for name, array in pretrained.read_safetensors(path).items():
        assert array.dtype == others[name].dtype and np.array_equal(array, others[name])


def test_saving_over_a_model_leaves_other_files(tmp_path):
    small(0).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    model = small(1)
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(nf.models.load(tmp_path).embedding.weight.data, model.embedding.weight.data)
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("killed_at", ["model.safetensors", "config.json"])
def test_a_save_that_was_cut_short_leaves_the_old_model_or_the_new(tmp_path, monkeypatch, killed_at):
    from numformer.models import pretrained
    old, new = small(0, rope_theta=100.0), small(1, n_kv_head=2)        # of the same shapes
    old.save_pretrained(tmp_path)
    whole = pretrained.replace_file

    def killed(path, content):
        if path.name == killed_at:
            raise KeyboardInterrupt
        whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    want, ids = (old if killed_at == "model.safetensors" else new), np.arange(16)[None]
    again = nf.models.load(tmp_path)
    assert again.config == want.config
    np.testing.assert_array_equal(again(ids).data, want.eval()(ids).data)
    new.save_pretrained(tmp_path)
    assert nf.models.load(tmp_path).config == new.config


def test_a_config_of_numpys_numbers_is_saved_as_of_pythons(tmp_path):
    tokens = np.array([[3, 1, 49]])
    config = nf.models.GPTConfig(vocab_size=tokens.max() + 1, block_size=np.int32(8), n_layer=1, n_head=2, n_embd=16,
                                 rope_theta=np.float32(50))
    model = nf.models.GPT(config, rng=np.random.default_rng(0)).eval()
    model.save_pretrained(tmp_path)
    again = nf.models.load(tmp_path)
    assert again.config == config and type(again.config.vocab_size) is int
    np.testing.assert_array_equal(again(tokens).data, model(tokens).data)


def test_a_model_is_saved_as_the_same_bytes_by_every_process(tmp_path):
    small().save_pretrained(tmp_path)
    header = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert len(json.loads(header[8:8 + length])["__metadata__"]) == 1      # the order of more is that of a hash


def test_a_config_may_be_edited_and_be_of_before_it_had_a_seal(tmp_path):
    small().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dropout": 0.5}))
    assert nf.models.load(tmp_path).config.dropout == 0.5
    del config["saved_as"]
    path.write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert nf.models.load(tmp_path).config.rope_theta == 5.0


def test_what_is_missing_or_broken_is_said_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        nf.models.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        nf.models.load(tmp_path)
    small().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (b"", whole[:100], whole[:-10], b"x" * len(whole)):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file") as caught:
            nf.models.load(tmp_path)
        assert "\n" not in str(caught.value) and "config.json" not in str(caught.value)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        nf.models.load(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ({"n_layer": 3}, "missing blocks"), ({"n_embd": 32}, "must have shape"), ({"new": 1}, "does not describe a GPT"),
    ({"n_head": 3}, r"config\.json does not describe a GPT: GPTConfig: n_embd must be a multiple of n_head"),
    ({"model_type": "x"}, "'x'"), ({"model_type": ["x"]}, "names no model_type")])
def test_a_config_that_does_not_fit_is_an_error(tmp_path, change, message):
    small().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        nf.models.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is broken"):
        nf.models.load(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.replace_file(path, "old")
    monkeypatch.setattr(files.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.replace_file(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_two_threads_that_write_one_file_leave_one_of_theirs_whole(tmp_path):
    begun, written = threading.Event(), threading.Event()

    def slow(file):
        file.write(b"slow")
        begun.set()
        assert written.wait(60)
        file.write(b", to its end")

    thread = threading.Thread(target=files.replace_file, args=(tmp_path / "file", slow))
    thread.start()
    assert begun.wait(60)
    files.replace_file(tmp_path / "file", "quick")
    assert (tmp_path / "file").read_text() == "quick"
    written.set()
    thread.join()
    assert (tmp_path / "file").read_text() == "slow, to its end" and len(list(tmp_path.iterdir())) == 1
