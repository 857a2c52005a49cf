"""What the tests of bad input share: small networks, and what a refusal has to look like.

A refusal has exactly the kind that is asked for, says four facts, and leaves the user's model bit
for bit as it was; a network that is pruned obeys the law of the masked original.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import flops, masked, relative_error, sliced_state
from torch import Tensor, nn

import fxprune
from fxprune import FxPruneError, PlanError

X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(1))


def conv(a: int, b: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **kwargs)


def net() -> nn.Sequential:
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """stem -> two convolutions with a shortcut around them -> head."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.b(self.a(x).relu())).relu())


class Between(nn.Module):
    """conv -> `between(self, x)` -> conv -> conv, with whatever attributes a test adds."""

    def __init__(self, between: Callable[[Any, Tensor], Any], width: int = 8, **attributes: Any):
        super().__init__()
        self.first, self.second, self.last = conv(3, 8), conv(width, 6), conv(6, 4)
        self.__dict__["between"] = between
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.last(self.second(self.between(self, self.first(x))).relu())


def bits(t: Tensor) -> Any:
    if t.is_meta:
        return tuple(t.shape)
    if t.layout is not torch.strided:
        t = t.to_dense()
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def facts(model: nn.Module) -> Any:
    """Everything about a model that a failed or finished call has to leave alone."""
    held = [*model.named_parameters(remove_duplicate=False)]
    held += [*model.named_buffers(remove_duplicate=False)]
    seen = []
    for name, m in model.named_modules(remove_duplicate=False):
        own = [(k, id(v)) for k, v in vars(m).items() if k != "training"]
        hooks = [
            [*map(id, d.values())]
            for k, d in vars(m).items()
            if k.endswith("_hooks") and isinstance(d, dict)
        ]
        parts = [(k, id(v)) for d in (m._parameters, m._buffers, m._modules) for k, v in d.items()]
        seen.append((name, type(m), m.training, own, hooks, parts, m._non_persistent_buffers_set))
    tensors = [
        (k, id(t), id(t.grad), t.dtype, t.stride(), t.requires_grad, t._version, bits(t))
        for k, t in held
    ]
    return copy.copy(seen), tensors


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the models are afterwards what they were."""
    before = [facts(m) for m in models]
    random = torch.get_rng_state()
    yield
    assert [facts(m) for m in models] == before
    assert torch.equal(torch.get_rng_state(), random)


def refused(kind: type[FxPruneError], call: Callable[[], Any], *parts: str) -> FxPruneError:
    """The error of a call; it is of exactly that kind, says four facts, and holds all `parts`."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind, error
    for part in parts:
        assert part in str(error), f"{part!r} not in:\n{error}"
    assert error.where, error
    assert error.why or error.fix, error
    return error


def compile_refused(
    model: nn.Module, kind: type[FxPruneError], *parts: str, x: Any = X, **options: Any
) -> FxPruneError:
    with untouched(model):
        return refused(kind, lambda: fxprune.compile(model, x, progress=False, **options), *parts)


def l1(ratio: float) -> Any:
    return fxprune.methods.L1(ratio=ratio)


def scrambled(model: nn.Module) -> nn.Module:
    """Float64, every element distinct, random statistics, eval mode."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
                if name.endswith("running_var"):
                    t.abs_().add_(0.5)
    return model


def check_stays(model: nn.Module, why: str, *inputs: Any) -> None:
    """Cutting would be wrong everywhere in this network: it is refused, and the reason named."""
    with untouched(model), pytest.raises(PlanError, match="nothing can be pruned") as e:
        fxprune.compile(model, inputs, progress=False)
    assert why in str(e.value)


def check_law(model: nn.Module, *inputs: Any, ratio: float = 0.5, more: Any = ()) -> Any:
    """Prune by ratio and by a random choice; both compute what the masked original computes."""
    model = scrambled(model)
    inputs = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )

    def draw(group: Any, weights: Any) -> Tensor:
        return torch.rand(len(group), generator=torch.Generator().manual_seed(len(group)))

    pruned = None
    for method, budget in ((draw, fxprune.Budget(params=0.8)), (l1(ratio), None)):
        with untouched(model):
            pruned = fxprune.compile(
                model, inputs, method=method, budget=budget, progress=False, verify=False
            )
        document = pruned.plan.to_dict()
        for xs in (inputs, *more):
            xs = xs if isinstance(xs, tuple) else (xs.double(),)
            with torch.no_grad():
                expected = masked(model, document)(*copy.deepcopy(xs))
                got = pruned(*copy.deepcopy(xs))
            assert relative_error(expected, got) <= 1e-9  # float64: rounding of reordered sums
        state, expected = pruned.state_dict(), sliced_state(model, document)
        assert set(state) <= set(expected)
        assert all(torch.equal(t, expected[k]) for k, t in state.items())
        assert document["metrics"]["params_after"] == sum(p.numel() for p in pruned.parameters())
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            assert document["metrics"]["macs_after"] == flops(pruned, inputs[0])
    return pruned


def frozen(model: nn.Module, x: Any = X) -> str:
    with untouched(model):
        return "\n".join(f"{k}: {v}" for k, v in fxprune.analyze(model, x).frozen.items())
