"""The ledger: complete, computed from records, resumable, and readable."""

import json
import math

import pytest
import torch
import tyro

from normlab import networks
from normlab.bench import choice
from normlab.bench.plan import Plan
from normlab.bench.recipe import Condition, Recipe
from normlab.bench.records import Record, Store
from normlab.claims import binary_networks, ic, ledger, optimization
from normlab.claims.claim import Claim, Paper
from normlab.claims.experiments import EXPERIMENTS, GPU, command, options, seeds
from normlab.claims.places import folder
from normlab.claims.protocols import Across, Arms, Compared, Measured
from normlab.claims.rules import Correlated, Exact, Greater
from normlab.cli import main, split_lists
from normlab.commands.compare import Compare
from normlab.data import ImageData

PAPER = Paper("mine", "A title", "Someone", 2020, "2000.00000")


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMLAB_RECORDS_DIR", str(tmp_path / "records"))
    return tmp_path / "records"


def claim(measure, **more):
    protocol = Measured(measure, {"smoke": 2, "cpu": 3}, {"smoke": "little", "cpu": "more"})
    given = {"rule": Exact("d", 0.5), **more}
    return Claim("one", PAPER, "Says so.", "much", "large", protocol, **given)


def test_every_claim_states_what_it_must():
    found = ledger()
    assert len(found) >= 30
    for one in found.values():
        assert one.sentence.endswith(".")
        assert one.reported
        assert one.original
        assert one.rule.text()
        assert one.protocol.seeds("smoke") > 0
        assert one.protocol.text("cpu")
        assert one.paper.arxiv
        assert one.judge("gpu").verdict in ("not testable here", "open")


def test_a_verdict_needs_all_observations(records):
    calls = []

    def measure(scale, seed):
        calls.append((scale, seed))
        if len(calls) == 2:
            raise RuntimeError("cut off")
        return {"d": seed / 10}

    one = claim(measure)
    assert one.judge("cpu").verdict == "open"
    with pytest.raises(RuntimeError):
        one.protocol.run(one, "cpu", lambda text: None)
    assert (one.judge("cpu").verdict, one.judge("cpu").n) == ("open", 1)
    one.protocol.run(one, "cpu", lambda text: None)
    assert calls == [("cpu", 0), ("cpu", 1), ("cpu", 1), ("cpu", 2)]  # nothing twice
    judged = one.judge("cpu")
    assert (judged.verdict, judged.n, judged.effect) == ("reproduced", 3, 0.2)
    assert judged.records == ("claims/mine/one.cpu.jsonl",)
    assert one.judge("smoke").verdict == "open"
    line = json.loads((records / "claims/mine/one.cpu.jsonl").read_text().splitlines()[0])
    assert {"claim", "version", "seed", "values", "environment", "created"} <= set(line)


def test_records_are_not_trusted(records):
    one = claim(lambda scale, seed: {"d": 0.0})
    one.protocol.run(one, "cpu", lambda text: None)
    path = records / "claims/mine/one.cpu.jsonl"
    good = path.read_text()
    wrong = [{"seed": "x", "version": 1, "values": {}},
             {"seed": 99, "version": 1, "values": {"d": 9}},
             {"seed": True, "version": 1, "values": {"d": 9}},
             {"seed": 1, "version": 1, "values": {}},
             {"seed": 1, "version": 1, "values": {"d": None}},
             {"seed": 1, "version": 1, "values": {"d": 10**400}}]  # fmt: skip
    path.write_text(good + "\n".join(["torn {", "[1]", *map(json.dumps, wrong)]))
    assert one.judge("cpu").verdict == "reproduced"
    path.write_text(good.replace('"d": 0.0', '"d": "nan"'))
    assert one.judge("cpu").verdict == "contradicted"  # a law that gives nan does not hold
    path.write_text(good.replace('"version": 1', '"version": 0'))
    assert one.judge("cpu").verdict == "open"  # another protocol's


@pytest.fixture
def tiny(monkeypatch):
    """A comparison of seconds."""
    monkeypatch.setitem(EXPERIMENTS, "tiny", (
        "Tiny", "--normalizers none batch --network mlp --epochs 0.1 --tune-epochs 0.1 --lrs 0.1 "
        "--points 1 --train-limit 100 --seeds 2",
    ))  # fmt: skip


def test_comparisons_are_read_from_their_store(records, capsys, monkeypatch, tiny):
    protocol = Compared("tiny", lambda arms: {"d": arms("batch", "b64-n64-iid")
                                              - arms("none", "b64-n64-iid")})  # fmt: skip
    one = Claim("two", PAPER, "Says so.", "much", "large", protocol, Greater("d"))
    assert protocol.seeds("cpu") == 2
    assert protocol.seeds("gpu") == 0
    assert one.judge("cpu").verdict == "open"
    protocol.run(one, "cpu", lambda text: None)
    assert capsys.readouterr().out == ""  # --json prints JSON alone
    monkeypatch.setattr("normlab.cli.main", None)
    protocol.run(one, "cpu", lambda text: None)  # nothing is missing
    judged = one.judge("cpu")
    assert judged.n == 2
    assert len(judged.records) == 4  # two arms, two seeds
    assert all((records / name).is_file() for name in judged.records)
    stored = json.loads((records / "tiny" / "comparison.json").read_text())
    means = {a["normalizer"]: a["accuracy"]["mean"] for a in stored["arms"]}
    assert judged.effect == pytest.approx(100 * (means["batch"] - means["none"]))
    along = Compared("tiny", lambda arms: {"d": arms.along("batch", "b64-n64-iid")[-1]})
    last = next(a["curves"] for a in stored["arms"] if a["normalizer"] == "batch")
    found = [o.values["d"] for o in along.read(one, "cpu")]
    assert found == pytest.approx([100 * c["valid_accuracy"][-1] for c in last])


def written(folder, accuracies):
    """Records of a comparison of two normalizers, by hand: accuracies of two seeds each."""
    store, recipe = Store(folder), Recipe(lrs=(0.1,))
    plan = Plan("fashion-mini", "-", "mlp", tuple(accuracies), "batch", (Condition(),), (0, 1),
                recipe)  # fmt: skip
    plan.save(store)
    for normalizer, condition in plan.arms():
        for spec in plan.finals(normalizer, condition, 0.1):
            store.append(spec.id, {"event": "start", "spec": spec.as_dict()})
            end = {"outcome": "finished", "test_accuracy": accuracies[normalizer][spec.seed]}
            store.append(spec.id, {"event": "end", **end})


TINY = {"none": (0.25, 0.5), "batch": (0.5, 1.0)}


def test_a_comparisons_records_are_read_once(records, monkeypatch, tiny):
    written(records / "tiny", TINY)
    effect = Compared("tiny", lambda arms: {"d": arms("batch", "b64-n64-iid")})
    one = Claim("two", PAPER, "Says so.", "much", "large", effect, Greater("d"))
    read, seen = Store.read, []

    def count(self, run_id):
        seen.append(run_id)
        return read(self, run_id)

    monkeypatch.setattr(Store, "read", count)
    assert one.judge("cpu") == one.judge("cpu")
    assert len(seen) == len(set(seen)) == 4
    assert one.judge("cpu").effect == 75
    path = records / one.judge("cpu").records[0]
    path.write_text(path.read_text().replace('"test_accuracy": 0.5', '"test_accuracy": 0.75'))
    assert one.judge("cpu").effect == 87.5  # what has changed is read again


def test_arms_as_repetitions(records, tiny):
    compared = Compared(
        "tiny", lambda arms: {name: arms(name, "b64-n64-iid") for name in ("none", "batch")}
    )
    start = Measured(lambda scale, place: {"start": place}, {"cpu": 2}, {"cpu": "places"},
                     gives=frozenset({"start"}))  # fmt: skip
    protocol = Across(compared, start, ("none", "batch"), "reached")
    rule = Correlated("start", "reached")
    one = Claim("three", PAPER, "Says so.", "much", "large", protocol, rule)
    assert (protocol.seeds("cpu"), protocol.seeds("gpu"), protocol.text("gpu")) == (2, 0, "")
    assert one.judge("cpu").verdict == "open"
    start.run(one, "cpu", lambda text: None)
    assert one.judge("cpu").n == 0  # the comparison's part is missing
    written(records / "tiny", TINY)
    protocol.run(one, "cpu", lambda text: None)  # nothing is
    found = [seen.values for seen in protocol.read(one, "cpu")]
    assert found == [{"start": 0, "reached": 37.5}, {"start": 1, "reached": 75}]
    assert "claims/mine/three.cpu.jsonl" in one.judge("cpu").records


def test_one_bit_networks_are_read_from_their_store(records):
    one = binary_networks.CLAIMS[0]
    assert one.judge("cpu").verdict == "open"
    store = Store(records / "binary-fashion-mini")
    for arm, seed, accuracy in [("batch", 0, 0.8), ("norm_free", 0, 0.7), ("batch", 1, 0.9),
                                ("norm_free", True, 0.5), ("norm_free", 2, 0.5)]:  # fmt: skip
        for line in (
            {"event": "start", "spec": {"arm": arm, "seed": seed, "purpose": "test"}},
            {"event": "end", "outcome": "finished", "test_accuracy": accuracy},
        ):
            store.append(f"test-{arm}-{seed}", line)
    (found,) = one.protocol.read(one, "cpu")  # the one seed that both arms have
    assert (found.seed, found.values["difference"]) == (0, pytest.approx(-10))


def test_falls_are_summed():
    assert ic._falls([10, 30, 25, 26, 20]) == 11


def test_experiments(tiny):
    assert seeds("fashion-mini-sharing", "cpu") == 3
    assert seeds("fashion-mini-sharing", "smoke") == 1
    assert options("tiny", "gpu") is None
    assert command("fashion-mini-ic", "/x")[-4:-1] == ["--out", "/x", "--title"]
    with pytest.raises(ValueError, match="'gpu'"):
        command("tiny", "/x", "gpu")


def run(outcome, *points, accuracy=0.5):
    """The record of a final run that measured those validation accuracies on its way."""
    return Record(
        "a-run", {"recipe": {"points": 4}}, {},
        points=[{"valid_accuracy": value} for value in points],
        end={"outcome": outcome, "test_accuracy": accuracy},
    )  # fmt: skip


def test_arms():
    arms = Arms({("a", "c"): run("finished", 0.25, "x", 0.5)}, 0)
    assert arms("a", "c") == 50
    assert arms.along("a", "c") == [25, 50]
    assert list(arms.asked) == ["a-run"]
    with pytest.raises(KeyError):
        arms.along("b", "c")
    with pytest.raises(KeyError):
        Arms({("a", "c"): run("finished", accuracy="x")}, 0)("a", "c")
    diverged = Arms({("a", "c"): run("diverged", 0.25, accuracy=0.1)}, 0)
    assert diverged.along("a", "c") == [25, 10, 10, 10]  # it guesses from there on


@pytest.mark.parametrize("effect", [optimization._noisy, ic._speed, ic._stability])
@pytest.mark.parametrize("points", [(), ("x", None)])
def test_runs_without_a_number_along_the_way_have_not_ended(effect, points):
    arms = dict.fromkeys(("noisy_batch", "batch", "ic"), run("finished", *points))
    with pytest.raises(KeyError):
        effect(Arms({(name, "b64-n64-iid"): one for name, one in arms.items()}, 0))


def planned(words):
    """What a command line of ``normlab compare`` asks for."""
    return tyro.cli(Compare, args=split_lists(words)[1:])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_comparison_has_a_plan_at_the_gpu_scale(name, monkeypatch):
    """The command line, read with a stand-in for CIFAR-10; networks are built for its images."""
    labels = torch.arange(100) % 10
    blank = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    data = ImageData("cifar10", "CIFAR-10", blank, labels, blank, labels, tuple("abcdefghij"))
    asked = planned(command(name, "unused", "gpu"))
    assert (asked.data, asked.device, asked.seeds) == ("cifar10", "cuda", seeds(name, "gpu"))
    monkeypatch.setattr("normlab.data.load", lambda *found, **options: data)
    plan = asked.plan()
    small = planned(command(name, "unused"))
    assert plan.normalizers == small.normalizers
    assert plan.conditions == small.conditions()  # claims ask for their arms by these names
    assert plan.recipe.epochs > small.epochs
    with torch.device("meta"):
        for normalizer in plan.normalizers:
            factory = choice.parse(normalizer).factory(1000)
            networks.build(plan.network, factory, classes=10, image_shape=(3, 32, 32))


def test_without_a_gpu_nothing_is_testable_there(records, capsys, monkeypatch, tiny):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["claims", "run", "ic", "--scale", "gpu", "--json"]) == 0
    said = capsys.readouterr()
    rows = {row["id"]: row for row in json.loads(said.out)}
    assert {row["verdict"] for row in rows.values()} == {"not testable here"}
    assert "torch finds no GPU here" in rows["ic/limit"]["why"]
    assert rows["ic/correlation"]["why"] == "the protocol has no gpu scale"
    assert "ic/limit is not testable here: torch finds no GPU" in said.err
    # Records of another machine decide without one.
    monkeypatch.setitem(GPU, "tiny", "")
    effect = Compared("tiny", lambda arms: {"d": arms("batch", "b64-n64-iid")})
    one = Claim("two", PAPER, "Says so.", "much", "large", effect, Greater("d"))
    monkeypatch.setattr("normlab.claims.experiments._ON_GPU", "")
    assert one.judge("gpu").verdict == "not testable here"
    written(records / "cifar10-tiny", TINY)
    assert one.judge("gpu").effect == 75
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ledger()["ic/limit"].judge("gpu").verdict == "open"


def test_records_are_those_of_the_protocol(monkeypatch):
    """What lies in a comparison's folder was made with the options that the ledger shows."""
    monkeypatch.delenv("NORMLAB_RECORDS_DIR")
    found = 0
    for name in EXPERIMENTS:
        store = folder() / name
        if (store / "plan.json").is_file():
            plan, asked = Plan.load(Store(store)), planned(command(name, "unused"))
            assert plan.normalizers == asked.normalizers, name
            assert plan.conditions == asked.conditions(), name
            assert (plan.network, plan.data) == (asked.network, asked.data), name
            assert plan.recipe == asked.recipe(), name
            assert len(plan.seeds) >= asked.seeds, name
            found += 1
    assert found or not (folder() / "claims").is_dir()


def test_command_line(capsys, tmp_path):
    assert main(["claims", "list", "ic", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"id", "paper", "sentence", "scale", "verdict", "effect", "interval", "n"} <= set(
        rows[0]
    )
    assert {r["verdict"] for r in rows} == {"open"}
    assert main(["claims", "run", "ic/correlation", "renorm/identity"]) == 0
    assert "reproduced" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["claims", "report", "--out", str(page)]) == 0
    text = page.read_text()
    assert "ic/correlation" in text
    assert "2 reproduced" in text
    assert "<svg" in text
    assert main(["claims", "list", "ic/correlatoin"]) == 1
    assert "did you mean ic/correlation" in capsys.readouterr().err


def test_a_failing_protocol_costs_no_other(capsys, monkeypatch):
    from normlab.claims import ic

    def fails(self, claim, scale, progress):
        if claim.name == "information":
            raise RuntimeError("broken")

    monkeypatch.setattr(type(ic.CLAIMS[0].protocol), "run", fails)
    assert main(["claims", "run", "ic/information", "ic/correlation"]) == 1
    assert "ic/information failed: RuntimeError: broken" in capsys.readouterr().err


def test_a_torn_line_costs_itself_alone(records):
    one = claim(lambda scale, seed: {"d": 0.0})
    one.protocol.run(one, "cpu", lambda text: None)
    path = records / "claims/mine/one.cpu.jsonl"
    path.write_text(path.read_text()[:-40])  # cut off in the middle of the last line
    assert one.judge("cpu").n == 2
    one.protocol.run(one, "cpu", lambda text: None)
    assert one.judge("cpu").n == 3


def test_interrupted_runs_keep_what_is_done(capsys, monkeypatch):
    import normlab.claims as claims

    def measure(scale, seed):
        if seed == 2:
            raise KeyboardInterrupt
        return {"d": 0.0}

    one = claim(measure)
    monkeypatch.setattr(claims, "ledger", lambda: {one.id: one})
    assert main(["claims", "run"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert one.judge("cpu").n == 2


@pytest.mark.parametrize(
    "one", [c for c in ledger().values() if isinstance(c.protocol, Measured)], ids=lambda c: c.id
)
def test_every_measurement_runs(one, capfd):
    """The smoke scale: seconds each, nothing but JSON on stdout, and every number is finite."""
    one.protocol.run(one, "smoke", lambda text: None)
    assert capfd.readouterr().out == ""
    found = one.protocol.read(one, "smoke")
    assert len(found) == one.protocol.seeds("smoke")
    assert all(math.isfinite(v) for seen in found for v in seen.values.values())
    # One repetition of a measurement decides nothing; of a law, everything.
    if isinstance(one.rule, Exact):
        assert one.judge("smoke").verdict == "reproduced"


def test_comparisons_name_their_arms():
    """Every effect finds the arms that it asks for in the plan of its comparison."""

    class Asked(Arms):
        def __call__(self, normalizer, condition):
            asked.add((normalizer, condition))
            return float(len(asked))

        def along(self, normalizer, condition, key=None):
            return [self(normalizer, condition)] * 2

    for one in ledger().values():
        protocol = getattr(one.protocol, "compared", one.protocol)
        if isinstance(protocol, Compared):
            asked = set()
            protocol.effect(Asked({}, 0))
            wanted = planned(command(protocol.experiment, "unused"))
            conditions = {condition.id for condition in wanted.conditions()}
            assert asked
            assert {n for n, _ in asked} <= set(wanted.normalizers), one.id
            assert {c for _, c in asked} <= conditions, one.id


def test_json_of_what_is_not_finite(capsys, monkeypatch, tmp_path):
    import normlab.claims as claims

    one = claim(lambda scale, seed: {"d": float("nan")})
    one.protocol.run(one, "cpu", lambda text: None)
    monkeypatch.setattr(claims, "ledger", lambda: {one.id: one})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert main(["claims", "list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (row["verdict"], row["effect"]) == ("contradicted", "inf")
    assert main(["claims", "list"]) == 0
    assert main(["claims", "report", "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    ("kind", "name", "n"),
    [(Measured, "kalman/mixture", 2), (Compared, "filter_response/one-sample", 1),
     (binary_networks.TwoStages, "binary/needs-its-parts", 2)],
)  # fmt: skip
def test_each_kind_of_protocol_runs_at_smoke_scale(kind, name, n, capfd):
    """One stands for its kind, and prints JSON alone, from worker processes too."""
    assert isinstance(ledger()[name].protocol, kind)
    assert main(["claims", "run", name, "--scale", "smoke", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert row["n"] == n
    assert row["verdict"] == "reproduced" or row["undecided"]  # a seed or two decide nothing
