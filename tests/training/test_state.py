"""Interrupted and resumed, a training is bit for bit the one that ran through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxprune
from fxprune import fit, zoo
from fxprune.checkpoint import read_tensors, write_tensors
from fxprune.errors import CheckpointError, FxPruneError
from fxprune.fit import Recipe, train

RECIPE = Recipe(epochs=4, lr=0.05, warmup=1, clip_norm=1.0)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Noisy(Dataset):
    """Pictures that are augmented from the global random state, as torchvision does it."""

    def __len__(self):
        return 44

    def __getitem__(self, index):
        x = torch.linspace(0, index, 3 * 6 * 6).sin().reshape(3, 6, 6)
        return x + 0.1 * torch.randn(3, 6, 6), index % 2


def loader(workers=0):
    """Five batches: four of nine and one of eight."""
    g = torch.Generator().manual_seed(5)
    return DataLoader(Noisy(), batch_size=9, shuffle=True, generator=g, num_workers=workers)


class Net(nn.Module):
    """Batch norm, dropout, a buffer that no state_dict has, and a hook for mischief."""

    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.mischief = lambda call: None

    def forward(self, x):
        self.calls += 1
        self.mischief(int(self.calls))
        x = nn.functional.dropout(self.bn(self.conv(x)).relu().mean((2, 3)), 0.2, self.training)
        return self.linear(x)


def everything(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(a, b):
    return all(torch.equal(value, everything(b)[key]) for key, value in everything(a).items())


@pytest.fixture(scope="module")
def straight():
    """The training without interruption."""
    torch.set_num_threads(1)
    model = Net()
    return model, train(model, loader(), RECIPE, progress=False, evaluate=score)


def score(model):
    """The sum of the weights; draws, as an evaluation may."""
    torch.rand(3)
    return model.linear.weight.sum().item()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_state import *

torch.set_num_threads(1)
kill = lambda epoch, loss: os.kill(os.getpid(), signal.SIGKILL) if epoch == 2 else None
train(Net(), loader(), RECIPE, progress=False, evaluate=score, checkpoint=sys.argv[1], on_epoch=kill)
"""


def test_killed_and_resumed_is_bit_identical(straight, tmp_path):
    path = tmp_path / "run.safetensors"
    words = [sys.executable, "-c", KILLED, str(path), os.path.dirname(__file__)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    model, seen = Net(), []
    again = train(
        model,
        loader(),
        RECIPE,
        progress=False,
        evaluate=score,
        checkpoint=path,
        on_epoch=lambda epoch, loss: seen.append(epoch),
    )
    assert seen == [3, 4]
    assert same(model, straight[0])
    assert again == straight[1]
    assert again.scores == straight[1].scores


@pytest.mark.parametrize("call", [1, 3, 5, 6, 14, 20], ids=lambda n: f"step{n}")
def test_ctrl_c_finishes_its_step_and_training_goes_on_there(straight, tmp_path, call):
    path, model = tmp_path / "run.safetensors", Net()

    def press(number):
        if number == call:
            os.kill(os.getpid(), signal.SIGINT)

    model.mischief = press
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(), RECIPE, progress=False, evaluate=score, checkpoint=path)
    header, _ = read_tensors(path)
    assert 5 * header["epoch"] + header["step"] == call
    assert int(model.calls) == call
    again = Net()
    history = train(again, loader(), RECIPE, progress=False, evaluate=score, checkpoint=path)
    assert same(again, straight[0])
    assert (history, history.scores) == (straight[1], straight[1].scores)


def test_interrupted_again_and_again(straight, tmp_path):
    path, stops = tmp_path / "run.safetensors", 0
    for _ in range(30):
        model, first = Net(), []

        def press(number, first=first):
            first.append(number)
            if len(first) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        model.mischief = press
        try:
            train(model, loader(), RECIPE, progress=False, evaluate=score, checkpoint=path)
        except KeyboardInterrupt:
            stops += 1
        else:
            break
    assert stops == 6
    assert same(model, straight[0])


def test_an_interruption_between_two_steps(straight, tmp_path):
    """In the loader, in the evaluation, in a callback: what is done is whole, and saved."""

    class Stubborn(DataLoader):
        left = 8

        def __iter__(self):
            for batch in super().__iter__():
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt
                yield batch

    g = torch.Generator().manual_seed(5)
    path = tmp_path / "run.safetensors"
    stubborn = Stubborn(Noisy(), batch_size=9, shuffle=True, generator=g)
    with pytest.raises(KeyboardInterrupt):
        train(Net(), stubborn, RECIPE, progress=False, evaluate=score, checkpoint=path)
    assert (read_tensors(path)[0]["epoch"], read_tensors(path)[0]["step"]) == (1, 2)

    def during_evaluation(model):
        if int(model.calls) == 15:
            torch.rand(7)
            os.kill(os.getpid(), signal.SIGINT)
        return score(model)

    with pytest.raises(KeyboardInterrupt):
        train(Net(), loader(), RECIPE, progress=False, evaluate=during_evaluation, checkpoint=path)
    assert (read_tensors(path)[0]["epoch"], read_tensors(path)[0]["step"]) == (2, 5)

    def in_callback(epoch, loss):
        raise KeyboardInterrupt

    options = {"progress": False, "evaluate": score, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        train(Net(), loader(), RECIPE, on_epoch=in_callback, **options)
    assert (read_tensors(path)[0]["epoch"], read_tensors(path)[0]["step"]) == (3, 0)
    model = Net()
    train(model, loader(), RECIPE, **options)
    assert same(model, straight[0])


def test_half_a_step_is_not_saved(straight, tmp_path):
    path, model = tmp_path / "run.safetensors", Net()

    def twice(number):
        if number == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the second one does not wait")

    model.mischief = twice
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(), RECIPE, progress=False, evaluate=score, checkpoint=path)
    assert (read_tensors(path)[0]["epoch"], read_tensors(path)[0]["step"]) == (1, 0)
    again = Net()
    train(again, loader(), RECIPE, progress=False, evaluate=score, checkpoint=path)
    assert same(again, straight[0])


def test_sigterm_reaches_the_handler_of_before(tmp_path):
    received, model = [], Net()

    def press(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    model.mischief = press
    mine = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            train(model, loader(), RECIPE, progress=False, checkpoint=tmp_path / "a.safetensors")
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM).__name__ == "<lambda>"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, mine)
    assert read_tensors(tmp_path / "a.safetensors")[0]["step"] == 2


def test_without_a_checkpoint_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []
    model = Net()
    model.mischief = lambda number: seen.append(signal.getsignal(signal.SIGINT))
    train(model, loader(), Recipe(epochs=1), progress=False)
    assert set(seen) == {before}


def test_resumed_with_workers(straight, tmp_path):
    """Workers draw from states of their own, which follow from the loader's generator."""
    recipe, path = Recipe(epochs=2), tmp_path / "run.safetensors"
    whole, model = Net(), Net()
    losses = train(whole, loader(workers=1), recipe, progress=False)

    def press(number):
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)

    model.mischief = press
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(workers=1), recipe, progress=False, checkpoint=path)
    again = Net()
    assert train(again, loader(workers=1), recipe, progress=False, checkpoint=path) == losses
    assert same(again, whole)


@pytest.mark.parametrize("options", [{"channels_last": True}, {"amp": "bf16"}, {"momentum": 0.0}])
def test_other_recipes_resume_too(tmp_path, options):
    recipe, path = Recipe(epochs=2, **options), tmp_path / "run.safetensors"
    whole, model, again = Net(), Net(), Net()
    train(whole, loader(), recipe, progress=False)

    def press(number):
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)

    model.mischief = press
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(), recipe, progress=False, checkpoint=path)
    train(again, loader(), recipe, progress=False, checkpoint=path)
    assert same(again, whole)


def test_one_that_is_complete_trains_nothing_and_resume_false_begins_anew(straight, tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"progress": False, "evaluate": score, "checkpoint": path}
    history = train(Net(), loader(), RECIPE, **options)
    assert history == straight[1]
    model = Net()
    model.mischief = lambda number: pytest.fail("it trains")
    assert train(model, loader(), RECIPE, **options) == history
    assert same(model, straight[0])
    model = Net()
    seen = []
    model.mischief = seen.append
    assert train(model, loader(), RECIPE, resume=False, **options) == history
    assert len(seen) == 20


def test_saving_twice_gives_the_same_bytes(straight, tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        train(Net(), loader(), Recipe(epochs=1), progress=False, checkpoint=path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.safetensors"
    train(Net(), loader(), Recipe(epochs=1), progress=False, checkpoint=path)
    return path


def frozen(model):
    model.conv.weight.requires_grad_(False)
    return model


def shorter():
    return [next(iter(loader()))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": Recipe(epochs=2)}, "Recipe.epochs was 1 and is 2"),
        ({"recipe": Recipe(epochs=1, seed=1, lr=1.0)}, "Recipe.lr was 0.1 and is 1.0; Recipe.seed"),
        (
            {"model": lambda: Net(5)},
            "the model's `conv.weight` was float32 [4, 3, 3, 3] and is float32 [5, 3, 3, 3]",
        ),
        ({"model": lambda: Net().double()}, "was float32 [4, 3, 3, 3] and is float64"),
        (
            {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 2))},
            "the model's `1.weight` was absent and is float32 [2, 108]",
        ),
        ({"model": lambda: frozen(Net())}, "the parameter `conv.weight` was trained and is frozen"),
        ({"loader": shorter}, "the loader had 5 batches and has 1"),
    ],
    ids=["epochs", "two", "shape", "dtype", "names", "frozen", "loader"],
)
def test_another_training_is_refused(saved, change, said):
    model = change.get("model", Net)()
    before = {key: value.clone() for key, value in everything(model).items()}
    old = saved.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        train(
            model,
            change.get("loader", loader)(),
            change.get("recipe", Recipe(epochs=1)),
            progress=False,
            checkpoint=saved,
        )
    assert said in str(caught.value)
    assert "is no checkpoint of this training" in str(caught.value)
    assert "resume=False" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in everything(model).items())
    assert saved.read_bytes() == old


def test_many_differences_are_counted(saved):
    with pytest.raises(CheckpointError, match="; and 6 more"):
        train(Net(5), loader(), Recipe(epochs=2, lr=1.0), progress=False, checkpoint=saved)


def test_other_files_are_refused(saved, tmp_path):
    def attempt(path):
        with pytest.raises(CheckpointError) as caught:
            train(Net(), loader(), Recipe(epochs=1), progress=False, checkpoint=path)
        return str(caught.value)

    pruned = fxprune.compile(zoo.build("resnet20"), torch.randn(1, 3, 8, 8), progress=False)
    network = tmp_path / "net.safetensors"
    fxprune.save(pruned, network)
    assert "it holds no training, but a pruned network" in attempt(network)
    write_tensors(network, {}, {"kind": "something"})
    assert "it holds no training\n" in attempt(network)
    data = bytearray(saved.read_bytes())
    data[-3] ^= 1
    saved.write_bytes(data)
    assert "SHA-256" in attempt(saved)
    assert "resume=False" in attempt(saved)
    saved.write_bytes(data[:-100])
    assert "truncated" in attempt(saved)
    assert "cannot read" in attempt(tmp_path)


def test_a_path_that_cannot_be_written_shows_before_training(tmp_path):
    model = Net()
    model.mischief = lambda number: pytest.fail("it trains")
    with pytest.raises(CheckpointError, match="does not exist"):
        train(
            model,
            loader(),
            Recipe(epochs=1),
            progress=False,
            checkpoint=tmp_path / "no" / "run.safetensors",
        )


def test_an_error_keeps_the_file_and_gives_the_model_back(saved):
    path = saved.with_name("other.safetensors")

    def fail(epoch, loss):
        if epoch == 2:
            raise FxPruneError("mine")

    model, before = Net(), Net()
    with pytest.raises(FxPruneError, match="mine"):
        train(model, loader(), RECIPE, progress=False, checkpoint=path, on_epoch=fail)
    assert same(model, before)
    assert read_tensors(path)[0]["epoch"] == 2


def test_a_resumed_run_counts_from_where_it_goes_on(saved, tmp_path, capsys):
    path, model = tmp_path / "b.safetensors", Net()

    def press(number):
        if number == 17:
            os.kill(os.getpid(), signal.SIGINT)

    model.mischief = press
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(), RECIPE, progress="log", checkpoint=path)
    assert capsys.readouterr().err.count("epoch") == 3
    fit.train(Net(), loader(), RECIPE, progress="log", checkpoint=path)
    assert "epoch 4 of 4" in capsys.readouterr().err


def test_scores_that_are_not_finite(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    batches = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))]
    scores = iter([0.5, float("nan"), float("inf")])
    words = {"evaluate": lambda _: next(scores), "checkpoint": tmp_path / "c", "progress": False}
    train(model, batches, Recipe(epochs=3), **words)
    assert read_tensors(tmp_path / "c")[0]["scores"] == [0.5, None, None]
    known = train(model, batches, Recipe(epochs=3), **words).scores
    assert known[0] == 0.5
    assert all(score != score for score in known[1:])
