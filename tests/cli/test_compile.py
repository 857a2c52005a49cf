"""`fxprune compile`: what it writes and says, that it goes on where it was stopped, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fxprune
from fxprune import cli, data, fit, methods, zoo
from fxprune.cli import specs
from fxprune.cli.folder import opened
from fxprune.report import Report

QUICK = ("--no-latency", "--threads", "1")


def test_a_whole_run(net, document):
    found, told = document(
        "compile", net, "--data", "digits", "--epochs", "2", "--lr", "0.05", *QUICK
    )
    out = Path("fxprune-out/make-l1")
    assert found["out"] == str(out)
    assert found["command"] == "compile"
    assert sorted(path.name for path in out.iterdir()) == [
        "net.safetensors",
        "plan.json",
        "report.html",
        "report.json",
        "run.json",
    ]
    report = Report.from_json((out / "report.json").read_text())
    assert list(report.stages) == ["before", "after the cut", "recalibrated", "fine-tuned"]
    assert report.stages["fine-tuned"] > report.stages["after the cut"]
    assert report.metrics["macs_after"] <= 0.5 * report.metrics["macs_before"]
    assert found["report"] == json.loads(report.to_json())
    for stage, score in report.stages.items():
        assert f"{stage}: {100 * score:.2f} % of the test images are right" in told

    # What lies there is what the scores say, and a record of how it came about.
    loaded = fxprune.load(out / "net.safetensors", specs.build(net)).eval()
    assert fit.accuracy(loaded, data.load("digits").test) == report.stages["fine-tuned"]
    plan = fxprune.Plan.from_json((out / "plan.json").read_text())
    assert plan == loaded.plan
    assert plan.weights == "changed"
    record = json.loads((out / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["line"].startswith("fxprune compile net.py:make --data digits --epochs 2")
    assert record["settings"]["epochs"] == 2
    assert len(record["settings"]["model_sha256"]) == 64
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["scores"] == report.stages


def test_without_data_it_only_cuts(net, run):
    code, out, err = run(
        "compile", net, "--input-size", "1x1x8x8", "--budget", "params=0.6", *QUICK
    )
    assert (code, err) == (0, "")
    assert "Cut by l1, to at most 60 % of the parameters." in out
    assert "net.safetensors" in out
    assert "Score by stage" not in out
    report = Report.from_json(Path("fxprune-out/make-l1/report.json").read_text())
    assert report.asked == {"params": 0.6}
    assert report.stages == {}


def test_it_does_what_the_library_does(net, document):
    torch.manual_seed(3)
    model = specs.build(net, {"width": 8})
    save_file(model.state_dict(), "w.safetensors")
    words = ("--set", "width=8", "--weights", "w.safetensors", "--input-size", "1x1x8x8")
    options = ("--ratio", "0=0.5", "--ratio", "0.25", "--order", "largest", "--norm", "l2")
    document("compile", net, *words, *options, "--align", "2", "--fold", *QUICK)
    pruned = fxprune.compile(
        model,
        torch.zeros(1, 1, 8, 8),
        method=methods.L1(ratio={"0": 0.5, "*": 0.25}, order="largest", norm="l2"),
        align=2,
        fold=True,
    )
    written = fxprune.load("fxprune-out/make-l1/net.safetensors", specs.build(net, {"width": 8}))
    assert written.plan == pruned.plan
    for name, value in pruned.state_dict().items():
        assert torch.equal(written.state_dict()[name], value)


def test_zoo_networks_take_classes_and_channels_from_the_data(run):
    code, out, _ = run(
        *("compile", "zoo:resnet20", "--set", "width=8", "--data", "digits", "--epochs", "0"),
        *("--scope", "free", "--out", "x", *QUICK),
    )
    assert code == 0
    assert "fresh: without --weights, nothing is learnt yet" in " ".join(out.split())
    assert "fine-tuned" not in out
    assert "recalibrated" in out


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_steps_repair_and_train_after_each_cut(net, document):
    found, _ = document(
        *("compile", net, "--data", "digits", "--epochs", "1", "--steps", "2"),
        *QUICK,
    )
    assert list(found["report"]["stages"]) == [
        "before",
        "after the cut, step 1 of 2",
        "recalibrated, step 1 of 2",
        "fine-tuned, step 1 of 2",
        "after the cut, step 2 of 2",
        "recalibrated, step 2 of 2",
        "fine-tuned, step 2 of 2",
    ]
    assert not list(Path(found["out"]).glob("checkpoint*"))


def test_feature_maps_and_random_choices(net, document):
    words = ("compile", net, "--data", "digits", "--epochs", "0", "--repair", "none", *QUICK)
    by, _ = document(*words, "--by", "mean-l1", "--out", "by")
    assert list(by["report"]["stages"]) == ["before", "after the cut"]
    plans = []
    for seed in (1, 1, 2):
        out = f"random-{len(plans)}"
        document(*words, "--order", "random", "--seed", seed, "--out", out)
        plan = json.loads(Path(out, "plan.json").read_text())
        plans.append(plan["slices"])
    assert plans[0] == plans[1]


def test_latency_is_measured_in_turns(net, document):
    found, told = document(
        *("compile", net, "--input-size", "1x1x8x8", "--threads", "1"),
        *("--latency-batch", "2", "--latency-batch", "1"),
    )
    rows = found["report"]["timings"]
    assert [(r["name"], r["batch"]) for r in rows] == [
        ("original", 1),
        ("pruned", 1),
        ("original", 2),
        ("pruned", 2),
    ]
    assert all(r["p20_ms"] <= r["median_ms"] <= r["p80_ms"] for r in rows)
    assert found["report"]["environment"].startswith("1 thread of ")
    assert "batch 2: " in told


def test_export(net, document):
    found, _ = document("compile", net, "--input-size", "1x1x8x8", "--export", "pt2", *QUICK)
    program = torch.export.load(found["files"]["net.pt2"]).module()
    assert program(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# ---- folders ------------------------------------------------------------------------------------


def test_a_finished_run_is_not_replaced(net, run, document):
    words = ("compile", net, "--input-size", "1x1x8x8", *QUICK)
    first, _ = document(*words)
    before = Path(first["out"], "net.safetensors").read_bytes()

    code, out, err = run(*words, "--seed", "0")
    assert (code, out) == (1, "")
    assert "the folder fxprune-out/make-l1 is not written over" in err
    assert "it holds a finished run: fxprune compile net.py:make" in err
    assert "choose another with --out, or replace what is there with --restart" in err

    again, _ = document(*words, "--resume")  # shown, not done again
    assert again["resumed"]
    assert again["report"] == first["report"]

    code, _, err = run(*words, "--resume", "--align", "2")
    assert code == 1
    assert "with other settings: --align 1, now 2" in err

    Path(first["out"], "mine.txt").write_text("kept")
    replaced, _ = document(*words, "--restart", "--align", "2")
    assert not replaced["resumed"]
    assert Path(first["out"], "net.safetensors").read_bytes() != before
    assert Path(first["out"], "mine.txt").read_text() == "kept"


def test_files_of_unknown_origin_are_not_replaced(net, run):
    out = Path("there")
    out.mkdir()
    (out / "net.safetensors").write_text("precious")
    code, _, err = run("compile", net, "--input-size", "1x1x8x8", "--out", out, *QUICK)
    assert code == 1
    assert "it holds net.safetensors" in err
    assert (out / "net.safetensors").read_text() == "precious"


def test_other_weights_are_another_run(net, run):
    words = ("compile", net, "--weights", "w.safetensors", "--input-size", "1x1x8x8", *QUICK)
    for value, code in ((0, 0), (1, 1)):
        torch.manual_seed(value)
        save_file(specs.build(net).state_dict(), "w.safetensors")
        got, _, err = run(*words, "--resume")
        assert got == code
    assert "--weights-sha256" in err


TRAINING = ("compile", "zoo:resnet20", "--set", "width=8", "--data", "digits", "--epochs", "2")
TRAINING += ("--lr", "0.05", *QUICK)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight")
    assert cli.main([*TRAINING, "--json", "--out", str(out)]) == 0
    return out


def changed(path, process=None, than=None):
    """When a file changed, waiting until it is there, or is another than it was."""
    end = time.monotonic() + 60
    while time.monotonic() < end and (process is None or process.poll() is None):
        if path.exists() and path.stat().st_mtime_ns != than:
            return path.stat().st_mtime_ns
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


def goes_on(straight, document):
    """The same command again ends as if nothing had happened."""
    record = json.loads(Path("stopped/run.json").read_text())
    assert record["state"] == "unfinished"
    assert list(record["scores"]) == ["before", "after the cut", "recalibrated"]
    found, told = document(*TRAINING, "--out", "stopped")
    assert found["resumed"]
    assert "goes on from the checkpoint" in told
    assert "(measured before)" in told
    expected = Report.from_json((straight / "report.json").read_text())
    assert found["report"]["stages"] == expected.stages
    for name in ("net.safetensors", "plan.json"):
        assert Path("stopped", name).read_bytes() == (straight / name).read_bytes()
    assert not list(Path("stopped").glob("checkpoint*"))


CHECKPOINT = Path("stopped/checkpoint-1.safetensors")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_training_goes_on_and_ends_the_same(number, code, straight, document):
    process = subprocess.Popen(
        [sys.executable, "-m", "fxprune.cli", *TRAINING, "--out", "stopped"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    first = changed(CHECKPOINT, process)
    if number == signal.SIGKILL:
        changed(CHECKPOINT, process, than=first)  # an epoch is done
    else:
        time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Fine-tune for 2 epochs" in out or number == signal.SIGKILL
    if number == signal.SIGTERM:
        assert err == (
            "fxprune: what was done is kept in stopped: the same command goes on from there\n"
            "fxprune: stopped by SIGTERM\n"
        )
    goes_on(straight, document)


def test_ctrl_c(straight, run, document):
    def press():
        changed(CHECKPOINT)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    code, _, err = run(*TRAINING, "--out", "stopped")
    presser.join()
    assert code == 130
    assert "the same command goes on from there" in err
    assert err.endswith("fxprune: stopped by SIGINT\n")
    goes_on(straight, document)


def test_two_runs_in_one_folder(net, run):
    settings = {"model": net}
    with opened(Path("out"), "compile", [], settings, resume=None, inputs={}):
        code, _, err = run("compile", net, "--out", "out", *QUICK)
    assert code == 1
    assert "another fxprune is at work in out" in err


def test_a_run_that_failed_at_once_stands_in_nobodys_way(net, run):
    for words, code in ((["--ignore", "none.*"], 1), ([], 0)):
        got, _, err = run("compile", net, "--input-size", "1x1x8x8", *words, *QUICK)
        assert got == code, err


def test_a_damaged_record_is_told(net, run):
    Path("out").mkdir()
    Path("out/run.json").write_text("{")
    words = ("compile", net, "--input-size", "1x1x8x8", "--out", "out", *QUICK)
    code, _, err = run(*words)
    assert code == 1
    assert "its run.json cannot be read" in err
    assert run(*words, "--restart")[0] == 0


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--epochs", "2"], "--epochs needs data"),
        (["--repair", "bn"], "--repair bn needs data"),
        (
            ["--repair", "lstsq"],
            "--repair is 'lstsq'; at: --repair; because: it must be none or bn",
        ),
        (["--method", "l2"], "there is no method 'l2'"),
        (["--preset", "ResNet-56-C"], "preset is 'ResNet-56-C'"),
        (["--preset", "ResNet-56-A", "--ratio", "0.3"], "both a ratio and a preset"),
        (["--ratio", "1.5"], "ratio is 1.5"),
        (["--budget", "0.5", "--ratio", "0.5"], "both a budget and a ratio"),
        (["--budget", "ms=3"], "--budget ms=3 makes no sense"),
        (["--by", "means", "--data", "digits"], "by is 'means'"),
        (["--schedule", "linear"], "Recipe(schedule='linear') makes no sense"),
        (["--data", "digit"], "did you mean 'digits'?"),
        (["--data", "imagefolder"], "imagefolder needs a path"),
        (["--export", "tflite"], "--export is 'tflite'"),
        (["--device", "abacus"], "there is no device `abacus` here"),
        (["--input-size", "32"], "--input-size 32 makes no sense"),
        (["--weights", "none.pth"], "there is no file `none.pth`"),
        (["--ignore", "nothing.*"], "nothing.*"),
    ],
)
def test_bad_options_are_2_and_one_line(words, text, net, run):
    code, out, err = run("compile", net, *words)
    assert code == (1 if words[0] == "--ignore" else 2), err
    assert out == "" or "fxprune compile" in out
    assert err.startswith("fxprune: error: ")
    assert err.count("\n") == 1
    assert text in err
    assert not Path("fxprune-out").exists()  # a corrected command finds nothing in its way


def test_a_model_that_does_not_fit_the_data(net, run):
    code, _, err = run("compile", net, "--set", "classes=7", "--data", "digits")
    assert code == 1
    assert "this Sequential does not classify the images of digits" in err
    assert "it gives (1, 7); needed is [1, 10], a logit per class" in err
    code, _, err = run("compile", "torchvision:squeezenet1_1", "--data", "digits")
    assert code == 1
    assert "this SqueezeNet does not take the images of digits" in err
    assert "for one of 1x8x8 it raises RuntimeError" in err


def test_weights_that_do_not_fit(net, run):
    save_file(zoo.resnet20(width=8).state_dict(), "w.safetensors")
    code, _, err = run("compile", net, "--weights", "w.safetensors")
    assert code == 1
    assert (
        "the weights do not fit this Sequential; at: w.safetensors; because: missing: 0.weight"
        in err
    )


# ---- what may go wrong on the way ---------------------------------------------------------------


def test_a_changed_file_of_ratios_is_another_run(net, run):
    words = ("compile", net, "--input-size", "1x1x8x8", "--ratio", "@r.json", *QUICK)
    for share, code in ((0.5, 0), (0.25, 1)):
        Path("r.json").write_text(json.dumps({"0": share}))
        got, _, err = run(*words, "--resume")
        assert got == code, err
    assert "r.json-sha256" in err


def test_what_fails_restarted_leaves_the_old_run(net, run, document):
    words = ("compile", net, "--input-size", "1x1x8x8", *QUICK)
    first, _ = document(*words)
    out = Path(first["out"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, err = run(*words, "--restart", "--ignore", "none.*")
    assert code == 1, err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    # Killed between: what lies aside comes back with the next run.
    (out / ".replaced").mkdir()
    for name in before:
        (out / name).rename(out / ".replaced" / name)
    again, _ = document(*words, "--resume")
    assert again["resumed"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_model_that_leaves_is_an_error(run):
    Path("leaves.py").write_text("import sys\ndef make():\n    sys.exit(0)\n")
    code, _, err = run("compile", "leaves.py:make", "--input-size", "1x1x8x8", *QUICK)
    assert code == 1
    assert "`make` of leaves.py fails; at: " in err
    assert "because: SystemExit: 0" in err
    assert not Path("fxprune-out").exists()
    Path("imports.py").write_text("import sys\nsys.exit('bye')\n")
    code, _, err = run("compile", "imports.py:make", "--input-size", "1x1x8x8", *QUICK)
    assert code == 1
    assert "imports.py cannot be imported" in err


def test_sizes_differ_between_option_and_data(net, run):
    words = ("compile", net, "--data", "digits", "--epochs", "0", *QUICK)
    code, _, err = run(*words, "--input-size", "1x1x16x16")
    assert code == 2
    assert "--input-size 1x1x16x16 is not the size of the images of digits" in err
    assert "they are 1x8x8; fix: leave it out" in err
    assert run(*words, "--input-size", "2x1x8x8")[0] == 0


def test_latency_that_cannot_be_measured_is_a_note(net, document, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("not enough memory: you tried to allocate 1 TB\nmore")

    monkeypatch.setattr("fxprune.cli.results.compare", fails)
    found, told = document("compile", net, "--input-size", "1x1x8x8", "--threads", "1")
    note = (
        "latency is not measured: not enough memory: you tried to allocate 1 TB; "
        "--latency-batch chooses other sizes"
    )
    assert note in found["report"]["notes"]
    assert "latency is not measured" in told
    assert "net.safetensors" in found["files"]


def test_an_export_of_a_finished_run(net, run):
    words = ("compile", net, "--input-size", "1x1x8x8", *QUICK)
    assert run(*words)[0] == 0
    code, _, err = run(*words, "--resume", "--export", "pt2")
    assert code == 2
    assert "the finished run in fxprune-out/make-l1 has no net.pt2" in err
    assert "do all of it anew with --restart" in err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("command", None),
        ("settings", []),
        ("seconds", "abc"),
        ("seconds", float("nan")),
        ("scores", {"before": "good"}),
        ("state", 1),
        ("schema_version", 99),
    ],
)
def test_a_record_of_other_kinds_is_told(key, value, net, run):
    words = ("compile", net, "--input-size", "1x1x8x8", "--out", "out", *QUICK)
    assert run(*words)[0] == 0
    record = json.loads(Path("out/run.json").read_text())
    Path("out/run.json").write_text(json.dumps({**record, key: value}))
    code, _, err = run(*words, "--resume")
    assert code == 1
    assert "its run.json cannot be read: its" in err or key == "schema_version"
    assert "run.json cannot be read" in err


def test_stdout_is_the_document_alone_whatever_children_print():
    Path("loud.py").write_text(
        "import os, subprocess\nfrom torch import nn\n"
        "def make():\n    os.write(1, b'from C\\n')\n    print('from Python')\n"
        "    subprocess.run(['echo', 'from a child'])\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fxprune.cli", "compile", "loud.py:make"),
            *("--input-size", "1x1x8x8", "--json", *QUICK),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert json.loads(done.stdout)["command"] == "compile", done.stderr
    for words in ("from C", "from Python", "from a child"):
        assert words in done.stderr


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_models_of_other_floats_train_and_score(dtype, net, document):
    text = Path("net.py").read_text()
    text += f"\n\ndef other():\n    return make().to(torch.{dtype})\n"
    Path("net.py").write_text(text)
    words = ("--data", "digits", "--epochs", "1", "--batch-size", "256", *QUICK)
    found, _ = document("compile", "net.py:other", *words)
    assert 0 <= found["report"]["stages"]["fine-tuned"] <= 1


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_seeds_of_more_than_63_bits(seed, net, run):
    code, _, err = run("compile", net, "--seed", seed)
    assert code == 2
    assert "--seed" in err
