"""A model named in words -> the model: `zoo:resnet56`, `torchvision:resnet50`, `timm:convnext_tiny`,
`path/to/file.py:factory`.

Promise: nothing is downloaded unless an option that the user sets asks a library to do so. A file
         is imported under a private name, and may import its neighbours, as a script may.
Refuses: names that no one knows (with the nearest one), factories that fail, want arguments that
         were not set, or return something else than a module.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fxprune import zoo
from fxprune.errors import FxPruneError, OptionError, UnsupportedOpError

LIBRARIES = ("zoo", "torchvision", "timm")
_FORMS = "zoo:resnet56, torchvision:resnet50, timm:convnext_tiny or path/to/file.py:factory"
Value = int | float | bool | str | None


def build(spec: str, options: Mapping[str, Value] | None = None) -> nn.Module:
    """The model of a name, made with these options, in eval mode.

    OptionError for a name or an option that nobody knows; UnsupportedOpError when the library is
    not installed; FxPruneError when the user's factory fails.
    """
    library, name = _parts(spec)
    make = {"zoo": zoo.build, "torchvision": _torchvision, "timm": _timm}.get(library)
    model = make(name, **(options or {})) if make else _from_file(library, name, options or {})  # type: ignore[arg-type]
    return model.eval()


def slug(spec: str) -> str:
    """A name for files: "zoo:resnet56" -> "resnet56"."""
    name = _parts(spec)[1]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def source_file(spec: str) -> Path | None:
    """The file that a spec names, if it names one."""
    library, _ = _parts(spec)
    return None if library in LIBRARIES else Path(library)


def options_of(words: Sequence[str]) -> dict[str, Value]:
    """["width=32", "bias=false"] -> {"width": 32, "bias": False}; OptionError without a `=`."""
    found: dict[str, Value] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(
                f"--set {word} makes no sense", where="--set", fix="write --set name=value"
            )
        if key in found:
            raise OptionError(f"--set {key}= is given twice", where="--set", fix="drop one")
        found[key] = _value(text)
    return found


def known(incomplete: str) -> list[str]:
    """The model names that begin like this, for the shell's completion."""
    library, colon, _ = incomplete.partition(":")
    if not colon:
        return [f"{name}:" for name in LIBRARIES if name.startswith(library)]
    listed = {"zoo": zoo.names, "torchvision": _torchvision_names, "timm": _timm_names}
    if library not in listed:
        return []
    names = [f"{library}:{name}" for name in listed[library]()]
    return [name for name in names if name.startswith(incomplete)]


def _value(text: str) -> Value:
    words: dict[str, Value] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parts(spec: str) -> tuple[str, str]:
    """("zoo", "resnet56"), or (path of a file, factory)."""
    library, _, name = spec.partition(":")
    if library in LIBRARIES and name:
        return library, name
    path, _, factory = spec.rpartition(":")
    if path.endswith(".py") and factory.isidentifier():
        return path, factory
    raise OptionError(
        f"`{spec}` names no model",
        where="MODEL",
        why=f"a model is written {_FORMS}",
        fix=_suggestion(spec),
    )


def _suggestion(spec: str) -> str | None:
    if spec.endswith(".py"):
        return f"name the function that makes the model: {spec}:make_model"
    word = spec.rpartition(":")[2].lower()
    near = difflib.get_close_matches(word, zoo.names(), n=1, cutoff=0.6)
    if word in zoo.names() or (near and ":" not in spec):
        return f"did you mean zoo:{near[0] if near else word}?"
    return None


def _unknown(library: str, name: str, names: Sequence[str]) -> OptionError:
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return OptionError(
        f"{library} has no model `{name}`" + (f"; did you mean {near[0]}?" if near else ""),
        where="MODEL",
        fix=f"the nearest are {', '.join(f'{library}:{n}' for n in near)}" if near else None,
    )


def _torchvision_names() -> Sequence[str]:
    import torchvision

    return [str(name) for name in torchvision.models.list_models()]


def _torchvision(name: str, **options: Value) -> nn.Module:
    import torchvision

    if name not in _torchvision_names():
        raise _unknown("torchvision", name, _torchvision_names())
    return _called(
        lambda **o: torchvision.models.get_model(name, **o), f"torchvision:{name}", options
    )


def _timm_names() -> Sequence[str]:
    if not importlib.util.find_spec("timm"):
        return []
    timm = importlib.import_module("timm")
    return [str(name) for name in timm.list_models()]


def _timm(name: str, **options: Value) -> nn.Module:
    if not importlib.util.find_spec("timm"):
        raise UnsupportedOpError(
            f"timm:{name} needs the package timm",
            where="MODEL",
            why="it is not installed",
            fix="pip install timm",
        )
    timm = importlib.import_module("timm")
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, _timm_names())
    return _called(lambda **o: timm.create_model(name, **o), f"timm:{name}", options)


def _from_file(path: str, factory: str, options: Mapping[str, Value]) -> nn.Module:
    file = Path(path)
    if not file.is_file():
        raise OptionError(f"there is no file `{path}`", where="MODEL")
    with _importable(file.parent):
        made = getattr(_module(file), factory, None)
        if isinstance(made, nn.Module):
            return made
        if not callable(made):
            raise OptionError(
                f"`{path}` has no function `{factory}`",
                where="MODEL",
                why=f"it defines {', '.join(_callables(_module(file))) or 'no function'}",
            )
        return _called(made, f"`{factory}` of {file.name}", options)


def _module(file: Path) -> ModuleType:
    """The file as a module, imported once, under a name that collides with nobody's."""
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    name = f"_fxprune_model_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(f"{file.name} cannot be imported", error) from error
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Neighbours of a file can be imported meanwhile; what is installed comes first."""
    place = str(folder.resolve())
    sys.path.append(place)
    try:
        yield
    finally:
        sys.path.remove(place)


def _callables(module: ModuleType) -> list[str]:
    own = vars(module).items()
    return [n for n, v in own if callable(v) and getattr(v, "__module__", "") == module.__name__]


def _called(factory: Callable[..., Any], what: str, options: Mapping[str, Value]) -> nn.Module:
    """The module that a factory makes; every failure says what the factory is."""
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise OptionError(
            f"{what} cannot be called with these options: {error}",
            where="--set",
            fix="set its arguments with --set name=value",
        ) from error
    except ValueError:  # written in C: it has no signature
        pass
    try:
        model = factory(**options)
    except FxPruneError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(f"{what} fails", error) from error
    if not isinstance(model, nn.Module):
        raise FxPruneError(
            f"{what} returned a {type(model).__name__}",
            where="MODEL",
            why="a model is an instance of torch.nn.Module",
        )
    return model


def _failed(what: str, error: BaseException) -> FxPruneError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return FxPruneError(
        what,
        where=f"{last.filename}:{last.lineno}",
        why=f"{type(error).__name__}: {error}",
        fix="--debug shows the traceback",
    )
