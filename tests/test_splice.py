"""A pruned sub-module put back: detectors end to end, what is shared stays shared, what is refused."""

import copy
import warnings

import pytest
import torch
import torchvision
from oracle import masked, relative_error
from torch import nn

import fxprune

QUICK = [
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
]
LONG = [
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
]
BOUND = 1e-9


def detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=5
        )
    if "ssd" not in name:
        model.transform.min_size = (96,)
    if hasattr(model, "rpn"):  # few proposals: the heads are not what is tested
        model.rpn._post_nms_top_n = {"training": 20, "testing": 20}
    model = model.double().eval()
    for p in model.backbone.parameters():
        p.requires_grad_(True)
    for m in model.backbone.modules():
        for own, spread in (
            ("weight", 0.5),
            ("running_var", 0.5),
            ("running_mean", 0.1),
            ("bias", 0.1),
        ):
            t = getattr(m, own, None)
            if t is not None and t.dim() == 1:
                with torch.no_grad():
                    t.add_(torch.rand_like(t) * spread)
    return model


def targets(name: str, sizes):
    found = []
    for height, width in sizes:
        target = {
            "boxes": torch.tensor([[5.0, 5.0, 50.0, 60.0]]).double(),
            "labels": torch.tensor([1]),
        }
        if "mask" in name:
            target["masks"] = torch.zeros(1, height, width, dtype=torch.uint8)
        if "keypoint" in name:
            target["keypoints"] = torch.tensor([[[10.0, 10.0, 1.0]] * 17]).double()
        found.append(target)
    return found


def test_the_list_of_detectors_is_torchvisions():
    known = torchvision.models.list_models(torchvision.models.detection)
    assert sorted(known) == sorted([*QUICK, *LONG])


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in LONG)])
def test_a_detector_with_a_pruned_backbone(name):
    model = detector(name)
    side = 300 if name == "ssd300_vgg16" else 96
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    pruned = fxprune.compile(model.backbone, x, budget=0.5)
    assert pruned.plan.metrics["macs_after"] <= 0.5 * pruned.plan.metrics["macs_before"]
    spliced = fxprune.splice(model, "backbone", pruned)
    assert type(spliced) is type(model)
    assert getattr(spliced.backbone, "out_channels", 0) == getattr(
        model.backbone, "out_channels", 0
    )

    reference = copy.deepcopy(model)
    reference.backbone = masked(model.backbone, pruned.plan.to_dict())
    sizes = [(80, 100), (96, 70)]
    images = [torch.rand(3, *size, dtype=torch.float64) for size in sizes]
    with torch.no_grad():
        batch = reference.transform(images)[0].tensors
        old, new = reference.backbone(batch), spliced.backbone(batch)
        assert relative_error(list(old.values()), list(new.values())) <= BOUND
        assert relative_error(list(model.backbone(batch).values()), list(new.values())) > 1e-3
        expected, found = reference(images), spliced(images)
    assert [sorted(f) for f in found] == [sorted(e) for e in expected]
    assert all(torch.isfinite(f["scores"]).all() for f in found)

    spliced.train()
    losses = spliced(images, targets(name, sizes))
    sum(losses.values()).backward()
    learnt = [p for p in spliced.backbone.parameters() if p.requires_grad]
    assert learnt
    assert all(p.grad is not None for p in learnt)
    assert not any(p.grad is not None for p in model.parameters())


class Body(nn.Module):
    """A backbone that tells its width."""

    def __init__(self, width=16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1)
        self.out_channels = 8

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.conv3(torch.relu(self.conv2(x)))


class Model(nn.Module):
    """Python decides by values: it cannot be traced as a whole."""

    def __init__(self):
        super().__init__()
        self.neck = nn.Sequential(Body(), Body())
        self.backbone = Body()
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.head(self.backbone(x))
        return y.relu() if float(y.detach().mean()) > 0 else y


X = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make() -> Model:
    torch.manual_seed(1)
    return Model().double().eval()


def prune(module: nn.Module, **options):
    return fxprune.compile(module, X, budget=0.4, progress=False, **options)


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}


def test_the_result_is_a_copy_with_the_pruned_network_in_place():
    model = make()
    with pytest.raises(fxprune.TraceError):
        prune(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pruned = prune(model.backbone)
    spliced = fxprune.splice(model, "backbone", pruned)
    reference = copy.deepcopy(model)
    reference.backbone = masked(model.backbone, pruned.plan.to_dict())
    assert relative_error(reference(X), spliced(X)) <= BOUND
    assert spliced.backbone.conv1.out_channels < 16
    assert spliced.backbone.out_channels == 8
    assert spliced.backbone.plan == pruned.plan
    assert not storages(spliced) & (storages(model) | storages(pruned))
    assert not storages(spliced.backbone) & storages(pruned)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model.backbone, Body)
    assert list(dict(spliced.named_children())) == list(dict(model.named_children()))


def test_the_replaced_weights_are_not_copied(monkeypatch):
    model = make()
    pruned = prune(model.backbone)
    gone = {id(p) for p in model.backbone.parameters()}
    copied = []
    original = nn.Parameter.__deepcopy__

    def noted(self, memo):
        copied.append(id(self))
        return original(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", noted)
    fxprune.splice(model, "backbone", pruned)
    assert copied
    assert not gone & set(copied)


def test_a_place_inside_a_list_of_modules():
    model = make()
    spliced = fxprune.splice(model, "neck.1", prune(model.neck[1]))
    assert isinstance(spliced.neck[1], fxprune.PrunedModule)
    assert type(spliced.neck[0]) is Body


def test_the_pruned_network_keeps_its_own_mode():
    model = make()
    pruned = prune(model.backbone).train()
    assert fxprune.splice(model, "backbone", pruned).backbone.training
    assert not fxprune.splice(model, "backbone", pruned).training
    assert not fxprune.splice(model, "backbone", pruned.eval()).backbone.training


def test_a_module_with_several_names_is_replaced_under_all():
    model = make()
    model.again = model.backbone
    model.kept = [model.backbone]
    spliced = fxprune.splice(model, "backbone", prune(model.backbone))
    assert spliced.again is spliced.backbone is spliced.kept[0]
    assert isinstance(spliced.again, fxprune.PrunedModule)


def test_what_is_shared_and_whole_stays_shared():
    model = make()
    model.outer = nn.Conv2d(16, 12, 3).double()
    model.outer.bias = model.backbone.conv3.bias  # an output: never cut
    model.stats = model.backbone.bn1
    spliced = fxprune.splice(model, "backbone", prune(model.backbone, ignore=["conv1"]))
    assert spliced.backbone.conv2.out_channels < 12
    assert spliced.outer.bias is spliced.backbone.conv3.bias
    assert spliced.stats.weight is spliced.backbone.bn1.weight
    assert spliced.stats.running_mean is spliced.backbone.bn1.running_mean
    assert spliced.outer.weight is not model.outer.weight


def test_what_is_tied_and_cut_is_refused():
    model = make()
    model.stats = model.backbone.bn1
    pruned = prune(model.backbone)
    with pytest.raises(fxprune.PlanError) as caught:
        fxprune.splice(model, "backbone", pruned)
    assert "shares `backbone.bn1.weight`, which was cut or folded" in str(caught.value)
    assert caught.value.where == "`stats.weight`"
    assert "ignore=['bn1']" in caught.value.fix
    fxprune.splice(model, "backbone", prune(model.backbone, ignore=["bn1"]))

    hidden = make()
    hidden.kept = [hidden.backbone.conv1]
    with pytest.raises(fxprune.PlanError) as caught:
        fxprune.splice(hidden, "backbone", prune(hidden.backbone))
    assert caught.value.where == "an attribute of Model"


def test_what_is_tied_and_folded_is_refused():
    model = make()
    model.again = nn.Module()
    model.again.conv1 = model.backbone.conv1
    whole = prune(model.backbone, ignore=["conv1"])
    assert fxprune.splice(model, "backbone", whole).again.conv1.weight.shape == (16, 3, 3, 3)
    folded = prune(model.backbone, ignore=["conv1"], fold=True)
    with pytest.raises(fxprune.PlanError, match="cut or folded"):
        fxprune.splice(model, "backbone", folded)


def test_memory_that_is_shared_in_part_is_refused():
    model = make()
    model.alias = nn.Parameter(model.backbone.conv1.weight.detach()[:4])
    pruned = prune(model.backbone, ignore=["conv1"])
    with pytest.raises(fxprune.PlanError, match="shares memory"):
        fxprune.splice(model, "backbone", pruned)
    model.alias = nn.Parameter(model.backbone.conv1.weight.detach())
    spliced = fxprune.splice(model, "backbone", pruned)
    assert spliced.alias is spliced.backbone.conv1.weight


def test_a_file_and_a_plan_of_the_backbone(tmp_path):
    model = make()
    pruned = prune(model.backbone)
    fxprune.save(pruned, tmp_path / "backbone.safetensors")
    expected = fxprune.splice(model, "backbone", pruned)(X)
    fresh = make()
    loaded = fxprune.load(tmp_path / "backbone.safetensors", fresh.backbone)
    assert torch.equal(fxprune.splice(fresh, "backbone", loaded)(X), expected)
    plan = fxprune.Plan.from_json(pruned.plan.to_json())
    applied = fxprune.apply(fresh.backbone, plan, X)
    spliced = fxprune.splice(fresh, "backbone", applied)
    assert torch.equal(spliced(X), expected)
    fxprune.save(spliced.backbone, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "backbone.safetensors"
    ).read_bytes()


def test_a_spliced_backbone_is_pruned_further():
    model = make()
    spliced = fxprune.splice(model, "backbone", prune(model.backbone))
    more = fxprune.compile(spliced.backbone, X, budget=0.5)
    again = fxprune.splice(spliced, "backbone", more)
    assert again.backbone.conv1.out_channels < spliced.backbone.conv1.out_channels
    reference = copy.deepcopy(model)
    reference.backbone = masked(model.backbone, again.backbone.plan.to_dict())
    assert relative_error(reference(X), again(X)) <= BOUND
    assert fxprune.splice(model, "backbone", more)(X).equal(again(X))


def test_two_sub_modules_one_after_the_other():
    model = make()
    once = fxprune.splice(model, "backbone", prune(model.backbone))
    twice = fxprune.splice(once, "neck.0", prune(once.neck[0]))
    assert isinstance(twice.backbone, fxprune.PrunedModule)
    assert isinstance(twice.neck[0], fxprune.PrunedModule)


def test_wrappers_around_the_model_are_taken_off():
    model = make()
    pruned = prune(model.backbone)
    assert type(fxprune.splice(torch.compile(model), "backbone", pruned)) is Model


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("bakbone", "the nearest names are `backbone`"),
        ("neck.2", "`neck."),
        ("backbone.conv1.weight", "nearest"),
        ("neck..0", "nearest"),
        ("", "the whole model"),
    ],
)
def test_a_path_that_is_not_there(path, said):
    model = make()
    with pytest.raises(fxprune.OptionError, match=said):
        fxprune.splice(model, path, prune(model.backbone))


def test_attributes_of_the_class_are_there_too():
    class Base(Body):
        stride = 4
        names = ("p3",)

    class Told(Base):
        stride = 8

        @property
        def deep(self):
            return self.conv3

    model = make()
    torch.manual_seed(1)
    model.backbone = Told().double().eval()
    spliced = fxprune.splice(model, "backbone", prune(model.backbone))
    assert (spliced.backbone.stride, spliced.backbone.names) == (8, ("p3",))
    assert not hasattr(spliced.backbone, "deep")
    assert not any("could not be carried" in note for note in spliced.backbone.report.notes)


def test_what_is_no_path_and_no_pruned_network():
    model = make()
    with pytest.raises(fxprune.OptionTypeError, match="path is a int"):
        fxprune.splice(model, 0, prune(model.backbone))
    with pytest.raises(fxprune.OptionTypeError, match="pruned is a Body"):
        fxprune.splice(model, "backbone", model.backbone)
    with pytest.raises(fxprune.OptionTypeError, match="model is a OrderedDict"):
        fxprune.splice(model.state_dict(), "backbone", prune(model.backbone))


def test_another_architecture_is_refused():
    model, other = make(), Body(20).double().eval()
    with pytest.raises(fxprune.PlanError) as caught:
        fxprune.splice(model, "backbone", prune(other))
    assert "was not made from `backbone`, a Body" in str(caught.value)
    assert "`conv1.weight` is (16, 3, 3, 3), not (20, 3, 3, 3)" in caught.value.where
    with pytest.raises(fxprune.PlanError) as caught:
        fxprune.splice(model, "neck", prune(model.backbone))
    assert "`conv1.weight` (16, 3, 3, 3) is missing" in caught.value.where
    spliced = fxprune.splice(model, "backbone", prune(model.backbone))
    with pytest.raises(fxprune.PlanError, match="was not made from"):
        fxprune.splice(spliced, "backbone", prune(other))


def test_a_place_inside_a_pruned_network_is_refused():
    model = make()
    spliced = fxprune.splice(model, "backbone", prune(model.backbone))
    pruned = prune(make().backbone)
    with pytest.raises(fxprune.PlanError, match="lies inside a pruned network"):
        fxprune.splice(spliced, "backbone.conv1", pruned)
    with pytest.raises(fxprune.PlanError, match="lies inside a pruned network"):
        fxprune.splice(pruned, "conv1", pruned)


def test_a_model_that_cannot_be_copied():
    class Stubborn(Model):
        def __deepcopy__(self, memo):
            raise RuntimeError("never")

    model = Stubborn().double().eval()
    with pytest.raises(fxprune.UnsupportedOpError, match="Stubborn cannot be copied: never"):
        fxprune.splice(model, "backbone", prune(model.backbone))
