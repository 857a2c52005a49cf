"""Data sets: where they are found, what is checked, what they give, and every refusal."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import re

import pytest
import torch
from fake_data import (
    cifar_records,
    idx,
    nobody_there,
    png,
    served,
    tar_of,
    tree,
    write,
    zip_of,
)

from fxprune import data
from fxprune.datasets.augment import normalize
from fxprune.datasets.downloads import Remote
from fxprune.errors import DataError, OptionError, OptionTypeError


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch, tmp_path):
    """No data set of the user's, no proxy, and nobody at the real addresses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FXPRUNE_DATA", raising=False)
    monkeypatch.setattr(data, "_DEBIAN", tmp_path / "debian")
    away = nobody_there()
    for name in ("_CIFAR10", "_CIFAR100"):
        facts = getattr(data, name)
        remote = Remote(away + facts.remote.name, facts.remote.md5)
        monkeypatch.setattr(data, name, dataclasses.replace(facts, remote=remote))
    monkeypatch.setattr(data, "_FASHION_HOME", away)
    monkeypatch.setattr(data, "_TINY", Remote(away + data._TINY.name, data._TINY.md5))


def md5(raw):
    return hashlib.md5(raw).hexdigest()


def whole(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def refused(call, error=DataError):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


class FakeCifar:
    """Few records in the files of a CIFAR set, and their facts in place of the published ones."""

    def __init__(self, monkeypatch, name):
        attribute = {"cifar10": "_CIFAR10", "cifar100": "_CIFAR100"}[name]
        facts = getattr(data, attribute)
        self.parts = {
            file: cifar_records(6 if file in facts.train else 4, facts.labels, seed=i)
            for i, file in enumerate([*facts.train, *facts.test])
        }
        self.files = {f"{facts.folder}/{file}": part[0] for file, part in self.parts.items()}
        self.archive = tar_of({**self.files, f"{facts.folder}/readme.html": b"<html>"})

        def sums(files):
            return {file: files[file] and md5(self.parts[file][0]) for file in files}

        def publish(home):
            self.facts = dataclasses.replace(
                facts,
                remote=Remote(home + facts.remote.name, md5(self.archive)),
                train=sums(facts.train),
                test=sums(facts.test),
                records=(6, 4),
            )
            monkeypatch.setattr(data, attribute, self.facts)

        self.publish = publish
        publish(nobody_there())

    def images(self, files):
        return torch.cat([self.parts[file][1] for file in files])

    def labels(self, files):
        return torch.cat([self.parts[file][2][-1] for file in files])


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, monkeypatch):
    fake = FakeCifar(monkeypatch, request.param)
    fake.name = request.param
    return fake


def test_cifar_comes_out_whole_and_normalised(cifar, tmp_path):
    write(tmp_path, cifar.files)
    loaders = data.load(cifar.name, root=tmp_path, batch_size=5)
    assert (loaders.name, loaders.shape) == (cifar.name, (3, 32, 32))
    assert loaders.classes == {"cifar10": 10, "cifar100": 100}[cifar.name]
    facts = cifar.facts
    x, y = whole(loaders.test)
    assert torch.equal(x, normalize(cifar.images(facts.test), loaders.mean, loaders.std))
    assert torch.equal(y, cifar.labels(facts.test))
    expected = normalize(cifar.images(facts.train), loaders.mean, loaders.std)
    everything = zip(expected, cifar.labels(facts.train).tolist(), strict=True)
    wanted = sorted((round(i.sum().item(), 2), label) for i, label in everything)
    for loader in (loaders.plain, data.load(cifar.name, root=tmp_path, augment=False).train):
        x, y = whole(loader)
        found = zip(x, y.tolist(), strict=True)
        assert sorted((round(i.sum().item(), 2), label) for i, label in found) == wanted
    x, y = whole(loaders.train)  # cropped and flipped, the labels unharmed
    assert sorted(y.tolist()) == sorted(cifar.labels(facts.train).tolist())
    assert x.shape == expected.shape


def test_cifar10_is_normalised_as_the_trained_networks_were():
    assert data._CIFAR10.mean == (0.485, 0.456, 0.406)
    assert data._CIFAR10.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("way", ["folder", "variable", "home", "tilde"])
def test_where_cifar_is_found(cifar, tmp_path, monkeypatch, way):
    place = tmp_path / "home" / ".cache" / "fxprune"
    write(place, cifar.files)
    root = None
    if way == "folder":
        root = place / cifar.facts.folder
    elif way == "variable":
        place = place.rename(tmp_path / "elsewhere")
        monkeypatch.setenv("FXPRUNE_DATA", str(place))
    elif way == "tilde":
        root = "~/.cache/fxprune"
    assert len(data.load(cifar.name, root=root).test.dataset) == 4


def test_cifar_is_fetched_once(cifar, tmp_path):
    facts = cifar.facts
    with served({facts.remote.name: cifar.archive}) as (home, asked):
        cifar.publish(home)
        for _ in range(2):
            assert len(data.load(cifar.name, root=tmp_path / "new").test.dataset) == 4
        assert asked == [f"/{facts.remote.name}"]
    assert tree(tmp_path / "new") == sorted([*cifar.files, f"{facts.folder}/readme.html"])


def test_a_cifar_archive_that_lies_there_is_unpacked(cifar, tmp_path):
    write(tmp_path, {cifar.facts.remote.name: cifar.archive})
    assert len(data.load(cifar.name, root=tmp_path).test.dataset) == 4
    assert set(cifar.files) < set(tree(tmp_path))


def test_missing_and_no_network(cifar, tmp_path):
    title, remote = cifar.facts.title, cifar.facts.remote
    root = tmp_path / "nowhere"
    text = refused(lambda: data.load(cifar.name, root=root))
    assert text.startswith(f"{title} is not here, and could not be downloaded\n  where: {root}\n")
    assert "Connection refused" in text
    assert f"get {remote.url} (MD5 {remote.md5})" in text
    assert (
        f"put it into {root}, where it is unpacked by itself; or say where the data is: root=..., or the variable FXPRUNE_DATA"
        in text
    )
    assert not root.exists()


def test_a_missing_file_of_a_set_is_missing(cifar, tmp_path):
    write(tmp_path, cifar.files)
    folder = tmp_path / cifar.facts.folder
    file = next(iter(cifar.facts.test))
    (folder / file).unlink()
    assert "could not be downloaded" in refused(lambda: data.load(cifar.name, root=tmp_path))
    with served({cifar.facts.remote.name: cifar.archive}) as (home, _):
        cifar.publish(home)
        data.load(cifar.name, root=tmp_path)
    assert (folder / file).read_bytes() == cifar.parts[file][0]


def test_a_damaged_cifar10_file_is_told_with_both_sums(tmp_path, monkeypatch):
    fake = FakeCifar(monkeypatch, "cifar10")
    write(tmp_path, fake.files)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    good = path.read_bytes()
    bad = good[:-1] + bytes([good[-1] ^ 1])
    path.write_bytes(bad)
    text = refused(lambda: data.cifar10(tmp_path))
    assert text == (
        "`data_batch_3.bin` is damaged\n"
        f"  where: {path}\n"
        f"  why:   its MD5 is {md5(bad)}, the published one {md5(good)}\n"
        f"  fix:   delete it, and it comes anew from {fake.facts.remote.url}"
    )


def test_a_truncated_cifar_file(cifar, tmp_path):
    write(tmp_path, cifar.files)
    path = tmp_path / cifar.facts.folder / next(iter(cifar.facts.train))
    path.write_bytes(path.read_bytes()[:-1000])
    text = refused(lambda: data.load(cifar.name, root=tmp_path))
    size = 6 * (3072 + len(cifar.facts.labels))
    assert f"it holds {size - 1000:,} bytes instead of {size:,}" in text


def test_a_label_out_of_range(tmp_path, monkeypatch):
    fake = FakeCifar(monkeypatch, "cifar100")  # of whose files no sums are published
    write(tmp_path, fake.files)
    path = tmp_path / "cifar-100-binary" / "test.bin"
    raw = bytearray(path.read_bytes())
    raw[3074 + 1] = 100
    path.write_bytes(raw)
    text = refused(lambda: data.cifar100(tmp_path))
    assert "`test.bin` is damaged" in text
    assert "record 1 has the label 100; labels are 0 ... 99" in text


def test_the_published_facts_have_the_published_sizes():
    """What no fake shows: 30,730,000 bytes a file, 50,000 and 10,000 images, MD5s of 32 digits."""
    for facts, size in ((data._CIFAR10, 30_730_000), (data._CIFAR100, 153_700_000)):
        assert facts.records[0] * (3072 + len(facts.labels)) == size
        assert facts.records[0] * len(facts.train) == 50_000
        assert facts.records[1] * len(facts.test) == 10_000
        sums = [facts.remote.md5, *facts.train.values(), *facts.test.values()]
        assert all(re.fullmatch("[0-9a-f]{32}", s) for s in sums if s)
    torchvision = pytest.importorskip("torchvision")
    theirs = dict(torchvision.datasets.FashionMNIST.resources)
    assert {f"{name}.gz": sums[0] for name, sums in data._FASHION.items()} == theirs


@pytest.fixture
def fashion(monkeypatch):
    """Six and four images of 28x28 in the four files; {name: bytes}, unpacked."""
    g = torch.Generator().manual_seed(0)
    files = {}
    for prefix, count in (("train", 6), ("t10k", 4)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=g)
        labels = torch.randint(10, (count,), dtype=torch.uint8, generator=g)
        files[f"{prefix}-images-idx3-ubyte"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx(labels)
    monkeypatch.setattr(data, "_FASHION_COUNTS", (6, 4))
    sums = {name: (md5(gzip.compress(raw, mtime=1)), md5(raw)) for name, raw in files.items()}
    monkeypatch.setattr(data, "_FASHION", sums)
    return files


def packed(files, mtime=1):
    return {f"{name}.gz": gzip.compress(raw, mtime=mtime) for name, raw in files.items()}


@pytest.mark.parametrize("place", ["fashion-mnist", "", "datasets/fashion-mnist", "FashionMNIST/raw"])  # fmt: skip
@pytest.mark.parametrize("pack", [dict, packed, lambda files: packed(files, mtime=7)])
def test_where_fashion_mnist_is_found_and_what_comes_out(fashion, tmp_path, place, pack):
    write(tmp_path / place, pack(fashion))
    loaders = data.load("fashion-mnist", root=tmp_path)
    assert (loaders.name, loaders.classes, loaders.shape) == ("fashion-mnist", 10, (1, 28, 28))
    raw = fashion["t10k-images-idx3-ubyte"][16:]
    images = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(4, 1, 28, 28)
    x, y = whole(loaders.test)
    assert torch.equal(x, normalize(images, loaders.mean, loaders.std))
    assert y.tolist() == list(fashion["t10k-labels-idx1-ubyte"][8:])
    assert whole(loaders.train)[0].shape == (6, 1, 28, 28)


def test_fashion_mnist_of_debian(fashion, tmp_path):
    write(tmp_path / "debian" / "fashion-mnist", packed(fashion))
    assert len(data.load("fashion-mnist").test.dataset) == 4
    text = refused(lambda: data.fashion_mnist(tmp_path))
    assert "Fashion-MNIST is not here, and could not be downloaded" in text
    assert f"put it into {tmp_path / 'fashion-mnist'}, and the other three files likewise" in text
    assert "(Debian's package `dataset-fashion-mnist` has them)" in text


def test_fashion_mnist_is_fetched(fashion, tmp_path, monkeypatch):
    with served(packed(fashion)) as (home, asked):
        monkeypatch.setattr(data, "_FASHION_HOME", home)
        for _ in range(2):
            data.load("fashion-mnist", root=tmp_path)
        assert len(asked) == 4
    assert tree(tmp_path) == sorted(f"fashion-mnist/{name}" for name in packed(fashion))


def test_fashion_mnist_damaged(fashion, tmp_path):
    name = "train-labels-idx1-ubyte"
    bad = fashion[name][:-1] + bytes([(fashion[name][-1] + 1) % 10])
    write(tmp_path, packed({**fashion, name: bad}))
    text = refused(lambda: data.fashion_mnist(tmp_path))
    assert f"`{name}.gz` is damaged" in text
    assert f"its MD5 is {md5(bad)}, the published one {md5(fashion[name])}" in text


def test_tiny_imagenet_is_fetched(tmp_path, monkeypatch):
    files = {"wnids.txt": "n2\nn1\n", "val/val_annotations.txt": "a.JPEG\tn1\t0\nb.JPEG\tn2\t0\n"}
    files |= {f"train/{n}/images/{n}_0.JPEG": png(64, 64) for n in ("n1", "n2")}
    files |= {f"val/images/{n}.JPEG": png(64, 64) for n in "ab"}
    archive = zip_of({f"tiny-imagenet-200/{name}": raw for name, raw in files.items()})
    text = refused(lambda: data.load("tiny-imagenet", root=tmp_path))
    assert text.startswith("Tiny-ImageNet is not here, and could not be downloaded")
    assert "tiny-imagenet-200.zip (MD5 90528d7ca1a48142e341f4ef8d21d0de)" in text
    with served({"tiny-imagenet-200.zip": archive}) as (home, asked):
        monkeypatch.setattr(data, "_TINY", Remote(f"{home}tiny-imagenet-200.zip", md5(archive)))
        for _ in range(2):
            loaders = data.load("tiny-imagenet", root=tmp_path)
        assert len(asked) == 1
    assert whole(loaders.test)[1].tolist() == [0, 1]
    assert set(tree(tmp_path)) == {f"tiny-imagenet-200/{name}" for name in files}


def test_a_path_that_is_not_tiny_imagenet_is_not_fetched(tmp_path):
    text = refused(lambda: data.load(f"tiny-imagenet:{tmp_path / 'no'}"))
    assert "Tiny-ImageNet is incomplete" in text
    assert f"{tmp_path / 'no' / 'wnids.txt'}: No such file" in text


def test_digits_shapes_and_scale():
    loaders = data.digits(batch_size=100)
    train, test = loaders
    x, y = whole(train)
    assert x.shape == (1437, 1, 8, 8)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert abs(x.mean()) < 1e-4
    assert abs(x.std() - 1) < 1e-3
    x, y = whole(test)
    assert x.shape == (360, 1, 8, 8)
    assert y.bincount().tolist() == pytest.approx([36] * 10, abs=1)
    assert [len(y) for _, y in test] == [100, 100, 100, 60]
    assert (loaders.name, loaders.classes, loaders.shape) == ("digits", 10, (1, 8, 8))
    pixels = (x * loaders.std[0] + loaders.mean[0]) * 16  # 0..16 in steps of 1
    assert (pixels - pixels.round()).abs().max() < 1e-4
    assert (pixels.min().round(), pixels.max().round()) == (0, 16)


def test_digits_come_in_the_order_of_a_plain_data_loader():
    """Batches that a training once saw come again: nothing but torch's own shuffling decides."""
    from torch.utils.data import DataLoader, TensorDataset

    ours = data.digits(batch_size=64, seed=3).train
    theirs = DataLoader(
        TensorDataset(ours.dataset.images, ours.dataset.labels),
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
    )
    for _ in range(3):
        for (x, y), (u, v) in zip(ours, theirs, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_the_split_of_digits_does_not_depend_on_the_seed():
    (train0, test0), (train1, test1) = data.digits(seed=0), data.digits(seed=1)
    assert torch.equal(whole(test0)[0], whole(test1)[0])
    pixels = [sorted(map(tuple, whole(t)[0].flatten(1).tolist())) for t in (train0, train1)]
    assert pixels[0] == pixels[1]
    assert len(train0.dataset) + len(test0.dataset) == 1797


def test_digits_are_never_augmented():
    plain = {tuple(x.flatten().tolist()) for x in whole(data.digits().plain)[0]}
    assert {tuple(x.flatten().tolist()) for x in whole(data.load("digits").train)[0]} == plain


def test_names():
    assert data.names() == (
        "digits",
        "cifar10",
        "cifar100",
        "fashion-mnist",
        "tiny-imagenet",
        "imagefolder",
    )
    assert next(iter(data.load("digits", batch_size=5)[1]))[0].shape == (5, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "there is no data set 'digit'; did you mean 'digits'?"),
        ("CIFAR-10", "there is no data set 'CIFAR-10'; did you mean 'cifar10'?"),
        ("cifar-100", "did you mean 'cifar100'?"),
        ("fashion_mnist", "did you mean 'fashion-mnist'?"),
        ("ImageFolder:x", "there is no data set 'ImageFolder'; did you mean 'imagefolder'?"),
        ("zzz", "there is no data set 'zzz'\n"),
        ("", "there is no data set ''\n"),
        ("imagefolder", "imagefolder needs a path"),
        ("imagefolder:", 'fix:   pass "imagefolder:PATH"'),
        ("tiny-imagenet:", "tiny-imagenet needs a path"),
        ("cifar10:somewhere", "cifar10 takes no path"),
        ("cifar10:somewhere", "fix:   pass \"cifar10\", root='somewhere'"),
    ],
)
def test_unknown_names(name, words):
    assert words in refused(lambda: data.load(name), OptionError)


def test_unknown_names_list_the_known():
    text = refused(lambda: data.load("zzz"), OptionError)
    assert "use one of digits, cifar10, cifar100, fashion-mnist, tiny-imagenet, imagefolder" in text


@pytest.mark.parametrize("name", data.names())
def test_options_are_checked_before_anything_is_looked_for(name):
    name = name + ":nowhere" if name == "imagefolder" else name
    with pytest.raises(OptionError, match="`batch_size` must be at least 1, not 0"):
        data.load(name, batch_size=0)
    with pytest.raises(OptionTypeError, match="`batch_size` must be an integer, not '4'"):
        data.load(name, batch_size="4")
    with pytest.raises(OptionError, match="`workers` must be at least 0, not -2"):
        data.load(name, workers=-2)


def test_other_wrong_arguments():
    assert "a string, not 3" in refused(lambda: data.load(3), OptionTypeError)
    text = refused(lambda: data.load("cifar10", root=3), OptionTypeError)
    assert "a path is a string or a Path, not 3" in text
    text = refused(lambda: data.load("cifar10", size=32), OptionError)
    assert "the images of cifar10 have their size" in text
    assert 'leave it out; "imagefolder:PATH" resizes' in text
