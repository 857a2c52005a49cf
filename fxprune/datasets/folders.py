"""Data sets that are folders of image files, one folder per class.

Promise: images are decoded when they are needed; a crop or flip follows from the image and its own
         number alone, whoever decodes it. Classes are numbered in the order of their names.
Refuses: a folder without classes, a class without images, classes that differ between training and
         validation; and, when it comes to it, a file that is no image, with its name.
Source:  the transforms of torchvision's reference training (224 pixels out of 256).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.datasets.augment import normalize
from fxprune.datasets.loaders import Samples
from fxprune.errors import DataError

Listing = list[tuple[str, int]]  # path of an image, its class


class ImageFiles(Samples):
    """Images in files.

    plain, drawn: from a PIL image to one of `size` x `size` pixels; `drawn` may use torch's
        random numbers, and gives the same image for the same draw.
    """

    def __init__(
        self,
        listing: Listing,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        plain: Callable[[Any], Any],  # Any: a PIL image
        drawn: Callable[[Any], Any],
    ) -> None:
        self.paths = [path for path, _ in listing]
        self.labels = torch.tensor([label for _, label in listing], dtype=torch.int64)
        self.size, self.mean, self.std, self.plain, self.drawn = size, mean, std, plain, drawn

    def images_of(self, indices: Sequence[int], draws: Sequence[int] | None) -> Tensor:
        """The inputs float32 [n, 3, size, size] of n images, augmented by n draws unless None."""
        images = [
            self._decoded(self.paths[index], None if draws is None else draws[i])
            for i, index in enumerate(indices)
        ]
        return normalize(torch.stack(images), self.mean, self.std)

    def _decoded(self, path: str, draw: int | None) -> Tensor:
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms.v2.functional import pil_to_tensor

        try:
            image = default_loader(path)
        except Exception as error:  # what Pillow raises for damaged and for huge files: all kinds
            raise DataError(
                f"`{Path(path).name}` is not an image that can be read",
                where=path,
                why=str(error),
                fix="replace or remove it",
            ) from error
        if draw is None:
            image = self.plain(image)
        else:
            with torch.random.fork_rng(devices=[]):  # the global state has no say, and no change
                torch.default_generator.manual_seed(draw)
                image = self.drawn(image)
        pixels: Tensor = pil_to_tensor(image)
        if pixels.shape[1:] != (self.size, self.size):
            raise DataError(
                f"`{Path(path).name}` has {pixels.shape[2]} x {pixels.shape[1]} pixels",
                where=path,
                why=f"every image of this set has {self.size} x {self.size}",
                fix="replace it, or use the set as `imagefolder:PATH`, which resizes",
            )
        return pixels


def classes_of(folder: Path) -> list[str]:
    """The names of the classes, sorted: the folders in `folder`; DataError when there is none."""
    if not folder.is_dir():  # guard: no folder -> tests/datasets/test_folders.py -k missing
        raise DataError(
            f"there is no folder `{folder.name}`",
            where=str(folder),
            why="a set of images has PATH/train/CLASS/* and PATH/val/CLASS/*",
            fix="give the PATH that holds both `train` and `val`",
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:  # guard: no classes -> tests/datasets/test_folders.py -k without_classes
        raise DataError(
            f"`{folder.name}` holds no classes",
            where=str(folder),
            why="there is no folder in it; each class is a folder with its images",
            fix="sort the images into folders, one per class",
        )
    return names


def listing_of(folder: Path) -> Listing:
    """All images below the folder of each class; DataError for a class that has none."""
    from torchvision.datasets import ImageFolder

    names = classes_of(folder)
    listing: Listing = ImageFolder(str(folder), allow_empty=True).samples
    counts = Counter(label for _, label in listing)
    empty = [name for label, name in enumerate(names) if not counts[label]]
    if empty:  # guard: empty class -> tests/datasets/test_folders.py -k empty
        raise DataError(
            f"the class `{empty[0]}` holds no image"
            + (f", nor do {len(empty) - 1} others" if len(empty) > 1 else ""),
            where=str(folder / empty[0]),
            why="images are files that end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff or .webp",
            fix="put images there, or remove the folder",
        )
    return listing


def same_classes(train: Path, val: Path) -> list[str]:
    """The classes that both folders have; DataError when one has a class that the other lacks."""
    ours, theirs = classes_of(train), classes_of(val)
    if ours != theirs:  # guard: same classes -> tests/datasets/test_folders.py -k differ
        facts = [
            f"only `{here.name}` has {_some(sorted({*mine} - {*other}))}"
            for here, mine, other in ((train, ours, theirs), (val, theirs, ours))
            if {*mine} - {*other}
        ]
        raise DataError(
            f"`{train.name}` and `{val.name}` have different classes",
            where=str(train.parent),
            why="; ".join(facts),
            fix="give both the same folders",
        )
    return ours


def tiny_listings(folder: Path, source: str) -> tuple[list[str], Listing, Listing]:
    """The classes of `tiny-imagenet-200`, its training images, and its validation images.

    DataError, naming the `source`, for what is missing: a file, a class, or some of its images
    (every class has as many as the others).
    """

    def incomplete(why: str) -> DataError:
        return DataError(
            "Tiny-ImageNet is incomplete",
            where=str(folder),
            why=why,
            fix=f"get {source} and unpack it anew",
        )

    images = folder / "val" / "images"
    try:
        names = sorted((folder / "wnids.txt").read_text().split())
        rows = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        present = {entry.name for entry in images.iterdir()}
    except OSError as error:  # guard: tiny files -> tests/datasets/test_folders.py -k tiny_lacks
        raise incomplete(f"{error.filename}: {error.strerror}") from error
    label = {name: i for i, name in enumerate(names)}
    val: Listing = []
    for number, row in enumerate(rows, 1):
        file, _, rest = row.partition("\t")  # file, class, and a box that nobody here needs
        wnid = rest.partition("\t")[0]
        if wnid not in label:  # guard: tiny labels -> tests/datasets/test_folders.py -k tiny_lacks
            raise incomplete(f"`val_annotations.txt`, line {number}, names no class of `wnids.txt`")
        val.append((str(images / file), label[wnid]))
    lacking = sorted({Path(path).name for path, _ in val} - present)
    if lacking:  # guard: tiny images -> tests/datasets/test_folders.py -k tiny_lacks
        raise incomplete(f"`val/images` lacks {_some(lacking)}")
    folders = classes_of(folder / "train") if (folder / "train").is_dir() else []
    if folders != names:  # guard: tiny classes -> tests/datasets/test_folders.py -k tiny_lacks
        raise incomplete("`train` does not hold the classes that `wnids.txt` lists")
    train = listing_of(folder / "train")
    for part, listing in (("train", train), ("val", val)):
        counts = Counter(i for _, i in listing)
        sizes = {counts[i] for i in label.values()}
        uneven = len(sizes) > 1 or 0 in sizes
        if uneven:  # guard: tiny counts -> tests/datasets/test_folders.py -k tiny_lacks
            raise incomplete(
                f"the classes of `{part}` have {min(sizes)} to {max(sizes)} images; in the whole "
                "set all have as many"
            )
    return names, train, val


def crops(size: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """(plain, drawn) for photographs: the middle of a resized image; a part of any size, flipped."""
    from torchvision.transforms import v2

    plain = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
    drawn = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    return plain, drawn


def shifts(size: int, padding: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """(plain, drawn) for images that have that size: as they are; padded, cropped and flipped."""
    from torchvision.transforms import v2

    drawn = v2.Compose([v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip()])
    return v2.Identity(), drawn


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
