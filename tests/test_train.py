"""The race: fair starts, equal search budgets, records that survive an interruption. No clock is asserted on."""

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels import TargetProp
from tp_kernels.regimes import train
from tp_kernels.regimes.tasks import TemporalOrder, make_task
from tp_kernels.regimes.train import CONTENDERS, PRESETS, RacePlan, RaceSpec, StepSizes, choose, passed_at, plan, race

ALL = tuple(CONTENDERS)
WEIGHTS = ("rnn.weight_hh_l0", "readout.weight")
SMALL = {
    "task": "temporal-order",
    "T": 10,
    "N": 6,
    "B": 4,
    "steps": 6,
    "evaluate_every": 2,
    "step_sizes": (1e-2, 1e-3),
    "seeds": 2,
    "contenders": ALL,
}


def small_plan(**overrides: object) -> RacePlan:
    return plan("default", **{**SMALL, **overrides})


def spec_of(contender: str, *, step_sizes: StepSizes | None = None, **overrides: object) -> RaceSpec:
    """The first search run of a contender, with other values where given."""
    spec = small_plan(contenders=[contender]).settings[0].search(contender)[0]
    return replace(spec, step_sizes=step_sizes or spec.step_sizes, **overrides)


def without_time(record: dict) -> dict:
    curve = [{name: value for name, value in point.items() if name != "seconds"} for point in record["curve"]]
    return {**record, "curve": curve, "seconds_to_bar": None}


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], nn.Module]]:
    """Every net that a run builds, in order: its first weights, and itself."""
    built = []
    build = train.build

    def remember(spec, task):
        model = build(spec, task)
        built.append((copy.deepcopy(model.state_dict()), model))
        return model

    monkeypatch.setattr(train, "build", remember)
    return built


def moves(net: tuple[dict[str, Tensor], nn.Module]) -> dict[str, Tensor]:
    before, model = net
    return {name: value - before[name] for name, value in model.state_dict().items()}


# --- the bar ----------------------------------------------------------------------------------------------------------


def curve_of(*accuracies: float) -> list[dict]:
    return [{"step": 10 * i, "seconds": i / 2, "accuracy": accuracy} for i, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("accuracies", "bar", "expected"),
    [
        ((0.0, 0.0, 1.0, 0.0, 0.0, 0.0), 0.5, (None, None)),
        ((0.0, 0.5, 0.75, 1.0, 1.0), 0.75, (30, 1.5)),
        ((0.0, 0.0, 0.75, 0.75, 0.75, 0.0), 0.75, (40, 2.0)),
        ((0.0, 1.0, 1.0, 1.0), 0.6, (20, 1.0)),
        ((0.75, 0.75), 0.75, (0, 0.0)),
        ((), 0.5, (None, None)),
    ],
    ids=["one lucky evaluation", "exactly the bar", "falls back later", "early", "passed untrained", "no evaluation"],
)
def test_passed_at(accuracies: tuple[float, ...], bar: float, expected: tuple) -> None:
    assert passed_at(curve_of(*accuracies), bar) == expected


# --- one run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", ALL)
def test_a_record(contender: str) -> None:
    spec = spec_of(contender)
    record = train.run(spec)
    assert record == json.loads(json.dumps(record, allow_nan=False))
    assert record["key"] == spec.key
    assert (record["contender"], record["role"]) == (contender, CONTENDERS[contender].role)
    assert [point["step"] for point in record["curve"]] == [0, 2, 4, 6]
    assert all(0 <= point["accuracy"] <= 1 for point in record["curve"])
    last = [point["accuracy"] for point in record["curve"]][-3:]
    assert record["final_accuracy"] == pytest.approx(sum(last) / 3)
    assert record["best_accuracy"] >= record["final_accuracy"]
    assert record["steps"] == 6
    assert (record["diverged"], record["message"]) == (False, None)
    assert record["step_sizes"] in record["grid"]


def test_a_contender_with_another_rule() -> None:
    """What comes after the colons is in the rule and in the record; nothing else of the contender changes."""
    spec = spec_of("tp-two:power=1:reg=0.3:update=local")
    assert spec.rule == tp.TargetProp(reg=0.3, power=1.0, update="local")
    record = train.run(spec)
    assert (record["contender"], record["rule"]) == ("tp-two:power=1:reg=0.3:update=local", repr(spec.rule))
    assert list(record["step_sizes"]) == ["readout", "recurrent"]
    same = train.run(spec_of("tp:reg=1e-4"))
    assert without_time(same)["curve"] == without_time(train.run(spec_of("tp")))["curve"]
    assert same["key"] != spec_of("tp").key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bq", "contenders must be one of 'tp', .*, got 'bq'"),
        ("tp:gamma=2", "contenders, after ':', must be one of 'reg', .*, got 'gamma'"),
        ("bp:reg=1", "contenders must be of TargetProp to be changed after ':', got 'bp:reg=1'"),
        ("tp:reg=a", "contenders must have a rule that there is, got 'tp:reg=a': could not convert string to float"),
        ("tp:reg", "contenders must have a rule that there is, got 'tp:reg': could not convert string to float: ''"),
        ("tp:reg=0", "contenders must have a rule that there is, got 'tp:reg=0': TargetProp: reg must be positive"),
        ("tp:mode=direct", "'tp:mode=direct': TargetProp: inverse must be 'layer' with mode='direct', got 'weight'"),
    ],
)
def test_a_contender_that_there_is_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_plan(contenders=[name])


@pytest.mark.parametrize("contender", ["tp", "bp", "nn.RNN"])
def test_a_seed_gives_one_curve(contender: str) -> None:
    spec = spec_of(contender)
    first, again, other = (train.run(run) for run in (spec, spec, replace(spec, seed=spec.seed + 1)))
    assert without_time(first) == without_time(again)
    assert without_time(first)["curve"] != without_time(other)["curve"]


def test_contenders_start_alike_and_see_the_same_batches(nets, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    batch = TemporalOrder.batch

    def remember(self, generator, B):
        x, y = batch(self, generator, B)
        if x.shape[1] == SMALL["B"]:
            seen[-1].append(x)
        return x, y

    monkeypatch.setattr(TemporalOrder, "batch", remember)
    for contender in ALL:
        seen.append([])
        train.run(spec_of(contender))
    for (weights, _), batches in zip(nets, seen, strict=True):
        for name, weight in nets[0][0].items():  # a learned inverse has more
            assert torch.equal(weights[name], weight)
        assert len(batches) == 7, "one to warm up, and six steps"
        assert all(torch.equal(mine, first) for mine, first in zip(batches, seen[0], strict=True))


def test_building_and_training_leave_the_callers_random_state_alone() -> None:
    before = torch.get_rng_state()
    train.run(spec_of("tp"))
    assert torch.equal(torch.get_rng_state(), before)


def test_orthogonal_initialization(nets) -> None:
    train.run(spec_of("tp", initialization="orthogonal", steps=1))
    weight = nets[0][0]["rnn.weight_hh_l0"]
    torch.testing.assert_close(weight @ weight.T, torch.eye(SMALL["N"]))


def test_rotation_is_orthogonal_and_near_the_identity(nets) -> None:
    for seed in (100, 100, 101):
        train.run(spec_of("tp", initialization="rotation", N=64, seed=seed, steps=1))
    first, again, other = (before["rnn.weight_hh_l0"] for before, _ in nets)
    torch.testing.assert_close(first @ first.T, torch.eye(64))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    angles = torch.linalg.eigvals(first.double()).angle().abs()
    assert 0.2 < angles.max() < 0.35


def test_cosine_schedule_ends_at_zero(nets, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step sizes that the optimizer saw, and that a constant one leaves them."""
    seen = {}
    step = torch.optim.SGD.step

    def remember(self, *arguments, **options):
        seen.setdefault(schedule, []).append([group["lr"] for group in self.param_groups])
        return step(self, *arguments, **options)

    for schedule in train.SCHEDULES:
        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.SGD, "step", remember)
            train.run(spec_of("tp-two", schedule=schedule, optimizer="sgd", clip=None, steps=6, floor=6))
    first = seen["constant"][0]
    assert seen["constant"] == [first] * 6
    for step_number, sizes in enumerate(seen["cosine"]):
        assert sizes == pytest.approx([size * (1 + math.cos(math.pi * step_number / 6)) / 2 for size in first])


def test_frozen_leaves_the_recurrent_layer_bit_for_bit(nets) -> None:
    train.run(spec_of("frozen", optimizer="adam"))
    before, model = nets[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("rnn.")
    assert all(parameter.grad is None for parameter in model["rnn"].parameters()), "nothing is sent back through it"


def test_random_feedback_is_orthogonal_fixed_and_one_per_seed(nets) -> None:
    for seed in (100, 100, 101):
        train.run(spec_of("tp-random", seed=seed))
    first, again, other = (model["rnn"].feedback for _, model in nets)
    torch.testing.assert_close(first @ first.T, torch.eye(SMALL["N"]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_feedback_of_the_first_weights_stays_and_the_transpose_follows(nets) -> None:
    train.run(spec_of("tp-first"))
    train.run(spec_of("tp-transpose"))
    (before, fixed), (_, transposed) = nets
    rule = fixed["rnn"].rule
    inverse = tp.regularized_inverse(before["rnn.weight_hh_l0"], rule.reg, power=rule.power)
    torch.testing.assert_close(fixed["rnn"].feedback, inverse)
    assert torch.equal(transposed["rnn"].feedback, transposed["rnn"].weight_hh_l0.detach().T)
    assert moves(nets[1])["rnn.weight_hh_l0"].abs().max() > 0


@pytest.mark.parametrize("contender", [name for name in ALL if CONTENDERS[name].feedback])
def test_feedback_takes_the_place_of_the_inverse_and_of_nothing_else(nets, contender: str) -> None:
    one = {"optimizer": "sgd", "clip": None, "steps": 1, "floor": 1, "evaluate_every": 1}
    record = train.run(spec_of(contender, **one))
    train.run(spec_of("tp", **one))
    (_, with_feedback), (_, plain) = nets
    assert with_feedback["rnn"].rule == plain["rnn"].rule == TargetProp()
    assert record["feedback"] == CONTENDERS[contender].feedback
    weight, readout = (torch.allclose(*(moves(net)[name] for net in nets)) for name in WEIGHTS)
    assert (weight, readout) == (contender == "tp-first", True), "at the first step the first weights are these"


def test_power_1_is_the_papers_inverse(nets) -> None:
    train.run(spec_of("tp-power1", steps=1, floor=1, evaluate_every=1))
    assert (nets[0][1]["rnn"].rule.power, nets[0][1]["rnn"].rule.reg) == (1.0, 0.25)


def test_several_answers_train_the_last_steps(nets) -> None:
    """One step of SGD on the copy task, written out with torch alone."""
    spec = spec_of("nn.RNN", task="copy-3", T=8, optimizer="sgd", clip=None, step_sizes=StepSizes(all=0.5), steps=1)
    record = train.run(spec)
    task = make_task("copy-3", 8)
    plain = nn.ModuleDict({"rnn": nn.RNN(10, spec.N), "readout": nn.Linear(spec.N, 8)})
    plain.load_state_dict(nets[0][0])
    x, y = next(train.batches(spec, task))
    outputs = [plain["readout"](h) for h in plain["rnn"](x)[0][-3:]]
    (sum(nn.functional.cross_entropy(output, y[:, k]) for k, output in enumerate(outputs)) / 3).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(nets[0][1].state_dict()[name], parameter - 0.5 * parameter.grad, msg=name)
    x, y = task.held_out("validation")
    right = nets[0][1]["readout"](nets[0][1]["rnn"](x)[0][-3:]).argmax(-1) == y.T
    assert record["curve"][-1]["accuracy"] == pytest.approx(right.double().mean().item())


@pytest.mark.parametrize("contender", [name for name in ALL if name != "frozen"])
def test_everyone_else_trains_everything(nets, contender: str) -> None:
    train.run(spec_of(contender))
    assert all(move.abs().max() > 0 for move in moves(nets[0]).values())


def test_two_step_sizes_are_two(nets) -> None:
    sgd = {"optimizer": "sgd", "clip": None, "steps": 1, "floor": 1, "evaluate_every": 1}
    train.run(spec_of("bp", step_sizes=StepSizes(all=0.5), **sgd))
    train.run(spec_of("bp-two", step_sizes=StepSizes(readout=0.5, recurrent=0.125), **sgd))
    one, two = map(moves, nets)
    for name in one:
        factor = 1.0 if name.startswith("readout.") else 0.25
        torch.testing.assert_close(two[name], factor * one[name], rtol=1e-4, atol=1e-7)


def test_bp_on_our_kernels_is_torchs_bp() -> None:
    """Same start, same batches, same gradients: the same curve, but for rounding."""
    bp, torchs = (train.run(spec_of(name, steps=20, stop_at_bar=False))["curve"] for name in ("bp", "nn.RNN"))
    assert [point["loss"] for point in bp] == pytest.approx([point["loss"] for point in torchs], rel=1e-4)
    tp = train.run(spec_of("tp", steps=20, stop_at_bar=False))["curve"]
    assert [point["loss"] for point in tp] != pytest.approx([point["loss"] for point in torchs], rel=1e-4)


@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_training_is_the_plain_loop(beta2: float, nets) -> None:
    """Twelve steps of Adam written out with torch alone end at the weights of a run."""
    spec = spec_of("nn.RNN", steps=12, stop_at_bar=False, step_sizes=StepSizes(all=0.03), beta2=beta2)
    train.run(spec)
    task = make_task(spec.task, spec.T)
    first, trained = nets[0]
    plain = nn.ModuleDict({"rnn": nn.RNN(task.input_size, spec.N), "readout": nn.Linear(spec.N, task.output_size)})
    plain.load_state_dict(first)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.03, betas=(0.9, beta2))
    for x, y in islice(train.batches(spec, task), 12):
        _, last = plain["rnn"](x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain["readout"](last[0]), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value)


def test_the_gradient_is_clipped_to_its_global_norm(nets) -> None:
    sgd = {"optimizer": "sgd", "steps": 1, "floor": 1, "evaluate_every": 1}
    for clip in (None, 1e-3):
        train.run(spec_of("bp", step_sizes=StepSizes(all=0.5), clip=clip, **sgd))
    free, clipped = (torch.cat([move.flatten() for move in moves(net).values()]).norm().item() for net in nets)
    assert free > 0.01
    assert clipped == pytest.approx(0.5 * 1e-3, rel=1e-2)
    assert {spec_of("bp").clip, small_plan(optimizer="sgd").settings[0].search("bp")[0].clip} == {1.0, None}


def test_readout_and_layer_are_clipped_apart(nets) -> None:
    sgd = {"optimizer": "sgd", "steps": 1, "floor": 1, "evaluate_every": 1, "clip": 1e-3}
    for clipping in train.CLIPPINGS:
        train.run(spec_of("bp", step_sizes=StepSizes(all=0.5), clipping=clipping, **sgd))
    norms = []
    for net in nets:
        parts = [[move.flatten() for name, move in moves(net).items() if name.startswith(part)] for part in net[1]]
        norms.append([torch.cat(part).norm().item() / 0.5 for part in parts])
    together, apart = norms
    assert math.hypot(*together) == pytest.approx(1e-3, rel=1e-2)
    assert max(together) < 1e-3 > min(together)
    assert apart == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_a_curve_tells_how_saturated_the_states_are_and_how_large_weight_and_gradient(nets) -> None:
    """Recomputed from the net at the end, and, for the only step taken, from its gradient."""
    spec = spec_of("bp", steps=1, floor=1, evaluate_every=1)
    first, last = train.run(spec)["curve"]
    task = make_task(spec.task, spec.T)
    weights, model = nets[0]
    states, _ = model["rnn"](task.held_out("validation")[0])
    assert last["slope"] == pytest.approx((1 - states.detach().double() ** 2).mean().item(), rel=1e-5)
    assert last["gain"] == pytest.approx(torch.linalg.svdvals(model["rnn"].weight_hh_l0.detach())[0].item(), rel=1e-5)
    assert first["gain"] == pytest.approx(torch.linalg.svdvals(weights["rnn.weight_hh_l0"])[0].item(), rel=1e-5)
    start = train.build(spec, task)
    x, y = next(train.batches(spec, task))
    task.loss(start["readout"](start["rnn"](x)[1][0]), y).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in start.parameters()]).norm().item()
    assert last["gradient"] == pytest.approx(norm, rel=1e-5)
    assert first["gradient"] is None
    assert train.run(spec_of("bp", optimizer="sgd", clip=None))["curve"][-1]["gradient"] is None, "not clipped"


def test_search_looks_at_the_validation_set_and_only_final_runs_at_the_test_set(monkeypatch) -> None:
    looked_at = []
    held_out = TemporalOrder.held_out
    monkeypatch.setattr(TemporalOrder, "held_out", lambda self, which: looked_at.append(which) or held_out(self, which))
    race(small_plan(contenders=["bp"], seeds=1), {}, lambda record: looked_at.append(record["phase"]))
    assert looked_at == ["validation", "search", "validation", "search", "test", "final"]


def test_seconds_are_of_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes forward by 1000 for a batch made and by 1 for a loss, only the training losses show."""
    now = [0.0]
    batch, loss = TemporalOrder.batch, TemporalOrder.loss

    def slow_batch(*args):
        now[0] += 1000
        return batch(*args)

    def slow_loss(*args):
        now[0] += 1
        return loss(*args)

    monkeypatch.setattr(TemporalOrder, "batch", slow_batch)
    monkeypatch.setattr(TemporalOrder, "loss", slow_loss)
    monkeypatch.setattr(train, "_clock", lambda device: now[0])
    curve = train.run(spec_of("bp"))["curve"]
    assert [point["seconds"] for point in curve] == [0, 2, 4, 6]


def test_a_run_stops_at_the_bar_but_not_before_the_floor() -> None:
    passes = {"steps": 10, "bar": 0.0}
    assert train.run(spec_of("bp", floor=5, **passes))["steps"] == 6
    assert train.run(spec_of("bp", floor=0, **passes))["steps"] == 2
    whole = train.run(spec_of("bp", floor=0, stop_at_bar=False, **passes))
    assert (whole["steps"], whole["steps_to_bar"]) == (10, 0)
    assert train.run(spec_of("bp", steps=5, floor=0, bar=1.0))["steps"] == 5, "the last chunk is shorter"


def test_a_loss_that_overflows_is_recorded() -> None:
    record = train.run(spec_of("bp", optimizer="sgd", clip=None, step_sizes=StepSizes(all=1e38)))
    assert record["diverged"]
    assert record["message"] == "the loss is not finite by step 2"
    assert record["steps_to_bar"] is None
    assert record["curve"][-1]["loss"] is None
    json.dumps(record, allow_nan=False)


def test_a_weight_without_inverse_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrent weight overflows, while states, squashed by tanh, and the loss stay finite."""
    sizes = StepSizes(readout=1e-3, recurrent=1e30)
    record = train.run(spec_of("tp-paper", optimizer="sgd", clip=None, step_sizes=sizes))
    assert record["diverged"]
    assert "positive definite" in record["message"]
    assert [point["step"] for point in record["curve"]] == [0]
    assert record["steps"] == 0


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, output, y):
        raise RuntimeError("a bug")

    monkeypatch.setattr(TemporalOrder, "loss", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train.run(spec_of("bp"))


@pytest.mark.parametrize("contender", ["tp", "bp", "bp-two"])
def test_digits_are_learned(contender: str) -> None:
    digits = plan("quick", T=8, N=32, B=50, steps=150, step_sizes=[1e-2], contenders=[contender], bar=0.75, seeds=1)
    (spec,) = digits.settings[0].final(contender, [])
    record = train.run(spec)
    assert record["steps_to_bar"] is not None, record["curve"]


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_contender_gets_the_same_number_of_trials(preset: str) -> None:
    for setting in plan(preset).settings:
        must = {"tp", "tp-identity", "tp-random", "bp", "bp-two", "frozen"}
        assert set(CONTENDERS) >= set(setting.contenders) >= must
        trials = {name: len(setting.search(name)) for name in setting.contenders}
        assert len(set(trials.values())) == 1, trials
        assert min(trials.values()) >= 3
        assert len(setting.seeds) >= 3
        assert not set(setting.seeds) & set(setting.search_seeds)


def test_grids_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grids must have one length for every contender, got .*'bp-two': 3"):
        small_plan(two_step_sizes=((0.1, 0.01),) * 3)


def test_a_final_seed_must_not_be_one_of_the_search() -> None:
    with pytest.raises(ValueError, match=r"search_seeds must differ from seeds \(0, 1\), got \(1,\)"):
        small_plan(search_seeds=[1])
    assert small_plan(search_seeds=2).settings[0].search_seeds == (100, 101)


def test_overrides_make_every_combination() -> None:
    made = plan("quick", task=["digits", "adding"], T=[16, 32], N=[8, 12], contenders="tp", seeds=[5, 6], steps=40)
    assert Counter((setting.task, setting.T, setting.N) for setting in made.settings) == Counter(
        (task, T, N) for task in ("digits", "adding") for T in (16, 32) for N in (8, 12)
    )
    assert {(setting.contenders, setting.seeds, setting.steps) for setting in made.settings} == {(("tp",), (5, 6), 40)}


def test_a_preset_keeps_what_is_not_overridden() -> None:
    whole, fewer = plan("default"), plan("default", seeds=4, N=None)
    assert [replace(setting, seeds=(0, 1, 2)) for setting in fewer.settings] == list(whole.settings)
    assert plan() == whole


def test_a_users_grid_is_for_every_contender() -> None:
    (setting,) = plan("paper", task="temporal-order", T=60, step_sizes=[0.5, 0.05]).settings
    grids = dict(zip(setting.contenders, setting.grids, strict=True))
    assert grids["tp"] == grids["bp"] == (StepSizes(all=0.5), StepSizes(all=0.05))
    assert grids["bp-two"] == (StepSizes(readout=0.5, recurrent=0.005), StepSizes(readout=0.05, recurrent=0.0005))
    assert grids["frozen"] == (StepSizes(readout=0.5, recurrent=0.0), StepSizes(readout=0.05, recurrent=0.0))


def test_another_optimizer_brings_its_own_grid_and_a_grid_given_stays() -> None:
    assert plan("quick", optimizer="sgd").settings[0].grids[0][0] == StepSizes(all=1.0)
    assert plan("quick", optimizer="sgd", step_sizes=[0.3]).settings[0].grids[0] == (StepSizes(all=0.3),)
    pairs = plan("quick", step_sizes=[0.3], two_step_sizes=[(0.2, 0.1)]).settings[0]
    assert pairs.grids[pairs.contenders.index("bp-two")] == (StepSizes(readout=0.2, recurrent=0.1),)


def test_the_papers_settings() -> None:
    """Roulet and Harchaoui: r and the step of each task."""
    rules = {(s.task, s.T): s.rules[s.contenders.index("tp-paper")] for s in plan("paper").settings}
    assert rules == {
        ("temporal-order", 60): TargetProp(inverse="layer", reg=10.0, step=0.01),
        ("temporal-order", 120): TargetProp(inverse="layer", reg=1.0, step=0.01),
        ("adding-squared", 30): TargetProp(inverse="layer", reg=1.0, step=0.1),
        ("digits28", 784): TargetProp(inverse="layer", reg=1.0, step=1e-4),
    }
    assert small_plan(contenders=["tp-paper"], gamma=0.5).settings[0].rules == (TargetProp(inverse="layer", step=0.5),)
    named = small_plan(contenders=["tp-paper:reg=5", "tp-paper:step=2"], gamma=0.5, reg=3.0).settings[0].rules
    assert [(rule.reg, rule.step) for rule in named] == [(5.0, 0.5), (3.0, 2.0)]
    assert small_plan(contenders=["tp"], gamma=0.5, reg=3.0).settings[0].rules == (TargetProp(),)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"preset": "fast"}, ValueError, "preset must be one of 'quick', 'default', 'paper', got 'fast'"),
        ({"task": "sorting"}, ValueError, "task must be one of .*got 'sorting'"),
        ({"contenders": ["tp", "sgd"]}, ValueError, "contenders must be one of .*got 'sgd'"),
        ({"optimizer": "lbfgs"}, ValueError, "optimizer must be one of 'adam', 'sgd', got 'lbfgs'"),
        ({"beta2": 1.0}, ValueError, r"beta2 must be in \(0, 1\), got 1.0"),
        (
            {"beta2": 0.9, "optimizer": "sgd"},
            ValueError,
            "beta2 must be left out where the optimizer is 'sgd', got 0.9",
        ),
        ({"beta2": 0.9, "preset": "paper"}, ValueError, "beta2 must be left out where the optimizer is 'sgd', got 0.9"),
        ({"clipping": "none"}, ValueError, "clipping must be one of 'together', 'apart', got 'none'"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of 'constant', 'cosine', got 'linear'"),
        ({"initialization": "zero"}, ValueError, "initialization must be one of .*got 'zero'"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"seeds": 0}, ValueError, "seeds must not be empty"),
        ({"learning_rate": 1}, TypeError, "plan takes .*got learning_rate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_plans(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(**arguments)


def test_a_key_names_the_run_and_nothing_else() -> None:
    spec = spec_of("tp")
    assert json.loads(spec.key)["rule"]["reg"] == spec.rule.reg
    assert replace(spec, grid=()).key == spec.key
    others = [
        replace(spec, seed=7),
        replace(spec, phase="final"),
        replace(spec, rule=TargetProp(reg=1.0)),
        replace(spec, step_sizes=StepSizes(all=0.5)),
        replace(spec, bar=0.5),
        spec_of("bp"),
    ]
    assert len({spec.key, *(other.key for other in others)}) == 1 + len(others)


def trial(size: float, steps_to_bar: int | None, best: float) -> dict:
    return {"step_sizes": {"all": size}, "steps_to_bar": steps_to_bar, "best_accuracy": best}


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([trial(1.0, None, 0.9), trial(0.1, 500, 0.8), trial(0.01, 300, 0.7)], 0.01),
        ([trial(1.0, None, 0.2), trial(0.1, None, 0.8), trial(0.01, None, 0.7)], 0.1),
        ([trial(1.0, 100, 0.9), trial(1.0, None, 0.2), trial(0.1, 300, 0.9), trial(0.1, 400, 0.9)], 0.1),
        ([trial(1.0, 300, 0.9), trial(0.1, 300, 0.95)], 0.1),
        ([trial(1.0, None, 0.5), trial(0.1, None, 0.5)], 1.0),
    ],
    ids=["fewest steps", "most accurate", "most seeds", "tie of steps", "tie"],
)
def test_the_choice_of_the_search(trials: list[dict], chosen: float) -> None:
    grid = [StepSizes(all=size) for size in dict.fromkeys(record["step_sizes"]["all"] for record in trials)]
    assert choose(grid, trials) == StepSizes(all=chosen)


def test_a_choice_needs_every_trial() -> None:
    with pytest.raises(ValueError, match=r"got none of StepSizes\(all=0.1"):
        choose([StepSizes(all=1.0), StepSizes(all=0.1)], [trial(1.0, None, 0.5)])


# --- the whole race ---------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RaceSpec]:
    """Instead of training, records in which 1e-3 is the best step size. Returns what was run, in order."""
    specs = []

    def run(spec: RaceSpec, on_steps) -> dict:
        on_steps(spec.steps)
        specs.append(spec)
        size = spec.step_sizes.all or spec.step_sizes.readout
        best = 0.9 if size == 1e-3 else 0.1
        record = {"steps_to_bar": None, "best_accuracy": best, "step_sizes": spec.step_sizes.to_dict()}
        return {"kind": "run", "key": spec.key, **record}

    monkeypatch.setattr(train, "run", run)
    return specs


def resumable(records: dict[str, dict]):
    """``on_record`` as a store does it: through JSON, and no key twice."""

    def on_record(record: dict) -> None:
        assert record["key"] not in records
        records[record["key"]] = json.loads(json.dumps(record))

    return on_record


def test_the_final_runs_are_of_the_chosen_point_on_fresh_seeds(runs) -> None:
    made = small_plan(contenders=["tp", "bp-two", "frozen"], seeds=3)
    race(made, {}, resumable({}))
    search = [spec for spec in runs if spec.phase == "search"]
    final = [spec for spec in runs if spec.phase == "final"]
    assert runs == search + final
    assert Counter(spec.contender for spec in search) == {"tp": 2, "bp-two": 2, "frozen": 2}
    assert {(spec.contender, spec.step_sizes) for spec in final} == {
        ("tp", StepSizes(all=1e-3)),
        ("bp-two", StepSizes(readout=1e-3, recurrent=1e-4)),
        ("frozen", StepSizes(readout=1e-3, recurrent=0.0)),
    }
    assert [(spec.seed, spec.contender) for spec in final] == [
        (seed, contender) for seed in range(3) for contender in ("tp", "bp-two", "frozen")
    ]
    assert not {spec.seed for spec in search} & {spec.seed for spec in final}


def test_a_grid_of_one_point_is_not_searched(runs) -> None:
    race(small_plan(contenders=["tp", "bp"], step_sizes=0.1, seeds=2), {}, resumable({}))
    assert [spec.phase for spec in runs] == ["final"] * 4


def test_a_finished_race_runs_nothing_again(runs) -> None:
    made, records = small_plan(), {}
    race(made, {}, resumable(records))
    assert len(records) == len(runs) == len(ALL) * (2 + 2)
    runs.clear()
    race(made, records, resumable(records))
    assert runs == []


@pytest.mark.parametrize("interrupted_after", [1, 5, 13])
def test_an_interrupted_race_keeps_its_records_and_goes_on(runs, interrupted_after: int) -> None:
    made, records = small_plan(), {}
    keep = resumable(records)

    def interrupt(record: dict) -> None:
        keep(record)
        if len(records) == interrupted_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        race(made, {}, interrupt)
    assert len(records) == interrupted_after
    calls = []
    race(made, records, keep, lambda *call: calls.append(call))
    assert calls[0][1] == interrupted_after * SMALL["steps"], "progress goes on from where it was"
    in_parts = [spec.key for spec in runs]
    runs.clear()
    race(made, {}, resumable({}))
    assert in_parts == [spec.key for spec in runs]


def test_more_seeds_add_to_a_finished_race(runs) -> None:
    records: dict[str, dict] = {}
    race(small_plan(seeds=2), records, resumable(records))
    runs.clear()
    race(small_plan(seeds=3), records, resumable(records))
    assert [(spec.phase, spec.seed) for spec in runs] == [("final", 2)] * len(ALL)


def test_progress_goes_forward_to_the_end(runs) -> None:
    made, records, calls = small_plan(), {}, []
    race(made, {}, resumable(records), lambda *call: calls.append(call))
    behind = [completed for _, completed, _ in calls]
    assert behind == sorted(behind)
    assert {total for *_, total in calls} == {made.most_steps()} == {len(ALL) * 4 * SMALL["steps"]}
    assert behind[0] == 0
    assert behind[-1] == made.most_steps()
    calls.clear()
    race(made, records, resumable(records), lambda *call: calls.append(call))
    assert calls == [("race", made.most_steps(), made.most_steps())]


def test_a_race_for_real() -> None:
    records: dict[str, dict] = {}
    race(small_plan(contenders=["tp", "frozen"]), {}, resumable(records))
    assert Counter((record["contender"], record["phase"]) for record in records.values()) == {
        (contender, phase): 2 for contender in ("tp", "frozen") for phase in ("search", "final")
    }


@pytest.mark.parametrize("contender", [name for name in ALL if CONTENDERS[name].learned])
def test_a_learned_inverse_is_trained_with_the_layer(contender: str) -> None:
    task = make_task("temporal-order", 10)
    model = train.build(spec_of(contender), task)
    assert model["rnn"].update == CONTENDERS[contender].learned
    optimizer = train.build_optimizer(spec_of(contender), model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_refresh_reaches_the_layer() -> None:
    assert train.build(spec_of("tp-refresh8"), make_task("temporal-order", 10))["rnn"].refresh == 8
