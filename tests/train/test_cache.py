import json
import os

import pytest
import torch

from dpal_edge.errors import ConfigError, DataError
from dpal_edge.train.cache import TargetCache, bytes_needed

CPU = torch.device("cpu")
IDENTITY = {"teacher": "a", "seed": 0}


def targets(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "global": torch.randn(count, 1, 4, generator=generator),
        "local": torch.randn(count, 6, 4, generator=generator),
    }


@pytest.fixture
def cache(tmp_path):
    cache = TargetCache(tmp_path, rows=10, identity=IDENTITY)
    yield cache
    cache.close()


def test_returns_what_was_put(cache):
    keys, values = torch.tensor([7, 2, 5]), targets(3)
    assert cache.get(keys, CPU) is None
    cache.put(keys, values, torch.float32)
    found = cache.get(torch.tensor([5, 7]), CPU)
    for name, value in values.items():
        assert torch.equal(found[name], value[[2, 0]])


def test_bf16_rounds_once(cache):
    keys, values = torch.tensor([0, 1]), targets(2)
    cache.put(keys, values, torch.bfloat16)
    for name, value in cache.get(keys, CPU).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, values[name].bfloat16().float())


def test_a_batch_with_one_unknown_view_is_unknown(cache):
    cache.put(torch.tensor([0, 1]), targets(2), torch.float32)
    assert cache.get(torch.tensor([0, 2]), CPU) is None
    assert cache.get(torch.tensor([9]), CPU) is None


def test_another_process_reads_it(cache, tmp_path):
    cache.put(torch.tensor([3]), targets(1), torch.float32)
    other = TargetCache(tmp_path, rows=10, identity=IDENTITY)
    assert torch.equal(other.get(torch.tensor([3]), CPU)["local"], targets(1)["local"])
    other.close()


def test_another_identity_is_another_cache(cache, tmp_path):
    cache.put(torch.tensor([3]), targets(1), torch.float32)
    other = TargetCache(tmp_path, rows=10, identity={**IDENTITY, "seed": 1})
    assert other.get(torch.tensor([3]), CPU) is None
    assert other.folder != cache.folder
    assert json.loads((cache.folder / "identity.json").read_text()) == IDENTITY


@pytest.mark.parametrize("at", [0, 20])
def test_a_row_with_a_changed_byte_is_unknown(cache, at):
    cache.put(torch.tensor([0, 1]), targets(2), torch.float32)
    path = cache.folder / "local.rows"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert cache.get(torch.tensor([0]), CPU) is None
    assert cache.get(torch.tensor([1]), CPU) is not None


def test_a_row_cut_short_is_unknown(cache):
    cache.put(torch.tensor([0, 9]), targets(2), torch.float32)
    path = cache.folder / "local.rows"
    os.truncate(path, path.stat().st_size - 1)
    assert cache.get(torch.tensor([9]), CPU) is None
    assert cache.get(torch.tensor([0]), CPU) is not None


def test_size_by_hand():
    # 10 rows of 6 * 4 values of 2 bytes, and 4 bytes of checksum each
    assert bytes_needed(10, {"local": (6, 4)}, torch.bfloat16) == 10 * (48 + 4)


def test_refuses_what_cannot_fit(tmp_path):
    cache = TargetCache(tmp_path, rows=10**12, identity=IDENTITY)
    with pytest.raises(ConfigError, match=r"needs 120000\.0 GB for 1000000000000 views .* lower view_variants"):
        cache.put(torch.tensor([0]), targets(1), torch.float32)


def test_says_when_the_disk_is_full(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    cache.put(torch.tensor([0]), targets(1), torch.float32)
    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); free some space"):
        cache.put(torch.tensor([1]), targets(1), torch.float32)
