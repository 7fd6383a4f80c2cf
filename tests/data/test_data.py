import errno
import resource

import numpy as np
import pytest

from numformer import data


def shards(folder, *lengths, start=0):
    for i, n in enumerate(lengths):
        data.write_shard(folder / f"{i}.npy", np.arange(start, start + n))
        start += n
    return data.TokenShards(folder)


def test_a_window_is_neighbouring_tokens_and_targets_are_one_further(tmp_path):
    tokens, targets = next(data.Batches(shards(tmp_path, 20, 9), 3, 4, seed=1))
    assert tokens.shape == targets.shape == (3, 4) and tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens + 1, targets)
    np.testing.assert_array_equal(np.diff(tokens), 1)


def test_an_epoch_takes_every_window_once_and_the_next_another_order(tmp_path):
    batches = data.Batches(shards(tmp_path, 41, 3, 22), 5, 4, seed=1)         # 10 + 0 + 5 windows
    assert batches.windows == 15
    epochs = [[int(x) for _ in range(3) for x in next(batches)[0][:, 0]] for _ in range(2)]
    expected = list(range(0, 40, 4)) + list(range(44, 64, 4))
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected and epochs[0] != epochs[1]


def test_the_order_is_the_seeds_and_resumes_in_the_middle_of_an_epoch(tmp_path):
    source = shards(tmp_path, 100)
    one, other = data.Batches(source, 4, 5, seed=3), data.Batches(source, 4, 5, seed=3)
    for _ in range(7):
        next(one)
    other.restore(one.state())
    for _ in range(9):
        for a, b in zip(next(one), next(other)):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(next(data.Batches(source, 4, 5, seed=4))[0], next(data.Batches(source, 4, 5, seed=3))[0])


def test_other_data_are_not_resumed(tmp_path):
    batches = data.Batches(shards(tmp_path, 100), 4, 5, seed=3)
    with pytest.raises(ValueError, match="the checkpoint was made with"):
        data.Batches(data.TokenShards(tmp_path), 4, 6, seed=3).restore(batches.state())


@pytest.mark.parametrize(("most", "dtype"), [(0xFFFF, np.uint16), (0x10000, np.uint32), (0xFFFFFFFF, np.uint32)])
def test_ids_are_stored_small_and_come_back_whole(tmp_path, most, dtype):
    data.write_shard(tmp_path / "a.npy", np.array([0, most, 1]))
    source = data.TokenShards(tmp_path / "a.npy")
    assert source.shards[0].dtype == dtype and isinstance(source.shards[0], np.memmap) and len(source) == 3
    assert next(data.Batches(source, 1, 2))[1].tolist() == [[most, 1]]


def test_what_is_wrong_with_the_files_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.npy files"):
        data.TokenShards(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.TokenShards(tmp_path / "a.npy")
    with pytest.raises(FileNotFoundError, match="empty"):
        data.TokenShards([])
    with pytest.raises(ValueError, match="10 tokens of a window; the longest has 9"):
        data.Batches(shards(tmp_path, 9, 5), 1, 9)
    for name, sizes in (("batch", (0, 2)), ("block", (2, 0))):
        with pytest.raises(ValueError, match=f"Batches: {name} must be 1 or more, got 0"):
            data.Batches(data.TokenShards(tmp_path), *sizes)
    with pytest.raises(TypeError, match=r"Batches: batch must be an integer, got 2\.5"):
        data.Batches(data.TokenShards(tmp_path), 2.5, 2)
    with pytest.raises(TypeError, match="Batches: seed must be an integer, got None"):
        data.Batches(data.TokenShards(tmp_path), 2, 2, seed=None)
    with pytest.raises(ValueError, match="Batches: seed must be 0 or more, got -1"):
        data.Batches(data.TokenShards(tmp_path), 2, 2, seed=-1)
    np.save(tmp_path / "float.npy", np.ones(5))
    with pytest.raises(ValueError, match="uint16 or uint32, got float64"):
        data.TokenShards(tmp_path / "float.npy")
    for broken in (b"", b"junk", (tmp_path / "0.npy").read_bytes()[:-3]):
        (tmp_path / "broken.npy").write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken\.npy is not a whole"):
            data.TokenShards(tmp_path / "broken.npy")
    (tmp_path / "text.npy").write_text("Once upon a time")
    with pytest.raises(ValueError, match=r"text\.npy is not a whole .* as write_shard writes it: it does not begin as"):
        data.TokenShards(tmp_path / "text.npy")
    with open(tmp_path / "many.npy", "wb") as file:
        np.savez(file, np.arange(3))
    with pytest.raises(ValueError, match=r"many\.npy is not a whole \.npy file, .* an archive of several arrays"):
        data.TokenShards(tmp_path / "many.npy")


def test_what_is_not_token_ids_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got -1"):
        data.write_shard(tmp_path / "a.npy", np.array([3, -1]))
    with pytest.raises(ValueError, match="one axis"):
        data.write_shard(tmp_path / "a.npy", np.array([0.5]))
    assert not list(tmp_path.iterdir())


def test_what_the_system_says_of_a_shard_that_does_not_fit_is_passed_on_and_nothing_is_left(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            data.write_shard(tmp_path / "a.npy", np.zeros(1_000_000, np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG and not list(tmp_path.iterdir())
