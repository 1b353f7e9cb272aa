"""The command line, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from normlab.cli import main

SMALL = [
    "compare",
    "--normalizers", "none", "batch",
    "--network", "cnn:depth=2,width=4",
    "--train-limit", "200",
    "--batch-size", "20",
    "--epochs", "1",
    "--lrs", "0.05", "0.1",
    "--seeds", "2",
]  # fmt: skip


def normlab(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "normlab.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    done = normlab(*SMALL, "--condition", "20", "2:class", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_compare_writes_records_a_comparison_and_a_page(compared):
    out, comparison = compared
    assert comparison["complete"]
    assert comparison["runs_done"] == 2 * 2 * (2 + 2)
    assert len(list((out / "runs").glob("*.jsonl"))) == 16
    assert not list((out / "runs").glob("*.ckpt"))
    assert json.loads((out / "comparison.json").read_text()) == comparison
    page = (out / "report.html").read_text()
    assert "Fashion-MNIST" in page
    assert comparison["baseline"] == "batch"
    assert all(arm["n"] == 2 for arm in comparison["arms"])
    assert comparison["data"]["train"] == 180


def test_lists_may_be_given_with_commas(compared):
    out, _ = compared
    words = ["compare", "--normalizers", "none,batch", *SMALL[4:], "--norm-batch", "20,2"]
    words[words.index("0.05") : words.index("0.05") + 2] = ["0.05,0.1"]
    done = normlab(*words, "--composition", "iid,class", "--out", str(out) + "-lists", "--json")
    assert done.returncode == 0, done.stderr
    found = [c["id"] for c in json.loads(done.stdout)["conditions"]]
    assert found == ["b20-n20-iid", "b20-n2-iid", "b20-n2-class"]


def test_the_same_command_repeats_nothing(compared, tmp_path):
    out, _ = compared
    before = {p.name: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    again = normlab(*SMALL, "--condition", "20", "2:class", "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert "16 of 16 runs are on record already" in again.stdout
    assert {p.name: p.stat().st_mtime_ns for p in (out / "runs").iterdir()} == before


def test_one_more_normalizer_reuses_the_runs_that_are_there(compared, tmp_path):
    import shutil

    out = tmp_path / "more"
    shutil.copytree(compared[0], out)
    arguments = [*SMALL[:3], "layer", *SMALL[3:], "--condition", "20", "2:class"]
    done = normlab(*arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "16 of 24 runs are on record already" in done.stdout


def test_report_writes_the_page_again(compared, capsys):
    out, comparison = compared
    (out / "report.html").unlink()
    assert main(["report", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["arms"] == comparison["arms"]
    assert (out / "report.html").exists()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def heed_signals():
    """Undo what a shell does to the programs that it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(out):
    """A comparison in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "normlab.cli", *SMALL, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def group_alive(group):
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def ended(out):
    """Records that have their last line."""
    runs = (out / "runs").glob("*.jsonl")
    return {p.name: p.read_text() for p in runs if '"event": "end"' in p.read_text()}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", ["kill", "interrupt", "terminate"])
def test_a_stopped_comparison_goes_on_and_repeats_nothing(tmp_path, how):
    out = tmp_path / "out"
    process = start(out)
    wait_for(lambda: len(ended(out)) >= 2)
    if how == "kill":
        process.kill()
        process.communicate(timeout=60)
    else:
        os.killpg(process.pid, signal.SIGINT if how == "interrupt" else signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "goes on from here" in stderr
        assert "Traceback" not in stderr
        assert (out / "report.html").exists()
    wait_for(lambda: not group_alive(process.pid))  # orphaned workers stop by themselves
    before = ended(out)
    assert 2 <= len(before) <= 8
    done = normlab(*SMALL, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    after = ended(out)
    assert len(after) == 8
    assert all(after[name] == text for name, text in before.items())
    assert json.loads(done.stdout)["complete"]


def test_two_comparisons_do_not_write_to_one_folder(tmp_path):
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        done = normlab(*SMALL, "--out", str(out))
    assert done.returncode == 1
    assert "another comparison is writing" in done.stderr


def test_list_names_every_method_once(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    names = [card["name"] for card in listed]
    assert len(names) == len(set(names)) >= 17
    assert main(["list", "--site", "weight", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)
    assert main(["list"]) == 0
    assert all(name in capsys.readouterr().out for name in ["batch"])


def test_show_tells_what_the_card_says(capsys):
    assert main(["show", "batch_renorm", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["arxiv"] == "1702.03275"
    assert card["partition"] == "n c * -> c (n *)"
    assert main(["show", "filter_response"]) == 0
    text = capsys.readouterr().out
    for words in ("formula", "1911.09737", "invariances", "limits", "use when", "avoid when"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "bacth"], "Did you mean batch"),
        (["report", "nowhere"], "no plan.json"),
        (["compare", "--normalizers", "grop"], "Did you mean group"),
        (["compare", "--normalizers", "batch", "batch"], "twice"),
        (["compare", "--baseline", "layer"], "baseline"),
        (["compare", "--network", "resnet9"], "6n+2"),
        (["compare", "--data", "fashon"], "fashion"),
        (["compare", "--data", "cifar10", "--data-dir", "/nowhere"], "/nowhere"),
        (["compare", "--batch-size", "10", "--norm-batch", "3"], "divides"),
        (["compare", "--composition", "class"], "at most half"),
        (["compare", "--condition", "x:class"], "reads 8 or 8:class"),
        (["compare", "--workers", "0"], "at least 1"),
        (["compare", "--lrs", "-0.1"], "positive"),
        (["compare", "--out", "/dev/null/out"], "cannot make"),
    ],
)
def test_mistakes_are_said_in_a_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.startswith("normlab: ")


def test_a_network_of_ones_own_is_found_in_the_working_folder(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net(norm):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), norm(4), nn.ReLU(), nn.Flatten(),"
        " nn.LazyLinear(10))\n"
    )
    small = [*SMALL]
    small[small.index("--network") + 1] = "net:net"
    done = normlab(*small, "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    comparison = json.loads(done.stdout)
    assert comparison["complete"]
    assert all(arm["accuracy"] for arm in comparison["arms"])


@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda:9", "needs a GPU, and torch finds"), ("gpu", "networks train on cpu or cuda"),
     ("mps", "networks train on cpu or cuda")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_said_so(device, said, capsys, tmp_path):
    assert main([*SMALL, "--device", device, "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
