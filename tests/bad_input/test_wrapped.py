"""Models that were pruned, compiled, wrapped or sharded before."""

import re

import pytest
import torch
from refusals import X, compile_refused, conv, l1, net, untouched
from torch import nn

import fxprune
from fxprune import TraceError, UnsupportedOpError


def test_pruning_a_pruned_network_leaves_it_alone():
    first = fxprune.compile(net().eval(), X, method=l1(0.25), progress=False)
    with untouched(first):
        second = fxprune.compile(first, X, method=l1(0.5), progress=False)
    assert second.get_submodule("0").out_channels < first.get_submodule("0").out_channels < 8
    again = fxprune.apply(net(), second.plan, X)
    assert {k: t.shape for k, t in again.state_dict().items()} == {
        k: t.shape for k, t in second.state_dict().items()
    }


def test_after_a_refusal_the_same_model_prunes():
    model = net()
    handle = model.register_forward_hook(lambda *a: None)
    compile_refused(model, TraceError, "hooks")
    handle.remove()
    assert fxprune.compile(model, X, progress=False).plan.slices


# Wrappers around the model come off (tests/test_inputs.py); inside it, they are named


def test_data_parallel_inside_a_model_says_how_to_take_it_off():
    model = nn.Sequential()
    model.features, model.head = nn.DataParallel(net()), conv(4, 2)
    error = compile_refused(
        model, UnsupportedOpError, "`features` is wrapped by DataParallel", "module features"
    )
    exec(re.search(r"\((model\..*\))\), and", error.fix)[1])  # what the message says helps
    pruned = fxprune.compile(model, X, method=l1(0.5), progress=False)
    assert pruned.get_submodule("features.0").out_channels == 4


def test_a_part_that_torch_compile_wraps_says_how_to_take_it_off():
    model = nn.Sequential(conv(3, 3), torch.compile(net(), backend="eager"))
    error = compile_refused(model, UnsupportedOpError, "`1` is wrapped by torch.compile")
    exec(re.search(r"\((model\..*\))\), and", error.fix)[1])
    assert fxprune.compile(model, X, progress=False).plan.slices


def test_a_model_compiled_in_place_is_pruned():
    model = net()
    model.compile(backend="eager")
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    assert pruned.plan.slices
    assert pruned._compiled_call_impl is None


@pytest.mark.filterwarnings("ignore")  # of torch, that scripting is going away
def test_a_scripted_part_is_named():
    model = nn.Sequential(conv(3, 3), torch.jit.script(net()))
    with pytest.raises(TraceError, match="`1` is a TorchScript module") as e:
        fxprune.compile(model, X, progress=False)
    assert "the Python module in its place" in e.value.fix


def test_an_exported_program_is_named():
    model = torch.export.export(net(), (X,)).module()
    with pytest.raises(TraceError, match=r"the model comes from torch\.export") as e:
        fxprune.compile(model, X, progress=False)
    assert "the Python model" in e.value.fix


@pytest.fixture
def mesh():
    """A mesh of this one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_data_parallel_comes_off(mesh):
    inner = net()
    model = nn.parallel.DistributedDataParallel(inner)
    with untouched(inner):
        pruned = fxprune.compile(model, X, method=l1(0.5), progress=False)
    assert any("DistributedDataParallel wrapper was taken off" in n for n in pruned.report.notes)
    assert set(pruned.state_dict()) == set(inner.state_dict())


@pytest.mark.parametrize("part", ["", "3"])
def test_models_sharded_by_fsdp_are_refused(mesh, part):
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model.get_submodule(part), mesh=mesh)
    with pytest.raises(UnsupportedOpError, match="sharded by FSDP") as e:
        fxprune.compile(model, X, progress=False)
    assert (e.value.where == f"module {part}") == bool(part)
    assert e.value.fix == "prune first, then shard"


def test_sharded_tensors_are_refused_by_name(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    model = net()
    model[3].weight = nn.Parameter(distribute_tensor(model[3].weight.detach(), mesh, [Shard(0)]))
    for call in (fxprune.compile, fxprune.analyze):
        with pytest.raises(UnsupportedOpError, match=r"`3\.weight` is sharded \(a DTensor\)") as e:
            call(model, X)
        assert "full_tensor()" in e.value.fix
