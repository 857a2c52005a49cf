"""Normalisations whose statistics run over channels: after a cut, over those that stay.

A layer norm over the channel axis, an RMS norm, a group norm or a global response norm keeps the
channels of its input, and its parameters have them too: by these the plan names the channels over
which statistics are taken, in the pruned network and in `fxprune.mask`. A norm that has no
parameter of its own has no such name, so its axes stay whole. Along axes that it does not
normalise (positions, heads), ids pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule
from fxprune.graph import arguments, constant, first_argument, op_name, value_of
from fxprune.labels import UNCUT, Label, Ledger
from fxprune.rules.contraction import channel_ids
from fxprune.rules.elementwise import is_pointwise, tensor_args

# Layers of other libraries, by full name -> the axis of their channels.
LAYER_NORMS = {
    "torchvision.models.convnext.LayerNorm2d": 1,
    "timm.layers.norm.LayerNorm": -1,
    "timm.layers.norm.LayerNormFp32": -1,
    "timm.layers.norm.LayerNorm2d": 1,
    "timm.layers.norm.LayerNorm2dFp32": 1,
    "timm.layers.norm.LayerNormExp2d": 1,
    "timm.layers.norm.RmsNorm": -1,
    "timm.layers.norm.RmsNormFp32": -1,
    "timm.layers.norm.RmsNorm2d": 1,
    "timm.layers.norm.RmsNorm2dFp32": 1,
    "timm.layers.norm.SimpleNorm": -1,
    "timm.layers.norm.SimpleNormFp32": -1,
    "timm.layers.norm.SimpleNorm2d": 1,
    "timm.layers.norm.SimpleNorm2dFp32": 1,
    "timm.layers.norm_act.LayerNormAct": -1,
    "timm.layers.norm_act.LayerNormActFp32": -1,
    "timm.layers.norm_act.LayerNormAct2d": 1,
    "timm.layers.norm_act.LayerNormAct2dFp32": 1,
    "timm.layers.norm_act.RmsNormAct": -1,
    "timm.layers.norm_act.RmsNormActFp32": -1,
    "timm.layers.norm_act.RmsNormAct2d": 1,
    "timm.layers.norm_act.RmsNormAct2dFp32": 1,
}
RESPONSE_NORMS = {"timm.layers.grn.GlobalResponseNorm"}
GROUP_NORMS = {  # -> the attribute that holds the number of groups; channels are axis 1
    "timm.layers.norm.GroupNorm": "num_groups",
    "timm.layers.norm.GroupNorm1": "num_groups",
    "timm.layers.norm_act.GroupNormAct": "num_groups",
    "timm.layers.norm_act.GroupNorm1Act": "num_groups",
    "timm.layers.evo_norm.EvoNorm2dS0": "groups",
    "timm.layers.evo_norm.EvoNorm2dS0a": "groups",
    "timm.layers.evo_norm.EvoNorm2dS1": "groups",
    "timm.layers.evo_norm.EvoNorm2dS1a": "groups",
    "timm.layers.evo_norm.EvoNorm2dS2": "groups",
    "timm.layers.evo_norm.EvoNorm2dS2a": "groups",
}
PER_CHANNEL_NORMS = {  # statistics of each channel alone, or none
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
    "timm.layers.evo_norm.EvoNorm2dB0",
    "timm.layers.evo_norm.EvoNorm2dB1",
    "timm.layers.evo_norm.EvoNorm2dB2",
    "timm.layers.filter_response_norm.FilterResponseNormAct2d",
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d",
}
_UNNAMED = "has no parameter of its own, by which a plan could name the channels that stay"


def dotted(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def channels_of(module: nn.Module) -> int | None:
    """The axis that holds the channels of a layer of another library; None for other classes."""
    name = dotted(module)
    if name in RESPONSE_NORMS:
        return int(module.channel_dim)  # type: ignore[arg-type]
    return 1 if name in GROUP_NORMS else LAYER_NORMS.get(name)


def groups_attribute(module: nn.Module) -> str | None:
    """The attribute that holds the number of groups of a group norm; None for other layers."""
    return "num_groups" if type(module) is nn.GroupNorm else GROUP_NORMS.get(dotted(module))


@dataclass(frozen=True)
class Norm:
    """A normalisation: its name for people, the axes that its statistics run over, its parameters.

    The parameters' dimensions are the axes from `first` on.
    """

    name: str
    axes: tuple[int, ...]
    own: tuple[str, ...]
    first: int


def normalise(flow: Flow, node: Node, x: Label, norm: Norm) -> Label:
    """Statistics over some axes: channels along one of them pass, and the parameters have them.

    Where ids also vary along other axes (heads), whole indices of those are cut.
    """
    x = flow.bind(node, x, norm.axes)
    ledger = flow.ledger
    x = _without_positions(ledger, node, x, norm)
    inside = [d for d in x.varying if d in norm.axes]
    if not inside:  # guard: read whole -> tests/test_reader_core.py -k shared_norm
        _stays(flow, node, norm.own)
    if inside != x.varying:
        return ledger.complete(x, inside, node, f"`{norm.name}` normalises part of a channel axis")
    tensors = ledger.tensors.tensor
    last = norm.first + min((tensors[name].dim() for name in norm.own), default=0)
    named = [d for d in inside if norm.first <= d < last]
    if not named:  # guard: unnamed norm -> tests/test_norms.py -k why
        return ledger.complete(x, inside, node, f"`{norm.name}` {_UNNAMED}")
    axis = max(named, key=lambda d: x.ids.shape[d])
    others = [d for d in inside if d != axis]
    ids = ledger.couple_along(x.ids, others, node, f"`{norm.name}` runs over several axes")
    _own(flow, node, norm.own, axis - norm.first, ids.flatten())
    return Label(x.shape, ids)


def _without_positions(ledger: Ledger, node: Node, x: Label, norm: Norm) -> Label:
    """Other axes along which ids repeat hold positions, not heads: their ids are one."""
    axes = [d for d in x.varying if d not in norm.axes and _repeats(x.ids, d)]
    inside = any(d in norm.axes for d in x.varying)
    if not axes or not inside:
        return x
    ids = ledger.couple_along(x.ids, axes, node, f"`{norm.name}` reads it at several positions")
    return Label(x.shape, ids)


def _repeats(ids: Tensor, axis: int) -> bool:
    rows = ids.movedim(axis, 0).reshape(ids.shape[axis], -1)
    return len(torch.unique(rows, dim=0)) < len(rows)


def _own(flow: Flow, node: Node, own: tuple[str, ...], dim: int, ids: Tensor) -> None:
    for name in own:
        flow.ledger.slot(name, dim, "out", ids, node)
        flow.ledger.claimed.add((name, dim, node))


def _stays(flow: Flow, node: Node, own: tuple[str, ...]) -> None:
    """A norm whose input keeps its channels needs its parameters whole, whoever shares them."""
    for name in own:
        why = f"`{name}` also normalises channels that cannot be cut"
        flow.ledger.whole.setdefault(name, (node, why))


def parameters_of(flow: Flow, module: nn.Module) -> tuple[str, ...]:
    """Names of a layer's own parameters."""
    tensors = flow.ledger.tensors
    names = [tensors.name(t) for t in module._parameters.values() if t is not None]
    return tuple(name for name in names if name is not None)


def _parameter(flow: Flow, arg: object) -> str | None:
    """The parameter that an argument is, as it is or computed of it alone entry by entry."""
    node = arg
    while isinstance(node, Node) and node.op != "get_attr":
        sources = [n for n in tensor_args(node) if isinstance(value_of(n), Tensor)]
        alone = is_pointwise(op_name(node)) and len(sources) == 1
        if not alone or value_of(sources[0]).shape != value_of(node).shape:
            return None
        node = sources[0]
    t = flow.traced.attribute(node) if isinstance(node, Node) else None
    return flow.ledger.tensors.name(t) if isinstance(t, nn.Parameter) else None


def parameters_read(flow: Flow, *args: object) -> tuple[str, ...] | None:
    """The parameters among optional arguments; None where one is computed of something else."""
    names = [_parameter(flow, arg) for arg in args if arg is not None]
    return None if None in names else tuple(name for name in names if name is not None)


def _computed(flow: Flow, node: Node, name: str) -> Value:
    return opaque(flow, node, f"the weight of this `{name}` is computed, not a parameter")


# ---- layer, RMS and response norms --------------------------------------------------------------


@rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm_module(flow: Flow, node: Node) -> Value:
    """Statistics over the last axes, which the parameters have."""
    module, x = flow.traced.module(node), flow.first(node)
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    first = len(x.shape) - len(module.normalized_shape)
    own = parameters_of(flow, module)
    axes = tuple(range(first, len(x.shape)))
    return normalise(flow, node, x, Norm(type(module).__name__, axes, own, first))


@rule("layer_norm", "rms_norm")
def functional_layer_norm(flow: Flow, node: Node) -> Value:
    """F.layer_norm and F.rms_norm with parameters of the model, or with none."""
    order = ["input", "normalized_shape", "weight", "bias", "eps"]
    args = arguments(node, *(n for n in order if n != "bias" or op_name(node) == "layer_norm"))
    x, own = flow.of(args["input"]), parameters_read(flow, args["weight"], args["bias"])
    if x is None or own is None:  # guard: computed norm -> tests/test_norms.py -k computed
        return _computed(flow, node, op_name(node))
    first = len(x.shape) - len(constant(args["normalized_shape"]))
    axes = tuple(range(first, len(x.shape)))
    return normalise(flow, node, x, Norm(op_name(node), axes, own, first))


@rule(*LAYER_NORMS)
def foreign_layer_norm(flow: Flow, node: Node) -> Value:
    """Layers of other libraries: one axis, which every parameter has."""
    module, x = flow.traced.module(node), flow.first(node)
    if why := unknown_part(module):
        return opaque(flow, node, why)
    own = parameters_of(flow, module)
    axis = LAYER_NORMS[dotted(module)] % len(x.shape)
    count = 1 if axis == 1 else len(module.normalized_shape)  # type: ignore[arg-type]
    first = axis + 1 - count
    norm = Norm(type(module).__name__, tuple(range(first, axis + 1)), own, first)
    simple = type(module).__name__.startswith("SimpleNorm")  # torch.var of one number is none
    if simple:  # guard: two channels -> tests/test_norms.py -k one_channel
        _at_least_two(flow.ledger, x, axis)
    return normalise(flow, node, x, norm)


@rule(*RESPONSE_NORMS)
def response_norm(flow: Flow, node: Node) -> Value:
    """Norms over positions, divided by their mean over channels."""
    module, x = flow.traced.module(node), flow.first(node)
    axis = int(module.channel_dim) % len(x.shape)  # type: ignore[arg-type]
    axes = (axis, *module.spatial_dim)  # type: ignore[misc]
    return normalise(
        flow, node, x, Norm(type(module).__name__, axes, parameters_of(flow, module), axis)
    )


def unknown_part(module: nn.Module) -> str:
    """Why a layer that holds an activation has no rule; "" when it has one."""
    held = next((name for name, _ in module.named_parameters() if "." in name), None)
    return f"`{held}` inside a `{type(module).__name__}`" if held else ""


# ---- group norms --------------------------------------------------------------------------------


def normalise_groups(flow: Flow, node: Node, x: Label, norm: Norm, groups: int) -> Label:
    """Statistics over blocks of axis 1: whole blocks go, or the same positions of every block.

    Whichever leaves more choice, as for grouped convolutions. Whole blocks need no parameter.
    """
    ledger = flow.ledger
    x = flow.bind(node, x, [1])  # guard: bound -> tests/test_reader_core.py -k latent
    if 1 not in x.varying:
        _stays(flow, node, norm.own)
        axes = [d for d in x.varying if d > 1]
        return ledger.complete(x, axes, node, f"`{norm.name}` runs over channels and positions")
    if groups == 1 and not norm.own:  # guard: unnamed group -> tests/test_norms.py -k why
        axes = [d for d in x.varying if d > 0]
        return ledger.complete(x, axes, node, f"`{norm.name}` {_UNNAMED}")
    ids = channel_ids(flow, node, x, 1)
    blocks = ids.view(groups, -1)
    if by_whole_groups(ledger, norm_key(node, norm.own), blocks, bool(norm.own)):
        ledger.couple_along(blocks, [1], node, f"part of a group of `{norm.name}` cannot be cut")
    else:
        why = f"part of the groups of `{norm.name}` cannot be cut"
        ledger.couple_along(blocks, [0], node, why)  # guard: alike -> tests/test_norms.py -k images
        point = math.prod(x.shape[2:]) == 1  # torch refuses one value per group
        if point:  # guard: two values per group -> tests/test_norms.py -k one_channel
            _at_least_two(ledger, Label((groups, blocks.shape[1]), blocks), 1)
    _own(flow, node, norm.own, 0, ids)
    shape = [1] * len(x.shape)
    shape[1] = len(ids)
    return Label(x.shape, ids.view(shape))


def norm_key(node: Node, own: tuple[str, ...]) -> str:
    """What the ledger's `whole_groups` calls a group norm: its first parameter, or the call."""
    return own[0] if own else str(node.target if node.op == "call_module" else node.name)


def by_whole_groups(ledger: Ledger, key: str, blocks: Tensor, named: bool) -> bool:
    """Whether whole blocks are cut, ids [groups, channels per group]; decided once per norm."""
    if key not in ledger.whole_groups:
        free = blocks != UNCUT
        positions = int(free.all(0).sum()) if named else -1
        ledger.whole_groups[key] = int(free.all(1).sum()) >= positions
    return ledger.whole_groups[key]


def _at_least_two(ledger: Ledger, x: Label, axis: int) -> None:
    """At least two indices of an axis stay: one of each half."""
    if axis in x.varying:
        ids = x.ids.movedim(axis, 0).reshape(x.ids.shape[axis], -1)[:, 0]
        ledger.pieces += [half for half in ids.tensor_split(2) if len(half)]


@rule(nn.GroupNorm, *GROUP_NORMS)
def group_norm_module(flow: Flow, node: Node) -> Value:
    """Blocks of axis 1, of equal length."""
    module, x = flow.traced.module(node), flow.first(node)
    attribute = groups_attribute(module)
    if (why := unknown_part(module)) or attribute is None:
        return opaque(flow, node, why)
    norm = Norm(type(module).__name__, (1,), parameters_of(flow, module), 1)
    return normalise_groups(flow, node, x, norm, int(getattr(module, attribute)))


@rule("group_norm")
def functional_group_norm(flow: Flow, node: Node) -> Value:
    """F.group_norm with parameters of the model, or with none."""
    args = arguments(node, "input", "num_groups", "weight", "bias", "eps")
    x, own = flow.of(args["input"]), parameters_read(flow, args["weight"], args["bias"])
    if x is None or own is None:
        return _computed(flow, node, op_name(node))
    norm = Norm(op_name(node), (1,), own, 1)
    return normalise_groups(flow, node, x, norm, int(constant(args["num_groups"])))


# ---- without parameters -------------------------------------------------------------------------


@rule("normalize", "local_response_norm", nn.LocalResponseNorm, nn.CrossMapLRN2d)
def without_parameters(flow: Flow, node: Node) -> Value:
    """F.normalize, local response norm: the axis that they run along stays whole."""
    x = flow.of(first_argument(node))
    name = op_name(node) or type(flow.traced.module(node)).__name__
    if x is None:
        return opaque(flow, node, f"`{name}` of something computed")
    dim = constant(arguments(node, "input", "p", "dim").get("dim", 1)) if name == "normalize" else 1
    dims = [dim] if isinstance(dim, int) else list(dim)
    axes = sorted(d % len(x.shape) for d in dims)
    return flow.ledger.complete(x, axes, node, f"`{name}` {_UNNAMED}")


def zeroable(module: nn.Module) -> bool:
    """Whether a norm layer gives zero wherever its weight and bias are zero.

    False for one without a weight, and for one with an activation inside that maps zero elsewhere.
    """
    name, act = dotted(module), getattr(module, "act", None)
    foreign = name in {*LAYER_NORMS, *GROUP_NORMS, *PER_CHANNEL_NORMS}
    if not foreign and not isinstance(module, _NORMS):  # guard: norms -> tests/test_reader_core.py
        return False
    named = module._parameters.get("weight") is not None and name not in RESPONSE_NORMS
    if not named or hasattr(module, "tau"):  # the latter: a threshold of its own
        return False
    return not foreign or act is None or not bool(act(torch.zeros(1)).any())


_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
