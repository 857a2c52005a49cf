"""Weights that cannot be ranked, or are no plain tensors: refused, or frozen with the reason."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import masked, relative_error
from refusals import X, compile_refused, conv, frozen, l1, net, refused, untouched
from torch import nn

import fxprune
from fxprune import CheckpointError, PlanError, TraceError

# Weights that cannot be ranked


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(bad, dtype):
    model = net().to(dtype)
    with torch.no_grad():
        model[3].weight[1, 2] = bad
    compile_refused(model, PlanError, "`3.weight` has 9 values that are NaN or infinite", "parameter 3.weight",
                    x=X.to(dtype))  # fmt: skip


def test_infinities_that_cancel_are_found():
    model = net()
    with torch.no_grad():
        model[5].bias[0], model[5].bias[1] = float("inf"), -float("inf")
    compile_refused(model, PlanError, "`5.bias` has 2 values")


def test_large_finite_weights_are_not_mistaken_for_infinite():
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(1e37)
    assert fxprune.compile(model, X, progress=False, verify=False).plan.slices
    model = net().half()
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    assert fxprune.compile(model, X.half(), progress=False, verify=False).plan.slices


def test_statistics_that_are_not_finite():
    model = net()
    model[1].running_mean[2] = float("nan")
    compile_refused(model, PlanError, "1.running_mean")


def test_nan_in_a_parameter_that_is_not_used_does_no_harm():
    model = net()
    model.unused = nn.Parameter(torch.full((3,), float("nan")))
    assert fxprune.compile(model, X, progress=False).plan.slices


def test_meta_weights_are_planned_by_hand():
    model = net().to("meta")
    compile_refused(model, PlanError, "meta device", "holds no values", "analyze(model).plan")
    for x in (X, X.to("meta")):
        with untouched(model):
            plan = fxprune.analyze(model, x).plan({"0": [0, 3, 5]})
            pruned = fxprune.apply(model, plan, x)
        assert pruned.get_submodule("0").weight.shape == (3, 3, 3, 3)
        assert {t.device.type for t in pruned.state_dict().values()} == {"meta"}


def test_a_file_fills_a_meta_model(tmp_path):
    model = net().eval()
    pruned = fxprune.compile(model, X, progress=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    with torch.device("meta"):
        empty = net().eval()
    loaded = fxprune.load(tmp_path / "net.safetensors", empty)
    torch.testing.assert_close(loaded(X), pruned(X), rtol=0, atol=0)


def test_meta_networks_cannot_be_saved(tmp_path):
    model = net().to("meta")
    pruned = fxprune.apply(model, fxprune.analyze(model, X).plan({"0": [1]}), X)
    refused(CheckpointError, lambda: fxprune.save(pruned, tmp_path / "net.safetensors"), "meta")
    assert [*tmp_path.iterdir()] == []


# Weights that are no plain tensors


def test_complex_weights_are_frozen():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 6, dtype=torch.complex64)
            self.c, self.d = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x).to(torch.complex64)).abs()))

    model = Complex()
    assert "`b.weight` is complex" in frozen(model, torch.randn(2, 4))
    x = torch.randn(2, 4)
    with untouched(model):
        pruned = fxprune.compile(model, x, method=l1(0.5), progress=False)
    assert (pruned.a.out_features, pruned.b.out_features, pruned.c.out_features) == (8, 6, 2)


def test_sparse_weights_are_frozen():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.d = nn.Linear(4, 8), nn.Linear(6, 5), nn.Linear(5, 2)
            self.w = nn.Parameter(torch.eye(8)[:6].to_sparse())

        def forward(self, x):
            return self.d(self.c(torch.sparse.mm(self.w, self.a(x).t()).t()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Sparse()
        pruned = fxprune.compile(model, torch.randn(2, 4), method=l1(0.5), progress=False)
    assert (pruned.a.out_features, pruned.c.out_features) == (8, 2)
    assert pruned.w.layout is torch.sparse_coo


def test_old_weight_norm_is_frozen_with_the_reason():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[3])
    text = frozen(model)
    assert "3: " in text
    assert "remove_weight_norm" in text
    with untouched(model), pytest.raises(PlanError, match="remove_weight_norm"):
        fxprune.compile(model, X, progress=False)


def test_old_spectral_norm_is_frozen_with_the_reason():
    model = net()
    nn.utils.spectral_norm(model[3])
    assert "remove_spectral_norm" in frozen(model)


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_parametrized_layers_are_frozen_with_the_remedy(norm):
    model = nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 6), conv(6, 4)
    ).eval()
    norm(model[2])
    text = frozen(model)
    assert "`2` is parametrized" in text
    assert "remove_parametrizations" in text
    with untouched(model):
        pruned = fxprune.compile(model, X, method=l1(0.5), progress=False)
    assert pruned.get_submodule("4").out_channels == 3
    assert relative_error(masked(model, pruned.plan.to_dict())(X), pruned(X)) < 1e-5
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert "2" in [g.name for g in fxprune.analyze(model, X).groups]


def test_pruning_masks_of_torch_are_frozen_with_the_remedy():
    from torch.nn.utils import prune

    model = net()
    prune.l1_unstructured(model[3], "weight", 0.5)
    assert "`3" in frozen(model)
    compile_refused(model, PlanError, "nothing can be pruned", "`3")


def test_lazy_modules_must_see_an_input_first():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConv2d(4, 3))
    with pytest.raises(TraceError) as e:
        fxprune.compile(model, X, progress=False)
    assert "`0.weight` has no shape yet" in str(e.value)
    assert "run the model once" in str(e.value)
    assert nn.parameter.is_lazy(model[0].weight)
    model(X)
    assert fxprune.compile(model, X, progress=False).plan.slices


@pytest.mark.filterwarnings("ignore")  # of torch, that eager quantization is going away
def test_quantized_weights_are_frozen():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)
            self.c, self.d = nn.Linear(8, 5), nn.Linear(5, 2)
            w = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
            self.register_buffer("w", w)

        def forward(self, x):
            return self.d(self.c(F.linear(self.b(self.a(x)), self.w.dequantize())))

    model, x = Quantized(), torch.randn(2, 4)
    pruned = fxprune.compile(model, x, method=l1(0.5), progress=False)
    assert pruned.a.out_features == 4
    assert (pruned.b.out_features, pruned.c.out_features) == (8, 2)
    assert pruned.w.is_quantized
    assert pruned.report.verified


@pytest.mark.filterwarnings("ignore")
def test_a_layer_quantized_by_torch_is_frozen():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    torch.ao.quantization.quantize_dynamic(model, {"2"}, torch.qint8, inplace=True)
    x = torch.randn(3, 4)
    assert "fxprune has no rule for the module Linear" in frozen(model, x)
    with pytest.raises(PlanError, match="nothing can be pruned"):
        fxprune.compile(model, x, progress=False)
