"""Data: shapes, a split that never changes, an order that follows the seed."""

from __future__ import annotations

import pytest
import torch

from fxprune import data
from fxprune.errors import OptionError, OptionTypeError


def _all(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_digits_shapes_and_scale():
    train, test = data.digits(batch_size=100)
    x, y = _all(train)
    assert x.shape == (1437, 1, 8, 8)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert abs(x.mean()) < 1e-4
    assert abs(x.std() - 1) < 1e-3
    x, y = _all(test)
    assert x.shape == (360, 1, 8, 8)
    assert y.bincount().tolist() == pytest.approx([36] * 10, abs=1)
    assert [len(y) for _, y in test] == [100, 100, 100, 60]


def test_the_split_does_not_depend_on_the_seed():
    (train0, test0), (train1, test1) = data.digits(seed=0), data.digits(seed=1)
    assert torch.equal(_all(test0)[0], _all(test1)[0])
    pixels = [sorted(map(tuple, _all(t)[0].flatten(1).tolist())) for t in (train0, train1)]
    assert pixels[0] == pixels[1]


def test_train_and_test_share_no_image_by_index():
    train, test = data.digits()
    assert len(train.dataset) + len(test.dataset) == 1797


def test_order_follows_the_seed_alone():
    a, b = data.digits(seed=3)[0], data.digits(seed=3)[0]
    first = _all(a)[1]
    torch.manual_seed(99)  # the global state has no say
    assert torch.equal(first, _all(b)[1])
    assert torch.equal(_all(a)[1], _all(b)[1])  # the second epochs agree too ...
    assert not torch.equal(first, _all(a)[1])  # ... and differ from the first
    assert not torch.equal(first, _all(data.digits(seed=4)[0])[1])


def test_load_by_name():
    assert data.names() == ("digits",)
    assert next(iter(data.load("digits", batch_size=5)[1]))[0].shape == (5, 1, 8, 8)
    with pytest.raises(OptionError, match="did you mean 'digits'"):
        data.load("digit")


def test_bad_batch_size():
    with pytest.raises(OptionError, match="at least 1"):
        data.digits(batch_size=0)
    with pytest.raises(OptionTypeError, match="an integer"):
        data.digits(batch_size=1.5)
