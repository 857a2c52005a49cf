"""Loaders: seeded, resumable, independent of batch size and workers; and their options."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fxprune.datasets.augment import crop_flip, normalize
from fxprune.datasets.loaders import InMemory, Options, serve
from fxprune.errors import OptionError, OptionTypeError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
IMAGES = torch.randint(1, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))  # fmt: skip
LABELS = torch.arange(50)


def make(**options):
    train = InMemory(IMAGES, LABELS, MEAN, STD, padding=2)
    test = InMemory(IMAGES[:7], LABELS[:7], MEAN, STD)
    options = Options(**{"batch_size": 16, **options})
    options.check()
    return serve("fake", 50, (3, 8, 8), MEAN, STD, train, test, options)


def whole(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def test_the_facts_and_how_they_unpack():
    loaders = make()
    train, test = loaders
    assert (train, test) == (loaders.train, loaders.test) == (loaders[0], loaders[1])
    assert len(loaders) == 2
    assert (loaders.name, loaders.classes, loaders.shape) == ("fake", 50, (3, 8, 8))
    assert (loaders.mean, loaders.std) == (MEAN, STD)
    assert len(train) == 4
    assert [len(y) for _, y in train] == [16, 16, 16, 2]
    x, y = next(iter(train))
    assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (16, 3, 8, 8), torch.int64, (16,))  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaders.train = None
    assert str(loaders).startswith("Loaders(name='fake', classes=50")


def test_every_training_image_once_per_epoch_each_a_crop_of_its_own():
    train = make(seed=1).train
    moved = mirrored = 0
    for _ in range(3):
        x, y = whole(train)
        assert sorted(y.tolist()) == list(range(50))
        for image, label in zip(x, y.tolist(), strict=True):
            every = crop_flip(IMAGES[label].expand(50, 3, 8, 8), torch.arange(50), 2)
            every = normalize(every, MEAN, STD)
            found = [i for i, outcome in enumerate(every) if torch.equal(outcome, image)]
            assert found
            moved += found[0] % 25 != 12
            mirrored += found[0] >= 25
    assert 130 < moved < 150  # of 150, a 25th stays
    assert 50 < mirrored < 100


def test_plain_test_and_unaugmented_images_are_normalised_and_no_more():
    expected = normalize(IMAGES, MEAN, STD)
    for loader in (make(augment=False).train, make().plain):
        x, y = whole(loader)
        assert sorted(y.tolist()) == list(range(50))
        assert y.tolist() != list(range(50))
        assert torch.equal(x, expected[y])
    x, y = whole(make().test)
    assert y.tolist() == list(range(7))
    assert torch.equal(x, expected[:7])


@pytest.mark.parametrize("augment", [True, False])
def test_the_seed_fixes_every_epoch(augment):
    a, b = make(seed=3, augment=augment).train, make(seed=3, augment=augment).train
    first = whole(a)
    torch.manual_seed(99)  # the global state has no say ...
    before = torch.get_rng_state()
    assert same(whole(b), first)
    second = whole(a)
    assert same(whole(b), second)
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(first[1], whole(make(seed=4, augment=augment).train)[1])
    for loader in make():
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)  # ... and no change


def test_plain_comes_in_one_shuffled_order():
    loaders = make(seed=5)
    first = whole(loaders.plain)
    assert same(first, whole(loaders.plain))
    assert same(first, whole(make(seed=5).plain))
    assert not torch.equal(first[1], whole(make(seed=6).plain)[1])


def test_batch_size_does_not_change_the_images():
    assert same(whole(make(seed=2).train), whole(make(seed=2, batch_size=7).train))


def test_workers_do_not_change_the_batches():
    alone, together = make(seed=2), make(seed=2, workers=2)
    for _ in range(2):
        for (x, y), (u, v) in zip(alone.train, together.train, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    assert same(whole(alone.test), whole(together.test))


@pytest.mark.parametrize("augment", [True, False])
def test_an_epoch_comes_again_from_its_generator(augment):
    """What a trainer needs to go on in the middle: the state of then, and how many batches."""
    train = make(seed=7, augment=augment).train
    list(train)
    state = train.generator.get_state()
    second, third = list(train), whole(train)
    other = make(seed=0, augment=augment).train
    other.generator.set_state(state)
    rest = list(other)[2:]
    for (x, y), (u, v) in zip(second[2:], rest, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert same(whole(other), third)


def test_an_epoch_that_was_left_early_does_not_hold_the_next_one_back():
    train = make(seed=7).train
    next(iter(train))
    assert sorted(whole(train)[1].tolist()) == list(range(50))


def test_one_image_of_the_data_set():
    image, label = make().train.dataset[3]
    assert torch.equal(image, normalize(IMAGES[3:4], MEAN, STD)[0])
    assert (label.item(), label.shape) == (3, ())


def test_float_images_are_taken_as_they_are():
    train = InMemory(IMAGES.float(), LABELS, MEAN, STD)
    assert torch.equal(train[4][0], IMAGES[4].float())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 0}, OptionError, "`batch_size` must be at least 1, not 0"),
        ({"batch_size": -3}, OptionError, "`batch_size` must be at least 1, not -3"),
        ({"batch_size": 1.5}, OptionTypeError, "`batch_size` must be an integer, not 1.5"),
        ({"batch_size": True}, OptionTypeError, "`batch_size` must be an integer, not True"),
        ({"batch_size": "8"}, OptionTypeError, "`batch_size` must be an integer, not '8'"),
        ({"workers": -1}, OptionError, "`workers` must be at least 0, not -1"),
        ({"workers": None}, OptionTypeError, "`workers` must be an integer, not None"),
        ({"seed": 0.5}, OptionTypeError, "`seed` must be an integer, not 0.5"),
        ({"seed": 2**64}, OptionError, "`seed` must fit into 64 bits"),
        ({"augment": 1}, OptionTypeError, "`augment` must be True or False, not 1"),
    ],
)
def test_options_are_checked(options, error, words):
    with pytest.raises(error, match=words) as caught:
        make(**options)
    assert f"where: {next(iter(options))}" in str(caught.value)
