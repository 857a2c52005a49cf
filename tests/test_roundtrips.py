"""A pruned network is an ordinary module: five torchvision models through everything users do next.

torch.compile, torch.export, ONNX, training, mode switches, state_dict, deepcopy, pickle, files, other
processes, symbolic tracing, and pruning once more. Bit for bit wherever no other kernel computes.
"""

import copy
import functools
import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from oracle import masked, relative_error
from strategies import nets
from torch import nn
from torchvision.ops import StochasticDepth

import fxprune
from fxprune import zoo

MODELS = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "googlenet", "efficientnet_b0")
DROPOUT = {"mobilenet_v2", "googlenet", "efficientnet_b0"}
FLOAT32 = 1e-4  # relative, other kernels or other widths over some 20 layers; seen: 1e-6
COMPILER = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)

every_model = pytest.mark.parametrize("name", MODELS)
some = settings(max_examples=max(settings.default.max_examples // 4, 10))


# ---- what is tested -----------------------------------------------------------------------------


@torch.no_grad()
def randomise(model, seed=0):
    """Batch norms with statistics and affine values of their own, so that none is an identity."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t, low, width in (
                (m.weight, 0.5, 1.0),
                (m.bias, -0.2, 0.4),
                (m.running_mean, -0.2, 0.4),
                (m.running_var, 0.5, 1.0),
            ):
                t.copy_(low + width * torch.rand(t.shape, generator=g))
    return model


def fresh(name, seed=0):
    torch.manual_seed(seed)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(num_classes=10, **options)
    return randomise(model, seed).eval()


def images(batch=2, size=(64, 64), seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def original(name):
    """Shared: no test may change it."""
    return fresh(name)


@functools.cache
def pruned_of(name):
    """Shared: no test may change it."""
    return fxprune.compile(original(name), images(), budget=0.5, progress=False)


class Small(nn.Module):
    """Frozen layers, a layer kept in eval mode, functional dropout, buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(8, 1, 1) + 0.5, persistent=False)
        self.register_buffer("shift", torch.rand(8, 1, 1))
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.tail = nn.Sequential(nn.Conv2d(8, 6, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)
        self.classes = ["a", "b", "c", "d"]
        self.conv1.weight.requires_grad_(False)
        randomise(self)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu() * self.scale + self.shift
        x = self.tail(x).mean((2, 3))
        return self.head(F.dropout(x, 0.5, self.training))


def small_images(batch=2, size=12):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def reloaded(module, model, folder):
    fxprune.save(module, folder / "net.safetensors")
    return fxprune.load(folder / "net.safetensors", model)


def modes(module):
    return {name: m.training for name, m in module.named_modules()}


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def assert_same_state(a, b):
    """Equal names, order and bits."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def assert_twin(a, b, *inputs):
    """Equal in all that a user can see, and nothing is shared."""
    assert isinstance(b, fxprune.PrunedModule)
    assert b.plan.to_json() == a.plan.to_json()
    assert b.report.to_json() == a.report.to_json()
    assert_same_state(a, b)
    assert modes(a) == modes(b)
    assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
    assert {n for n, _ in a.named_buffers()} == {n for n, _ in b.named_buffers()}
    assert not storages(a) & storages(b)
    with torch.no_grad():
        for x in inputs:
            assert torch.equal(a(x), b(x))


def storages(module):
    return {t.untyped_storage().data_ptr() for t in tensors(module) if t.numel()}


# ---- compilers and exporters --------------------------------------------------------------------


@every_model
def test_torch_compile_without_graph_breaks(name):
    torch._dynamo.reset()
    compiled = torch.compile(pruned_of(name), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        x = images()
        assert relative_error(pruned_of(name)(x), compiled(x)) <= FLOAT32


def compiled_for_real(model, x):
    backend = "inductor" if COMPILER else "aot_eager"
    print(f"C++ compiler: {COMPILER or 'none found'}; torch.compile backend: {backend}")
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative_error(model(x), torch.compile(model, fullgraph=True, backend=backend)(x)) <= FLOAT32  # fmt: skip


def test_torch_compile_with_the_default_backend():
    net = randomise(zoo.cifar_resnet(8, width=8)).eval()
    x = torch.randn(2, 3, 16, 16)
    compiled_for_real(fxprune.compile(net, x, progress=False), x)


@pytest.mark.long
@every_model
def test_torch_compile_of_every_model_with_the_default_backend(name):
    compiled_for_real(pruned_of(name), images())


@every_model
def test_torch_export(name):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(pruned_of(name), (images(),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for x in (images(), images(5, seed=3)):
            assert relative_error(pruned_of(name)(x), program.module()(x)) <= FLOAT32


@pytest.mark.parametrize(
    "name", [n if n == "resnet18" else pytest.param(n, marks=pytest.mark.long) for n in MODELS]
)
def test_pt2_file(name, tmp_path):
    path = fxprune.export(pruned_of(name), tmp_path / "net.pt2")
    program = torch.export.load(io.BytesIO(path.read_bytes()))
    with torch.no_grad():
        for x in (images(), images(5, seed=3)):
            assert relative_error(pruned_of(name)(x), program.module()(x)) <= FLOAT32


ONNX_NOW = {"resnet18", "shufflenet_v2_x1_0"}


@pytest.mark.parametrize(
    "name", [n if n in ONNX_NOW else pytest.param(n, marks=pytest.mark.long) for n in MODELS]
)
def test_onnx_file(name, tmp_path):
    import onnxruntime

    path = fxprune.export(pruned_of(name), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (given_,) = session.get_inputs()
    with torch.no_grad():
        for x in (images(), images(5, seed=3)):  # the batch size stays open
            (got,) = session.run(None, {given_.name: x.numpy()})
            assert relative_error(pruned_of(name)(x), torch.from_numpy(got)) <= FLOAT32


def test_export_leaves_the_network_as_it_was(tmp_path):
    net = copy.deepcopy(pruned_of("resnet18")).train()
    before, flags = copy.deepcopy(net), modes(net)
    fxprune.export(net, tmp_path / "net.pt2")
    assert modes(net) == flags
    assert_same_state(before, net)


@every_model
def test_symbolic_trace(name):
    again = torch.fx.symbolic_trace(pruned_of(name))
    with torch.no_grad():
        assert torch.equal(again(images()), pruned_of(name)(images()))


# ---- training -----------------------------------------------------------------------------------


@every_model
def test_training_works(name):
    net = copy.deepcopy(pruned_of(name)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = images(8), torch.arange(8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(5):
        torch.manual_seed(7)  # the same dropout each time: the same function falls
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        for key, p in net.named_parameters():
            assert p.grad is not None, key
            assert p.grad.isfinite().all(), key
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, value in net.state_dict().items():
        # a shift that the next batch norm takes away again need not move: only weights must
        if key.endswith(("running_mean", "running_var", "num_batches_tracked")) or value.dim() > 1:
            assert not torch.equal(value, before[key]), key


@every_model
def test_modes_are_followed(name):
    net = copy.deepcopy(pruned_of(name))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0  # statistics stay, so that eval outputs can be compared
    x = images(8)
    with torch.no_grad():
        expected = net(x)
        net.train()
        assert all(modes(net).values())
        torch.manual_seed(1)
        first, second = net(x), net(x)
        assert torch.equal(first, second) == (name not in DROPOUT)
        assert not torch.equal(first, expected)  # batch norms use the batch
        net.eval()
        assert not any(modes(net).values())
        assert torch.equal(net(x), expected)
        assert torch.equal(net(x), expected)


def test_stochastic_depth_follows_the_mode():
    net = copy.deepcopy(pruned_of("efficientnet_b0"))
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        m.train(isinstance(m, StochasticDepth))
    with torch.no_grad():
        first, second = net(images(8)), net(images(8))
        assert not torch.equal(first, second)


def test_functional_dropout_follows_the_mode():
    net = fxprune.compile(Small().eval(), small_images(), progress=False)
    x = small_images(16)
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
        for m in net.modules():
            m.training = not isinstance(m, nn.BatchNorm2d)
        assert not torch.equal(net(x), net(x))
        assert torch.equal(net.eval()(x), net(x))


# ---- copies -------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_models(name, copied):
    net = pruned_of(name)
    assert_twin(net, copied(net), images(), images(3, (80, 96)))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, lambda m: pickled(copy.deepcopy(m))])
def test_copies_keep_buffers_flags_and_attributes(copied):
    model = Small().train()
    model.tail[1].eval()  # a frozen norm inside a network in training
    net = fxprune.compile(model, small_images(), progress=False)
    assert modes(net)["tail.1"] is False
    assert modes(net)["tail"] is modes(net)["tail.0"] is modes(net)["conv1"] is True
    assert "scale" not in net.state_dict()
    assert "scale" in dict(net.named_buffers())
    twin = copied(net)
    assert twin.classes == model.classes
    assert twin.classes is not net.classes
    assert_twin(net, twin)
    assert_twin(net.eval(), twin.eval(), small_images(), small_images(1, 9))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_keep_the_name_of_the_class(copied):
    net = pruned_of("resnet18")
    assert type(net).__name__ == "ResNet"
    assert type(copied(net)).__name__ == "ResNet"


def test_a_shallow_copy_is_a_pruned_network():
    net = pruned_of("resnet18")
    twin = copy.copy(net)
    assert isinstance(twin, fxprune.PrunedModule)
    assert twin.plan == net.plan
    with torch.no_grad():
        assert torch.equal(twin(images()), net(images()))


def test_hooks_are_copied_with_the_network():
    net = copy.deepcopy(pruned_of("resnet18"))
    net.register_forward_hook(lambda module, inputs, output: output * 0)
    net.get_submodule("fc").register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(net)(images()), net(images()))


def test_a_folded_network_keeps_the_name_of_the_class():
    net = fxprune.compile(Small().eval(), small_images(), fold=True, progress=False)
    assert type(net).__name__ == "Small"


def test_a_copy_of_a_copy_can_be_pruned_trained_and_saved(tmp_path):
    net = pickled(copy.deepcopy(pruned_of("resnet18")))
    F.cross_entropy(net.train()(images()), torch.tensor([0, 1])).backward()
    twin = reloaded(net.eval(), original("resnet18"), tmp_path)
    with torch.no_grad():
        assert torch.equal(twin(images()), net(images()))
    assert fxprune.compile(net, images(), progress=False).plan.metrics["macs_after"] < net.plan.metrics["macs_after"]  # fmt: skip


@every_model
def test_state_dict_goes_into_a_fresh_network(name):
    net = pruned_of(name)
    other = fresh(name, seed=5)
    for target in (
        fxprune.apply(other, net.plan, images()),
        fxprune.compile(original(name), images(), budget=0.5, progress=False, verify=False),
    ):
        with torch.no_grad():
            for p in target.parameters():
                p.add_(1)
            target.load_state_dict(net.state_dict())
            assert_same_state(net, target)
            assert torch.equal(target(images()), net(images()))


@some
@given(net=nets())
def test_copies_of_random_networks(net):
    note(repr(net))
    x = net.example_input()
    assume(fxprune.analyze(net, x).groups)
    pruned = fxprune.compile(net, x, method=fxprune.methods.L1(ratio=0.4), progress=False)
    for copied in (copy.deepcopy, pickled):
        twin = copied(pruned)
        assert_same_state(pruned, twin)
        assert twin.plan == pruned.plan
        for x in net.inputs():
            assert relative_error(pruned(x), twin(x)) == 0


# ---- files --------------------------------------------------------------------------------------


@every_model
def test_save_and_load(name, tmp_path):
    net = pruned_of(name)
    loaded = reloaded(net, fresh(name, seed=5), tmp_path)
    assert loaded.plan.to_json() == net.plan.to_json()
    assert_same_state(net, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(images()), net(images()))
        assert torch.equal(loaded(images(3, (80, 96))), net(images(3, (80, 96))))


def test_the_dtype_of_the_file_reaches_buffers_outside_of_it(tmp_path):
    model = Small().eval()
    net = fxprune.compile(model, small_images(), progress=False).half()
    loaded = reloaded(net, model, tmp_path)
    assert {t.dtype for t in tensors(loaded) if t.is_floating_point()} == {torch.float16}
    with torch.no_grad():
        assert torch.equal(loaded(small_images().half()), net(small_images().half()))


def test_a_meta_model_takes_a_file_or_says_what_it_lacks(tmp_path):
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10).eval()
        small = Small().eval()
    loaded = reloaded(pruned_of("resnet18"), model, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images()), pruned_of("resnet18")(images()))
    net = fxprune.compile(Small().eval(), small_images(), progress=False)
    with pytest.raises(fxprune.CheckpointError, match="scale"):  # not in the file, no values here
        reloaded(net, small, tmp_path)


@every_model
def test_equal_networks_give_equal_bytes(name, tmp_path):
    net = pruned_of(name)
    files = []
    for i, m in enumerate([net, net, copy.deepcopy(net), pickled(net), reloaded(net, original(name), tmp_path)]):  # fmt: skip
        fxprune.save(m, tmp_path / f"{i}.safetensors")
        files.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(set(files)) == 1


PROCESS = """
import pickle, sys, torch
torch.set_num_threads(1)
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from test_roundtrips import MODELS, fresh, fxprune, images, original, pruned_of
for name in MODELS:
    loaded = fxprune.load(f"{folder}/{name}.safetensors", fresh(name, seed=5))
    with open(f"{folder}/{name}.pickle", "rb") as file:
        unpickled = pickle.load(file)
    with torch.no_grad():
        torch.save([loaded(images()), unpickled(images())], f"{folder}/{name}.outputs")
    with open(f"{folder}/{name}.json", "w") as file:
        file.write(pruned_of(name).plan.to_json())
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    """Loaded, unpickled and compiled again under another hash seed."""
    for name in MODELS:
        fxprune.save(pruned_of(name), tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(pruned_of(name)))
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONHASHSEED": "4321"}
    subprocess.run([sys.executable, "-c", PROCESS, str(tmp_path), here], check=True, env=environment)  # fmt: skip
    for name in MODELS:
        with torch.no_grad():
            expected = pruned_of(name)(images())
        for got in torch.load(tmp_path / f"{name}.outputs"):
            assert torch.equal(got, expected), name
        assert (tmp_path / f"{name}.json").read_text() == pruned_of(name).plan.to_json(), name


@every_model
def test_the_same_call_gives_the_same_plan(name):
    again = fxprune.compile(fresh(name), images(), budget=0.5, progress=False)
    assert again.plan.to_json() == pruned_of(name).plan.to_json()
    assert_same_state(again, pruned_of(name))


def trained(net):
    F.cross_entropy(net.train()(small_images(4)), torch.arange(4)).backward()
    torch.optim.SGD(net.parameters(), lr=1e-3).step()


def statistics_only(net):
    with torch.no_grad():
        net.train()(small_images(4))


@torch.no_grad()
def reordered(net):
    conv = net.get_submodule("tail.0")
    conv.weight.copy_(conv.weight.flip(0))  # the same values, filters in another order


@torch.no_grad()
def one_bit(net):
    net.head.bias.view(torch.int32)[0] ^= 1


@pytest.mark.parametrize("change", [trained, statistics_only, reordered, one_bit])
def test_changed_weights_are_saved_as_changed(change, tmp_path):
    """Weights "cut" would promise that the plan and the original weights give these tensors."""
    model = Small().eval()
    net = fxprune.compile(model, small_images(), progress=False)
    assert reloaded(net, model, tmp_path).plan.weights == "cut"
    change(net)
    net.eval()
    loaded = reloaded(net, model, tmp_path)
    assert loaded.plan.weights == "changed"
    assert_same_state(net, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(small_images()), net(small_images()))
    assert reloaded(loaded, model, tmp_path).plan.weights == "changed"
    assert fxprune.compile(loaded, small_images(), progress=False).plan.weights == "changed"


def test_applying_a_changed_plan_says_so(tmp_path):
    model = Small().eval()
    net = fxprune.compile(model, small_images(), progress=False)
    trained(net)
    plan = reloaded(net.eval(), model, tmp_path).plan
    replayed = fxprune.apply(model, plan, small_images())
    assert any("changed" in note_ for note_ in replayed.report.notes)
    assert replayed.plan.weights == "changed"


def test_pruning_a_trained_network_says_that_the_weights_changed(tmp_path):
    """The composed plan and the first original's weights no longer give these tensors."""
    net = fxprune.compile(Small().eval(), small_images(), progress=False)
    trained(net)
    assert fxprune.compile(net.eval(), small_images(), progress=False).plan.weights == "changed"


# ---- pruning once more --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fold"), [(n, i % 2 == 0) for i, n in enumerate(MODELS)])
def test_two_cuts_give_one_plan(name, fold):
    first = fxprune.compile(original(name), images(), budget=0.7, fold=fold, progress=False)
    second = fxprune.compile(first, images(), budget=0.7, progress=False)
    assert second.plan.metrics["macs_before"] == first.plan.metrics["macs_before"]
    assert second.plan.metrics["macs_after"] <= 0.7 * first.plan.metrics["macs_after"]
    replayed = fxprune.apply(original(name), second.plan, images())
    assert_same_state(second, replayed)
    assert replayed.plan.to_json() == second.plan.to_json()
    with torch.no_grad():
        for x in (images(), images(3, (80, 96))):
            assert torch.equal(second(x), replayed(x))


def through(way, module, model, folder):
    """The network, or its copy by another way."""
    if way == "load":
        return reloaded(module, model, folder)
    return {"as it is": lambda m: m, "deepcopy": copy.deepcopy, "pickle": pickled}[way](module)


WAYS = ("as it is", "deepcopy", "pickle", "load")


@given(
    net=nets(),
    steps=st.lists(st.tuples(st.sampled_from((0.2, 0.4)), st.sampled_from(WAYS), st.booleans()), min_size=2, max_size=3),
)  # fmt: skip
@some
def test_cuts_in_a_row_give_one_plan(net, steps, tmp_path_factory):
    note(repr(net))
    folder = tmp_path_factory.mktemp("cuts")
    pruned, x = net, net.example_input()
    assume(fxprune.analyze(net, x).groups)
    for ratio, way, fold in steps:
        method = fxprune.methods.L1(ratio=ratio)
        pruned = fxprune.compile(pruned, x, method=method, fold=fold, progress=False)
        pruned = through(way, pruned, net, folder)
    plan = fxprune.Plan.from_json(pruned.plan.to_json())
    replayed = fxprune.apply(net, plan, x)
    assert_same_state(pruned, replayed)
    reference = masked(net, plan.to_dict())
    for x in net.inputs():
        assert relative_error(pruned(x), replayed(x)) == 0
        assert relative_error(reference(x), pruned(x)) <= 1e-9
    assert plan.metrics["params_after"] == sum(p.numel() for p in pruned.parameters())


# ---- what is kept -------------------------------------------------------------------------------


@every_model
def test_other_sizes_are_accepted(name):
    reference = fxprune.mask(original(name), pruned_of(name).plan)
    with torch.no_grad():
        for x in (images(1), images(3, (80, 96)), images(1, (65, 127))):
            assert relative_error(reference(x), pruned_of(name)(x)) <= FLOAT32


@every_model
def test_nothing_is_shared_with_the_original(name):
    before = copy.deepcopy(original(name))
    net = fxprune.compile(original(name), images(), budget=0.5, progress=False)
    assert not storages(net) & storages(original(name))
    with torch.no_grad():
        for t in tensors(net):
            t.zero_()
    assert_same_state(before, original(name))
    assert modes(before) == modes(original(name))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_layout_flags_and_modes_are_kept(dtype, fold):
    model = fresh("resnet18").to(dtype).to(memory_format=torch.channels_last)
    for p in [*model.layer1.parameters(), *model.conv1.parameters()]:
        p.requires_grad_(False)
    model.train()
    model.layer2.eval()
    net = fxprune.compile(model, images().to(dtype), budget=0.5, fold=fold, progress=False)
    for name, m in net.named_modules():
        assert m.training == model.get_submodule(name).training, name
    for name, t in net.named_parameters():
        # guarded by name: a folded bias is new, and follows its convolution
        owner = dict(model.named_parameters()).get(name)
        frozen = name.startswith(("layer1.", "conv1."))
        assert t.dtype == dtype, name
        assert t.requires_grad == (not frozen), name
        if owner is not None and t.dim() == 4:
            assert t.is_contiguous(memory_format=torch.channels_last), name
    for name, t in net.named_buffers():
        assert t.dtype == dict(model.named_buffers())[name].dtype, name


def test_meta_models_stay_meta():
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10).eval()
    analysis = fxprune.analyze(model, images())
    plan = analysis.plan({"layer1.0.conv1": list(range(0, 64, 2))})
    net = fxprune.apply(model, plan, images())
    assert all(t.is_meta for t in tensors(net))
    assert net.get_submodule("layer1.0.conv1").out_channels == 32


def test_numbers_of_the_report_are_those_of_the_network():
    net = pruned_of("resnet18")
    assert net.report.metrics == dict(net.plan.metrics)
    assert net.plan.metrics["params_after"] == sum(p.numel() for p in net.parameters())
    assert np.isclose(net.plan.metrics["macs_after"] / net.plan.metrics["macs_before"], 0.5, atol=0.05)  # fmt: skip
