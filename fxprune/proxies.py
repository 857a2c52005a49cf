"""Proxies that know what they stand for: Python may decide by sizes, and the graph remembers it.

A proxy of a size is a node like any other, so batch and spatial sizes stay free. Only where Python
demands a number or a truth (`if`, `int`, `range`, `len`, unpacking) the value on the example input
is used, and `torch._assert` in the graph refuses inputs that would decide otherwise.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.fx.proxy import TraceError as NotTraceable
from torch.utils import _pytree as pytree

from fxprune.hints import UNKNOWN

Site = tuple[int, int]  # a frame and the instruction it is at


class Hinted(Proxy):
    """A node, and on demand its value on the example input."""

    tracer: Any
    _is_param = _is_buffer = False  # for isinstance(x, nn.Parameter)

    def __repr__(self) -> str:
        return f"{self.node.name}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            value = _value(self)
            if not hasattr(value, name):
                raise AttributeError(f"`{_kind(value).__name__}` has no attribute `{name}`")
            if isinstance(value, dict) and name in ("items", "values", "get"):
                return getattr({key: _entry(self, key) for key in value}, name)
        return HintedAttribute(self, name)

    def __bool__(self) -> bool:
        value = _decidable(self)
        return bool(self.tracer.decided(self, bool(value)))

    def __int__(self) -> int:
        value = _decidable(self)
        whole: Any = self
        if isinstance(value, float):  # rounded towards zero, in operations that sizes have
            whole = whole // 1 if value >= 0 else -(-whole // 1)
        return int(self.tracer.decided(whole, int(value), exact=True))

    def __index__(self) -> int:
        value = _decidable(self)
        if not isinstance(value, int):
            raise TypeError(f"a {type(value).__name__} is no index")
        self.tracer.used_as_index(self, value, _site(sys._getframe(1)))
        return value

    def __float__(self) -> float:
        return float(self.tracer.decided(self, float(_decidable(self)), exact=True))

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __hash__(self) -> int:
        value = _value(self)
        if isinstance(value, Tensor) or value is UNKNOWN or not self.tracer.live:
            return object.__hash__(self)
        return hash(self.tracer.decided(self, value, exact=True))  # a table is looked up

    def __eq__(self, other: object) -> Any:
        if not self.tracer.live:  # in a cache that outlived the tracing
            return self is other
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        return format(self.tracer.decided(self, _decidable(self), exact=True), spec)

    def __len__(self) -> int:
        value = _value(self)
        if not isinstance(value, Tensor):
            self.tracer.iterated(self)
            return len(value)
        return int(self.size(0)) if value.dim() else len(value)

    def __iter__(self) -> Iterator[Any]:
        value = _value(self)
        if value is UNKNOWN:
            raise NotTraceable("what depends on data cannot be iterated over")
        if isinstance(value, Tensor):
            count = value.shape[0] if _unpacks(sys._getframe(1)) else len(self)
            return iter([_entry(self, i) for i in range(count)])
        if isinstance(value, dict):
            return iter(value)
        if not _unpacks(sys._getframe(1)):
            self.tracer.iterated(self)
        return iter([_entry(self, i) for i in range(len(value))])

    def __contains__(self, item: Any) -> bool:
        value = _value(self)
        return item in value if isinstance(value, dict) else any(item == entry for entry in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def keys(self) -> Any:
        """The keys of a dictionary that a layer returns."""
        return _value(self).keys()

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = (v for v in args or () if issubclass(type(v), Hinted))
        first = next(given, None)
        if first is None:
            leaves = pytree.tree_leaves((args, kwargs))
            first = next(v for v in leaves if issubclass(type(v), Hinted))
        first.tracer.was_only_parsed(_site(sys._getframe(1)))
        return Proxy.__torch_function__.__func__(Hinted, orig_method, types, args, kwargs)  # type: ignore[attr-defined]


class HintedAttribute(Hinted):
    """An attribute of a proxy; a node only if it is not called as a method."""

    def __init__(self, root: Hinted, name: str) -> None:
        self.root = root
        self.attr = name
        self.tracer = root.tracer
        self.made: Any = None

    @property
    def node(self) -> Any:  # type: ignore[override]
        """The node that reads the attribute, made when it is first needed."""
        if self.made is None:
            self.made = self.tracer.create_proxy(
                "call_function", getattr, (self.root, self.attr), {}
            ).node
        return self.made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call a method."""
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


def _kind(value: Any) -> type:
    return Hinted if value is UNKNOWN else type(value)


def _entry(proxy: Any, index: Any) -> Any:
    return proxy[index]


def _value(proxy: Hinted) -> Any:
    return proxy.tracer.hint(proxy.node)


def _decidable(proxy: Hinted) -> Any:
    value = _value(proxy)
    if isinstance(value, Tensor) or value is UNKNOWN:
        raise NotTraceable("symbolically traced variables cannot be used as inputs to control flow")
    return value


def _site(frame: FrameType) -> Site:
    return id(frame), frame.f_lasti


def _unpacks(frame: FrameType) -> bool:
    """Whether the frame is at `a, b = x`, which checks the length itself."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "UNPACK_SEQUENCE"


@contextlib.contextmanager
def numbers_stay_nodes() -> Iterator[None]:
    """Inside, `max(n, 0)` and `min(n, m)` of sizes are nodes instead of decisions.

    And `isinstance` goes by the class of the value. (Were that a `__class__` of the proxy, torch's
    own parser of arguments would take the proxy for a tensor, and read memory that is none.)
    """
    before = {name: getattr(builtins, name) for name in ("max", "min", "isinstance")}
    plain = before["isinstance"]

    hinted = {Hinted, *Hinted.__subclasses__()}

    def of_kind(proxy: Any, kinds: Any) -> bool:
        if type(proxy) not in hinted:
            return plain(proxy, kinds)  # type: ignore[no-any-return]
        return bool(plain(proxy, kinds)) or issubclass(_kind(_value(proxy)), kinds)

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for arg in args if len(args) > 1 and not kwargs else ():
                if issubclass(type(arg), Hinted):
                    return arg.tracer.create_proxy("call_function", function, args, {})
            return function(*args, **kwargs)

        return call

    try:
        for name in ("max", "min"):
            setattr(builtins, name, recorded(before[name]))
        builtins.isinstance = of_kind  # guard: parser -> tests/test_reader_core.py -k parse
        yield
    finally:
        for name, function in before.items():
            setattr(builtins, name, function)


FACTORIES = (
    torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.linspace, torch.eye,
    torch.tensor, torch.as_tensor, torch.rand, torch.randn, torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices,
)  # fmt: skip
