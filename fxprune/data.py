"""Public data sets as loaders: (input, target) batches, the same on every machine.

Promise: a set's split never changes, so scores compare; `seed` orders and augments the training
         batches, and the same seed gives the same batches, epoch by epoch. Files are checked
         before they are used, and downloaded when they are missing and there is a network.
Refuses: an unknown name, with the nearest; files that are missing, damaged or incomplete, with
         what to get from where, and where to put it.
Adding a set: a function that ends in `serve(...)`, and a line in `_SETS`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxprune.datasets.downloads import Remote, fetch, unpack
from fxprune.datasets.folders import (
    ImageFiles,
    crops,
    listing_of,
    same_classes,
    shifts,
    tiny_listings,
)
from fxprune.datasets.formats import read_cifar, read_idx, read_idx_labels
from fxprune.datasets.loaders import InMemory, Loaders, Options, serve
from fxprune.errors import OptionError, OptionTypeError

StrPath = str | os.PathLike[str]

_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/"
_DEBIAN = Path("/usr/share/datasets")  # where packages of Debian put data sets
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class _Cifar:
    """What is published about a CIFAR set."""

    title: str
    folder: str
    remote: Remote
    train: dict[str, str | None]  # file -> MD5
    test: dict[str, str | None]
    records: tuple[int, int]  # per file of each part
    labels: tuple[int, ...]  # how many there are of each label of a record; the last one counts
    mean: tuple[float, ...]
    std: tuple[float, ...]


_CIFAR10 = _Cifar(
    "CIFAR-10",
    "cifar-10-batches-bin",
    Remote(_CIFAR_HOME + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    train={
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    },
    test={"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
    records=(10_000, 10_000),
    labels=(10,),
    mean=_IMAGENET[0],
    std=_IMAGENET[1],
)
_CIFAR100 = _Cifar(
    "CIFAR-100",
    "cifar-100-binary",
    Remote(_CIFAR_HOME + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    train={"train.bin": None},
    test={"test.bin": None},
    records=(50_000, 10_000),
    labels=(20, 100),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)

_FASHION_HOME = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_COUNTS = (60_000, 10_000)
_FASHION_SIDE = 28
# file -> MD5 of the published archive, and of what it holds
_FASHION: dict[str, tuple[str, str]] = {
    "train-images-idx3-ubyte": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    "train-labels-idx1-ubyte": ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
    "t10k-images-idx3-ubyte": ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
    "t10k-labels-idx1-ubyte": ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
}  # fmt: skip

_TINY = Remote(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
)


def digits(
    batch_size: int = 64,
    seed: int = 0,
    *,
    root: StrPath | None = None,
    augment: bool = True,
    workers: int = 0,
) -> Loaders:
    """Hand-written digits of scikit-learn: 1,437 images to train with, 360 to test with.

    Batches are images [N, 1, 8, 8] float32, with mean 0 and standard deviation 1 over all pixels
    of the training images, and labels [N] int64 in 0..9. Each class has its share in both parts.
    Training batches are shuffled anew every epoch; test batches keep their order. Images of 8x8
    pixels are never augmented, and nothing is downloaded: `augment` and `root` change nothing.
    OptionError for a batch size below 1. Source: `sklearn.datasets.load_digits` (Alpaydin &
    Kaynak 1998), which ships with scikit-learn.
    """
    options = _options(batch_size, seed, augment, workers)._replace(augment=False)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels.reshape(-1, 1, 8, 8), labels, test_size=360, random_state=0, stratify=labels
    )
    mean, std = train_x.mean(), train_x.std()
    scale = (float(mean) / 16,), (float(std) / 16,)  # pixels are 0..16
    train, test = (
        InMemory(
            torch.as_tensor((x - mean) / std, dtype=torch.float32),
            torch.as_tensor(y, dtype=torch.int64),
            *scale,
        )
        for x, y in ((train_x, train_y), (test_x, test_y))
    )
    return serve("digits", 10, (1, 8, 8), *scale, train, test, options)


def cifar10(
    root: StrPath | None = None,
    *,
    batch_size: int = 128,
    seed: int = 0,
    augment: bool = True,
    workers: int = 0,
) -> Loaders:
    """CIFAR-10, the binary version: 50,000 images to train with, 10,000 to test with.

    Batches are images [N, 3, 32, 32] float32 and labels [N] int64 in 0..9. The six files lie in
    `root/cifar-10-batches-bin`, each is checked against its published MD5. Normalised with mean
    (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225), as the ResNets whose
    weights circulate were. Augmented: a crop after padding 4 pixels, and a flip.
    DataError for files that are missing and cannot be fetched, or are damaged; options: `load`.
    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
    """
    return _cifar("cifar10", _CIFAR10, root, _options(batch_size, seed, augment, workers))


def cifar100(
    root: StrPath | None = None,
    *,
    batch_size: int = 128,
    seed: int = 0,
    augment: bool = True,
    workers: int = 0,
) -> Loaders:
    """CIFAR-100, the binary version: 50,000 images to train with, 10,000 to test with.

    Batches are images [N, 3, 32, 32] float32 and fine labels [N] int64 in 0..99. The two files
    lie in `root/cifar-100-binary`. An MD5 is published for the archive only, and is checked when
    it is unpacked here; of files that lie there unpacked, the sizes and the ranges of both labels
    are checked. Normalised with the mean and standard deviation of the training images.
    Augmented as CIFAR-10; errors and source likewise.
    """
    return _cifar("cifar100", _CIFAR100, root, _options(batch_size, seed, augment, workers))


def fashion_mnist(
    root: StrPath | None = None,
    *,
    batch_size: int = 128,
    seed: int = 0,
    augment: bool = True,
    workers: int = 0,
) -> Loaders:
    """Fashion-MNIST: 60,000 images to train with, 10,000 to test with.

    Batches are images [N, 1, 28, 28] float32 and labels [N] int64 in 0..9. The four idx files,
    packed with gzip or not, lie in `root/fashion-mnist` (or in `root`, in `root/datasets/...`, or
    where torchvision puts them: `root/FashionMNIST/raw`); without a root also where Debian's
    package `dataset-fashion-mnist` puts them. What they hold is checked against the MD5s of the
    published files, unpacked. Augmented: a crop after padding 4 pixels, and a flip.
    DataError as for `cifar10`. Source: Xiao, Rasul & Vollgraf 2017 (arXiv:1708.07747).
    """
    options = _options(batch_size, seed, augment, workers)
    folder = _root(root) / "fashion-mnist"
    places = [folder, *(_root(root) / other for other in ("", "datasets/fashion-mnist", "FashionMNIST/raw"))]  # fmt: skip
    places += [_DEBIAN / "fashion-mnist"] if root is None else []
    mean, std = (0.2860,), (0.3530,)

    def part(prefix: str, count: int) -> InMemory:
        images, labels = (f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
        shape = (count, _FASHION_SIDE, _FASHION_SIDE)
        pixels = read_idx(_idx(images, places), shape, _FASHION[images][1], _FASHION_HOME)
        targets = read_idx_labels(_idx(labels, places), count, 10, _FASHION[labels][1], _FASHION_HOME)  # fmt: skip
        return InMemory(pixels[:, None], targets, mean, std)

    train, test = part("train", _FASHION_COUNTS[0]), part("t10k", _FASHION_COUNTS[1])
    shape = (1, _FASHION_SIDE, _FASHION_SIDE)
    return serve("fashion-mnist", 10, shape, mean, std, train, test, options)


def tiny_imagenet(
    path: StrPath | None = None,
    *,
    root: StrPath | None = None,
    batch_size: int = 128,
    seed: int = 0,
    augment: bool = True,
    workers: int = 0,
) -> Loaders:
    """Tiny-ImageNet: 100,000 images of 200 classes to train with, 10,000 to test with.

    Batches are images [N, 3, 64, 64] float32 and labels [N] int64 in 0..199, in the order of the
    classes' names (`n01443537`, ...). `path` is the folder `tiny-imagenet-200`, by default in
    `root`: `train/CLASS/images/*`, `val/images/*`, `val/val_annotations.txt`, `wnids.txt`. Images
    are decoded for every batch: pass workers. Augmented: a crop after padding 8 pixels, and a flip.
    DataError for what is missing and cannot be fetched, or is incomplete; options: `load`.
    Source: Stanford's course CS231n.
    """
    options = _options(batch_size, seed, augment, workers)
    folder = _root(root) / "tiny-imagenet-200" if path is None else _path(path)
    if path is None and not os.path.exists(folder):
        unpack(_TINY, folder.parent, folder.name, (), "Tiny-ImageNet")
    source = f"{_TINY.url} (MD5 {_TINY.md5})"
    names, *listings = tiny_listings(folder, source)
    mean, std = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
    train, test = (ImageFiles(listing, 64, mean, std, *shifts(64, 8)) for listing in listings)
    return serve("tiny-imagenet", len(names), (3, 64, 64), mean, std, train, test, options)


def imagefolder(
    path: StrPath,
    *,
    size: int = 224,
    batch_size: int = 128,
    seed: int = 0,
    augment: bool = True,
    workers: int = 0,
) -> Loaders:
    """Folders of images as ImageNet's: `path/train/CLASS/*` and `path/val/CLASS/*`.

    Batches are images [N, 3, size, size] float32, normalised with ImageNet's mean and standard
    deviation, and labels [N] int64 in the order of the classes' names. The shorter side becomes
    size * 256 / 224 and the middle is cropped; augmented: a part of 8 to 100 % of the area with
    sides 3:4 to 4:3, resized, and a flip. Images are decoded for every batch: pass workers.
    DataError for folders without classes, without images, or with different classes; options:
    `load`. Source: Szegedy et al. 2015 (arXiv:1409.4842, section 6), the usual ImageNet training.
    """
    options = _options(batch_size, seed, augment, workers)
    if not isinstance(size, int) or isinstance(size, bool):
        raise OptionTypeError(f"`size` must be an integer, not {size!r}", where="size")
    if size < 1:
        raise OptionError(f"`size` must be at least 1, not {size}", where="size")
    folders = [_path(path) / part for part in ("train", "val")]
    names = same_classes(*folders)
    train, test = (
        ImageFiles(listing_of(folder), size, *_IMAGENET, *crops(size)) for folder in folders
    )
    return serve("imagefolder", len(names), (3, size, size), *_IMAGENET, train, test, options)


_SETS: dict[str, Callable[..., Loaders]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion-mnist": fashion_mnist,
    "tiny-imagenet": tiny_imagenet,
    "imagefolder": imagefolder,
}
_WITH_PATH = ("tiny-imagenet", "imagefolder")  # `name:PATH`


def names() -> tuple[str, ...]:
    """The names that `load` knows; `imagefolder` and `tiny-imagenet` take a path: `name:PATH`."""
    return tuple(_SETS)


def load(
    name: str,
    root: StrPath | None = None,
    *,
    batch_size: int = 128,
    seed: int = 0,
    augment: bool = True,
    workers: int = 0,
    size: int | None = None,
) -> Loaders:
    """The loaders of a data set by its name: "digits", "cifar10", ..., "imagefolder:PATH".

    root: the folder where data sets lie, and where missing ones are put; by default that of the
        variable FXPRUNE_DATA, else `~/.cache/fxprune`. `digits` and folders by path need none.
    batch_size: images per batch; the last one of a pass may be smaller.
    seed: of the order and the augmentation of the training images.
    augment: whether training images are cropped and flipped at random.
    workers: processes that prepare batches; the batches are the same for any number of them.
    size: the side of the images of `imagefolder`, 224 by default.
    OptionError for an unknown name, with the nearest, or for a value that makes no sense;
    DataError for data that are missing, damaged or incomplete.
    """
    if not isinstance(name, str):
        raise OptionTypeError(f"the name of a data set is a string, not {name!r}", where="name")
    kind, colon, path = name.partition(":")
    if kind not in _SETS:  # guard: unknown data -> tests/test_data.py -k unknown
        near = difflib.get_close_matches(kind.lower(), _SETS, n=1)
        raise OptionError(
            f"there is no data set {kind!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            where="name",
            fix=f"use one of {', '.join(_SETS)}",
        )
    if not path and (colon or kind == "imagefolder"):
        raise OptionError(f"{kind} needs a path", where="name", fix=f'pass "{kind}:PATH"')
    if path and kind not in _WITH_PATH:
        raise OptionError(
            f"{kind} takes no path", where="name", fix=f'pass "{kind}", root={path!r}'
        )
    if size is not None and kind != "imagefolder":
        raise OptionError(
            f"the images of {kind} have their size",
            where="size",
            fix='leave it out; "imagefolder:PATH" resizes',
        )
    places = {"path": path} if path else {"root": root}
    sizes = {} if size is None else {"size": size}
    return _SETS[kind](
        **places, batch_size=batch_size, seed=seed, augment=augment, workers=workers, **sizes
    )


def _options(batch_size: int, seed: int, augment: bool, workers: int) -> Options:
    options = Options(batch_size, seed, augment, workers)
    options.check()
    return options


def _root(root: StrPath | None) -> Path:
    if root is not None:
        return _path(root)
    given = os.environ.get("FXPRUNE_DATA")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "fxprune"


def _path(path: StrPath) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise OptionTypeError(f"a path is a string or a Path, not {path!r}", where="root")
    return Path(path).expanduser()


def _cifar(name: str, facts: _Cifar, root: StrPath | None, options: Options) -> Loaders:
    home = _root(root)
    if home.name == facts.folder:  # the folder itself was given
        home = home.parent
    wanted = [*facts.train, *facts.test]
    if not all(os.path.exists(home / facts.folder / file) for file in wanted):
        unpack(facts.remote, home, facts.folder, wanted, facts.title)

    def part(files: dict[str, str | None], records: int) -> InMemory:
        pairs: list[tuple[Tensor, Tensor]] = [
            read_cifar(
                home / facts.folder / file, records, facts.labels, published, facts.remote.url
            )
            for file, published in files.items()
        ]
        images, labels = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        return InMemory(images, labels, facts.mean, facts.std)

    train, test = part(facts.train, facts.records[0]), part(facts.test, facts.records[1])
    return serve(name, facts.labels[-1], (3, 32, 32), facts.mean, facts.std, train, test, options)


def _idx(name: str, places: list[Path]) -> Path:
    """Where an idx file lies, packed or not; else it is fetched into the first place."""
    for folder in places:
        for path in (folder / name, folder / f"{name}.gz"):
            if os.path.isfile(path):
                return path
    remote = Remote(f"{_FASHION_HOME}{name}.gz", _FASHION[name][0])
    also = (
        ", and the other three files likewise (Debian's package `dataset-fashion-mnist` has them)"
    )
    return fetch(remote, places[0], "Fashion-MNIST", also)
