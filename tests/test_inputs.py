"""What the compiler works on: wrappers come off with a note, example inputs are found in order."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import OptionError, OptionTypeError, TraceError, UnsupportedOpError
from fxprune.inputs import find_inputs, unwrap


def net(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def shapes(model: nn.Module, given: object = None, data: object = None) -> list[tuple[int, ...]]:
    found, _ = find_inputs(model, given, data)
    return [tuple(t.shape) for t in found if isinstance(t, Tensor)]


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 3, 9, 9), torch.zeros(4, dtype=torch.int64)) for _ in range(n)]


# Where the example input comes from


def test_a_tensor_or_a_tuple_is_taken_as_it_is():
    x, y = torch.randn(2, 3), torch.randn(2)
    assert find_inputs(net(), x, None)[0][0] is x
    assert find_inputs(net(), (x, 2, y), None)[0] == (x, 2, y)
    assert find_inputs(net(), [x, y], None)[0] == (x, y)


def test_a_list_or_dict_of_tensors_can_be_an_argument():
    x = torch.randn(2, 3)
    assert find_inputs(net(), ([x, x],), None)[0] == ([x, x],)
    assert find_inputs(net(), ({"x": x},), None)[0] == ({"x": x},)


@pytest.mark.parametrize(
    "given", ["image.png", 3, {"x": torch.zeros(1)}, (), (1, 2), (3, 32, 32), []]
)
def test_other_example_inputs_are_refused_by_type(given):
    with pytest.raises(OptionTypeError) as e:
        find_inputs(net(), given, None)
    assert e.value.what.startswith("example_inputs ")
    assert e.value.where == "example_inputs"
    assert "a tensor, or a tuple" in e.value.why
    assert "torch.randn" in e.value.fix


def test_the_first_batch_of_data_comes_before_the_models_own_hints():
    model = net()
    model.example_input_array = torch.zeros(1, 3, 32, 32)
    model.default_cfg = {"input_size": (3, 16, 16)}
    assert shapes(model, None, batches()) == [(4, 3, 9, 9)]
    assert shapes(model) == [(1, 3, 32, 32)]
    del model.example_input_array
    assert shapes(model) == [(1, 3, 16, 16)]
    del model.default_cfg
    assert shapes(model) == [(1, 3, 224, 224)]


def test_explicit_inputs_come_before_data():
    assert shapes(net(), torch.zeros(1, 3, 7, 7), batches()) == [(1, 3, 7, 7)]


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(5, 4, 3), (1, 5, 224)),
        (nn.Conv2d(5, 4, 3), (1, 5, 224, 224)),
        (nn.Conv3d(5, 4, 3), (1, 5, 16, 112, 112)),
        (nn.ConvTranspose2d(5, 4, 3), (1, 5, 224, 224)),
    ],
)
def test_the_first_convolution_says_channels_and_rank(conv, shape):
    assert shapes(nn.Sequential(conv)) == [shape]


def test_guessed_inputs_have_the_models_dtype():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert find_inputs(net().to(dtype), None, None)[0][0].dtype == dtype


def test_without_a_convolution_inputs_must_be_given():
    with pytest.raises(OptionError, match="the shape of the input is not known") as e:
        fxprune.compile(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)))
    assert "no convolution" in e.value.why
    assert "example_inputs=" in e.value.fix


def test_a_guess_that_the_model_rejects_asks_for_inputs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 2))
    with pytest.raises(TraceError, match="does not accept the example input") as e:
        fxprune.compile(model)
    assert "(1, 3, 224, 224)" in e.value.why
    assert "example_inputs=" in e.value.fix


def test_an_input_of_the_wrong_shape_is_named():
    with pytest.raises(TraceError, match="does not accept the example input") as e:
        fxprune.compile(net(), torch.randn(2, 5, 8, 8))
    assert "(2, 5, 8, 8)" in e.value.why


def test_an_input_of_the_wrong_dtype_is_refused():
    with pytest.raises(TraceError, match="does not accept the example input"):
        fxprune.compile(net(), torch.zeros(2, 3, 8, 8, dtype=torch.int64))


def test_too_few_inputs_are_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x, y):
            return self.b(self.a(x)) + y

    with pytest.raises(fxprune.FxPruneError) as e:
        fxprune.compile(Two(), torch.randn(2, 3))
    assert "NoneType" not in str(e.value)
    assert "`y`" in str(e.value) or "1 input" in str(e.value)


def test_too_many_inputs_are_refused():
    with pytest.raises(fxprune.FxPruneError):
        fxprune.compile(net(), (torch.randn(2, 3, 8, 8), torch.randn(2)))


def test_keyword_only_inputs_are_refused_with_the_reason():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, *, x):
            return self.b(self.a(x))

    with pytest.raises(fxprune.FxPruneError, match="keyword"):
        fxprune.compile(Named(), torch.randn(2, 3))


# Data


@pytest.mark.parametrize("data", [3, object()])
def test_data_must_be_iterable(data):
    with pytest.raises(OptionTypeError, match="data is a") as e:
        fxprune.compile(net(), data=data)
    assert e.value.where == "data"


@pytest.mark.parametrize("empty", [[], (), iter(())])
def test_empty_data_is_refused(empty):
    with pytest.raises(OptionError, match="data gave no batch") as e:
        fxprune.compile(net(), data=empty)
    assert e.value.fix


@pytest.mark.parametrize("batch", [3, "text", {"image": torch.zeros(1)}, [[1, 2]], ()])
def test_batches_without_a_tensor_are_refused(batch):
    with pytest.raises(OptionTypeError, match="where the input should be") as e:
        fxprune.compile(net(), data=[batch])
    assert "(input, target)" in e.value.why


def test_a_none_batch_is_not_taken_for_the_end():
    with pytest.raises(OptionTypeError):
        find_inputs(net(), None, [None, *batches()])


def test_an_iterator_keeps_its_first_batch():
    given = batches(3)
    iterator = iter(given)
    inputs, data = find_inputs(net(), None, iterator)
    assert inputs[0] is given[0][0]
    assert [x is y for (x, _), (y, _) in zip(data, given, strict=True)] == [True] * 3


def test_a_generator_of_one_batch_serves_example_and_repair():
    pruned = fxprune.compile(
        net(), data=(b for b in batches(1)), repair="bn", progress=False, verify=False
    )
    assert "batch norms were recalibrated on 4 samples" in pruned.report.notes


def test_loaders_can_be_read_again():
    loader = DataLoader(TensorDataset(torch.randn(6, 3, 9, 9), torch.zeros(6)), batch_size=3)
    inputs, data = find_inputs(net(), None, loader)
    assert inputs[0].shape == (3, 3, 9, 9)
    assert data is loader


def test_repair_reads_data_when_inputs_were_given_too():
    pruned = fxprune.compile(
        net(), torch.randn(1, 3, 9, 9), data=batches(2), repair="bn", progress=False
    )
    assert "batch norms were recalibrated on 8 samples" in pruned.report.notes


# Wrappers


@pytest.mark.parametrize("model", [nn.Linear, "resnet18", None, {"weight": torch.zeros(1)}, len])
def test_only_modules_are_models(model):
    for call in (fxprune.compile, fxprune.analyze):
        with pytest.raises(OptionTypeError, match="model is a") as e:
            call(model)
        assert "torch.nn.Module" in e.value.why
        assert e.value.fix


def test_scripted_models_are_refused():
    for scripted in (torch.jit.script(net()), torch.jit.trace(net(), torch.randn(1, 3, 9, 9))):
        with pytest.raises(TraceError, match="TorchScript") as e:
            fxprune.compile(scripted, torch.randn(1, 3, 9, 9))
        assert "scripted from" in e.value.fix


def test_a_scripted_part_is_refused_or_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), torch.jit.script(nn.ReLU()), nn.Conv2d(8, 2, 3))
    x = torch.randn(1, 3, 9, 9)
    try:
        pruned = fxprune.compile(model, x, progress=False)
    except fxprune.FxPruneError:
        return
    assert pruned(x).shape == model(x).shape


def test_wrappers_come_off_with_a_note():
    inner = net()
    twice = torch.compile(nn.DataParallel(inner), backend="eager")
    for wrapped, names in (
        (nn.DataParallel(inner), ["DataParallel"]),
        (torch.compile(inner, backend="eager"), ["OptimizedModule"]),
        (twice, ["OptimizedModule", "DataParallel"]),
    ):
        found, notes = unwrap(wrapped)
        assert found is inner
        assert [name in note for name, note in zip(names, notes, strict=True)] == [True] * len(
            names
        )
        pruned = fxprune.compile(wrapped, torch.randn(1, 3, 9, 9), progress=False)
        assert all(any(name in note for note in pruned.report.notes) for name in names)
        assert set(pruned.state_dict()) == set(inner.state_dict())


def test_wrapped_models_work_with_every_verb(tmp_path):
    inner, x = net(), torch.randn(1, 3, 9, 9)
    wrapped = nn.DataParallel(inner)
    assert [g.name for g in fxprune.analyze(wrapped, x).groups] == ["0", "3"]
    pruned = fxprune.compile(wrapped, x, progress=False)
    again = fxprune.apply(wrapped, pruned.plan, x)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    loaded = fxprune.load(tmp_path / "net.safetensors", wrapped)
    for other in (again, loaded):
        torch.testing.assert_close(other.eval()(x), pruned.eval()(x), rtol=0, atol=0)


def test_mask_takes_wrappers_off_too():
    inner, x = net().eval(), torch.randn(1, 3, 9, 9)
    plan = fxprune.compile(inner, x, progress=False).plan
    masked = fxprune.mask(nn.DataParallel(inner), plan)
    torch.testing.assert_close(masked(x), fxprune.mask(inner, plan)(x), rtol=0, atol=0)


def test_sharded_models_are_refused():
    class FSDPModule(nn.Module):
        pass

    with pytest.raises(UnsupportedOpError, match="sharded") as e:
        fxprune.compile(FSDPModule())
    assert "then shard" in e.value.fix


def test_a_models_own_attribute_called_module_is_not_a_wrapper():
    class DataModule(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net()

        def forward(self, x):
            return self.module(x)

    model = DataModule()
    assert unwrap(model) == (model, [])
