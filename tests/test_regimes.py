"""The regime map: its store, its flags, its check, its report, and a tiny run of it all. No test looks at a clock."""

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tp_kernels import _native
from tp_kernels.regimes import __main__ as command
from tp_kernels.regimes import measure, model, pictures, report, store, summary, train
from tp_kernels.regimes.cases import CONTENDERS, PRESETS, Case, Contender, Effort, Grid, LastState, fused, spec
from tp_kernels.rules import BackProp, TargetProp

ROOT = Path(__file__).parents[1]
TINY = Case(T=4, N=5, B=3)
HERE = {"device_name": "a device", "torch": "2"}


# --- store ------------------------------------------------------------------------------------------------------------


def _record(name: str, **values: object) -> dict:
    return {"key": name, "environment": HERE, **values}


def test_records_are_there_for_the_next_run(tmp_path):
    store.Store(tmp_path).append(_record("a", value=1.5))
    again = store.Store(tmp_path)
    again.append(_record("b", value=float("nan")))
    found = store.Store(tmp_path)
    assert found.has("a", HERE)
    assert found.records["a"]["value"] == 1.5
    assert found.records["b"]["value"] is None  # JSON has no NaN
    assert not found.has("c", HERE)


def test_a_record_of_another_environment_does_not_count(tmp_path):
    kept = store.Store(tmp_path)
    kept.append(_record("a"))
    assert not kept.has("a", HERE | {"torch": "3"})


def test_a_torn_last_line_is_cut_off(tmp_path):
    kept = store.Store(tmp_path)
    kept.append(_record("a"))
    with open(kept.path, "a") as file:
        file.write('{"key": "b", "env')
    torn = store.Store(tmp_path)
    assert list(torn.records) == ["a"]
    torn.append(_record("c"))
    assert list(store.Store(tmp_path).records) == ["a", "c"]


def test_two_runs_in_one_folder_keep_all_records(tmp_path):
    one, other = store.Store(tmp_path), store.Store(tmp_path)
    for run, name in ((one, "a"), (other, "b"), (one, "c"), (other, "d")):
        run.append(_record(name))
    assert list(store.Store(tmp_path).records) == ["a", "b", "c", "d"]


def test_of_two_records_the_later_one_holds(tmp_path):
    kept = store.Store(tmp_path)
    kept.append(_record("a", value=1))
    kept.append(_record("a", value=2))
    assert store.Store(tmp_path).records["a"]["value"] == 2


def test_a_broken_line_is_named(tmp_path):
    kept = store.Store(tmp_path)
    kept.append(_record("a"))
    with open(kept.path, "a") as file:
        file.write("[]\n")
    for read in (lambda: store.Store(tmp_path), lambda: kept.append(_record("b"))):
        with pytest.raises(ValueError, match=r"records\.jsonl, line 2: expected a JSON record with a 'key', got"):
            read()


# --- flags ------------------------------------------------------------------------------------------------------------


def test_a_grid_from_flags():
    args = command.parser().parse_args(["map", "--T", "64,784, 64", "--M", "pixels", "--contenders", "tp,bp"])
    assert args.T == (64, 784)
    assert args.M == "pixels"
    assert args.contenders == ("tp", "bp")


def test_preset_before_the_command_counts():
    assert command.parser().parse_args(["--preset", "quick", "map"]).preset == "quick"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["map", "--T", "64,x"],
            "argument --T: expected positive integers separated by commas, like 64,784, got '64,x'",
        ),
        (["map", "--N", "0"], "argument --N: expected positive integers separated by commas, like 64,784, got '0'"),
        (["map", "--threads", "1,2"], "argument --threads: expected one positive integer, got '1,2'"),
        (["map", "--threads", "0"], "argument --threads: expected one positive integer, got '0'"),
        (["map", "--M", "pixel"], "argument --M: expected a positive integer or 'pixels', got 'pixel'"),
        (["map", "--contenders", "tp,bq"], "argument --contenders: expected names out of tp, .*, got 'bq'"),
        (["map", "--seconds", "-1"], "argument --seconds: expected one positive number, got '-1'"),
        (["map", "--device", "abacus"], "argument --device: expected cpu, cuda or cuda:0, got 'abacus'"),
        (["race", "--task", "chess"], "argument --task: expected names out of .*, got 'chess'"),
        (["race", "--contenders", "tp,bq"], "argument --contenders: contenders must be one of 'tp', .*, got 'bq'"),
        (["race", "--contenders", "tp:r=1"], "--contenders: contenders, after ':', must be one of 'reg', .*, got 'r'"),
        (["race", "--bar", "2"], r"argument --bar: expected a number in \(0, 1\], got '2'"),
        (["map", "--min-rounds", "9", "--max-rounds", "2"], "--min-rounds must be at most --max-rounds=2, got 9"),
        (["report", "--out", "nowhere"], "--out must be a run folder with finished records in .*, got nowhere"),
    ],
)
def test_a_wrong_flag_is_named(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        command.main(flags)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("command_", ["map", "race"])
def test_a_folder_that_cannot_be_written_to_is_named_before_anything_runs(command_, capsys, tmp_path, monkeypatch):
    for module, name in ((measure, "measure_cell"), (train, "race")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    with pytest.raises(SystemExit) as exit_:
        command.main([command_, "--out", str(out)])
    assert exit_.value.code == 2
    assert f"--out must be a folder that can be written to, got {out}: Not a directory" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_one_line(capsys, tmp_path, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "index.html")

    store.Store(tmp_path).append(_record("a"))
    monkeypatch.setattr(report, "write", no_space)
    with pytest.raises(SystemExit) as exit_:
        command.main(["report", "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "No space left on device: 'index.html'" in capsys.readouterr().err


def test_a_report_of_one_contender_says_that_there_is_nothing_to_compare(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command.console, "_width", 200)
    arguments = ["map", "--T", "3", "--N", "5", "--B", "2", "--seconds", "0.01", "--no-memory", "--out", str(tmp_path)]
    assert command.main([*arguments, "--contenders", "tp"]) == 0
    assert "nothing to compare" in capsys.readouterr().out
    assert command.main([*arguments, "--contenders", "tp,bp"]) == 0
    assert "nothing to compare" not in capsys.readouterr().out


def test_without_the_extra_the_remedy_is_named(tmp_path):
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')\n")
    environment = _environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "tp_kernels.regimes", "--help"],
        cwd=tmp_path, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "python -m tp_kernels.regimes: rich is not installed: pip install 'tp_kernels[regimes]'\n"


def test_cases_come_smallest_first_and_pixels_set_M():
    grid = Grid(T=(784, 4), N=(8,), B=(2,), M=None)
    assert [(case.T, case.M) for case in grid.cases()] == [(4, 196), (784, 1)]


# --- check and measurement --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "compile"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_contender_passes_its_check(name, dtype):
    case = Case(T=7, N=6, B=4, M=3, dtype=dtype)
    if reason := CONTENDERS[name].why_not(case, 0):
        pytest.skip(reason)
    cell = measure.Cell(case)
    gate = cell.check(CONTENDERS[name], cell.module(CONTENDERS[name]))
    assert gate.passed, gate
    assert gate.B == 4


@pytest.mark.parametrize("layer", ["RNN", "GRU"])
@pytest.mark.parametrize("needs_x", [False, True])
def test_jax_computes_what_torch_does(layer, needs_x):
    """All gradients; and the step that is timed is the one that was checked."""
    jax_layer = pytest.importorskip("tp_kernels.regimes.jax_layer", exc_type=ImportError)
    found, exact = jax_layer.JaxLayer(layer, 3, 7).double(), getattr(nn, layer)(3, 7).double()
    exact.load_state_dict(dict(zip(exact.state_dict(), found.state_dict().values(), strict=True)))
    x = torch.randn(9, 4, 3, dtype=torch.float64, requires_grad=needs_x)
    grad = torch.randn(4, 7, dtype=torch.float64)
    results = []
    for module, last in ((found, found(x)), (exact, exact(x)[1][0])):
        leaves = [*module.parameters(), *([x] if needs_x else [])]
        results.append((last.detach(), *torch.autograd.grad(last, leaves, grad)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    loss, gradients = found.training_step(x, grad)()
    torch.testing.assert_close(torch.from_dlpack(loss), (results[1][0] * grad).sum())
    assert len(gradients) == 1 + needs_x
    for one, other in zip((*gradients[0], *gradients[1:]), results[1][1:], strict=True):
        torch.testing.assert_close(torch.from_dlpack(one), other, rtol=1e-12, atol=1e-12)


def test_jax_that_is_not_there_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert CONTENDERS["jax"].why_not(TINY, 0) == "JAX is not installed: python -m pip install 'tp_kernels[jax]'"


class _WrongLastGradient(torch.autograd.Function):
    """A bug in one place of one gradient."""

    @staticmethod
    def forward(ctx, state):
        return state.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1, 0] *= 1.01
        return grad


class _Wrong(nn.Module):
    def __init__(self, M: int, N: int) -> None:
        super().__init__()
        self.right = LastState(nn.RNN(M, N))

    def forward(self, x):
        return _WrongLastGradient.apply(self.right(x))


def _break(monkeypatch, name: str) -> None:
    contender = CONTENDERS[name]
    wrong = type(contender)(name, contender.role, contender.label, BackProp(), lambda M, N, _: _Wrong(M, N))
    monkeypatch.setitem(CONTENDERS, name, wrong)


def test_a_wrong_contender_is_not_timed(monkeypatch):
    _break(monkeypatch, "eager")
    records = measure.measure_cell(TINY, ("bp", "eager"), Effort(seconds=0, min_rounds=2, memory=False))
    bp, wrong = records
    assert bp["gate"]["passed"]
    assert len(bp["seconds"]) == bp["rounds"] == 2
    assert not wrong["gate"]["passed"]
    assert wrong["gate"]["error"] > wrong["gate"]["budget"]
    assert wrong["seconds"] == []
    assert wrong["median_s"] is None


def test_a_nan_fails_the_check():
    right = {"a": torch.ones(3, dtype=torch.float64)}
    wrong = {"a": torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64)}
    assert measure.compare(right, right, right).passed
    assert not measure.compare(wrong, right, right).passed


def test_some_sequences_of_a_large_batch_are_checked(monkeypatch):
    monkeypatch.setattr(measure, "_GATE_OPERATIONS", 1)
    _break(monkeypatch, "eager")
    cell = measure.Cell(Case(T=3, N=4, B=9))
    assert cell.checked.tolist() == [0, 8]
    gate = cell.check(CONTENDERS["bp"], cell.module(CONTENDERS["bp"]))
    assert gate.passed
    assert gate.B == 2
    assert not cell.check(CONTENDERS["eager"], cell.module(CONTENDERS["eager"])).passed


def test_the_gradient_of_the_first_step_is_not_lost():
    cell = measure.Cell(Case(T=784, N=64, B=2))
    module = cell.module(CONTENDERS["bp"])
    first = torch.zeros_like(cell.x).requires_grad_()
    module(cell.x + first).backward(cell.grad)
    assert first.grad[0].abs().max() > torch.finfo(torch.float32).tiny  # smaller numbers are denormal


def test_a_case_of_another_layer():
    """Its methods are checked against the reference of that layer, and of their rule."""
    cell = measure.Cell(Case(T=7, N=6, B=4, M=3), layer="GRU")
    ours = fused("tp", "tp", "TP", TargetProp(), layer="GRU")
    theirs = Contender("nn.GRU", "bp", "nn.GRU", BackProp(), lambda M, N, _: LastState(nn.GRU(M, N)))
    for contender, backend in ((ours, "cpu" if _native.cpu_available()[0] else "reference"), (theirs, "torch")):
        assert cell.check(contender, cell.module(contender)).passed
        assert cell.backend_of(contender) == backend
    assert not cell.check(replace(theirs, rule=TargetProp()), cell.module(theirs)).passed


def test_a_contender_left_out_says_why():
    case = Case(T=9, N=4, B=2)
    (record,) = measure.measure_cell(case, ("compile",), Effort(compile_max_T=8, memory=False))
    assert record["skipped"].startswith("T=9 is over --compile-max-T=8")
    assert record["gate"] is None


def test_records_say_where_they_come_from():
    (record,) = measure.measure_cell(TINY, ("bp",), Effort(seconds=0, min_rounds=1, memory=False))
    assert record["key"] == store.key_of(spec(TINY, "bp", "auto"))
    assert record["backend"] in ("cpu", "reference")
    assert {"device_name", "python", "torch", "tp_kernels", "isa", "revision"} <= set(record["environment"])


# --- cost model -------------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_constants_it_was_given():
    per_call, per_step, rate = 1e-4, 1e-6, 5e10
    records = [
        {"contender": name, "T": T, "N": N, "B": 16, "M": 1, "median_s": per_call + 2 * T * per_step + count / rate}
        for T in (8, 64, 512)
        for N in (16, 64, 256)
        for name in ("bp", "tp", "tp-local")
        for count in [model.operations(name, T, N, 16, 1)]
    ]
    found = model.fit(records)
    assert found.seconds_per_call == pytest.approx(per_call, rel=1e-6)
    assert found.seconds_per_step == pytest.approx(per_step, rel=1e-6)
    assert found.operations_per_second == pytest.approx(rate, rel=1e-6)
    assert found.errors["tp"] < 1e-6
    assert model.fit(records[:3]) is None


def test_at_the_boundary_the_inverse_costs_the_stated_share():
    T = model.boundary_length(64, B=8, M=2)
    extra = model.operations("tp-local", T, 64, 8, 2) - model.operations("bp", T, 64, 8, 2)
    assert extra / model.operations("bp", T, 64, 8, 2) == pytest.approx(model.INVERSE_SHARE)


# --- report -----------------------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "device_name": "Test CPU",
    "python": "3",
    "torch": "2",
    "tp_kernels": "0",
    "isa": "v4",
    "revision": "abc",
}


def _cell(T: int, contender: str, median: float, passed: bool = True, N: int = 64) -> dict:
    case = Case(T=T, N=N, B=16)
    gate = {"passed": passed, "error": 1e-6 if passed else 0.3, "budget": 1e-5, "output": "grad_weight_hh", "B": 16}
    times = {"median_s": median, "q25_s": median * 0.95, "q75_s": median * 1.05} if passed else {"median_s": None}
    return {
        **spec(case, contender, "auto"),
        "key": store.key_of(spec(case, contender, "auto")),
        "role": CONTENDERS[contender].role,
        "label": CONTENDERS[contender].label,
        "seconds": [median] if passed else [],
        **times,
        "peak_bytes": 2**24,
        "peak_skipped": None,
        "gate": gate,
        "skipped": None,
        "rounds": 1,
        "warmup": 3,
        "backend": "cpu" if CONTENDERS[contender].fused else "torch",
        "environment": ENVIRONMENT,
    }


def _run(
    contender: str, role: str, seed: int, seconds: float | None, phase: str = "final", task: str = "digits"
) -> dict:
    curve = [
        {"step": step, "seconds": step / 100, "accuracy": min(1.0, step / 100 / (seconds or 50)), "loss": 1.0}
        for step in (0, 100, 200)
    ]
    return {
        **{"kind": "run", "key": f"{task} {contender} {seed} {phase}", "task": task, "T": 64, "N": 64, "B": 50},
        **{"contender": contender, "role": role, "phase": phase, "optimizer": "adam", "initialization": "default"},
        **{"step_sizes": {"all": 1e-3}, "seed": seed, "steps": 200, "max_steps": 200, "device": "cpu"},
        **{"curve": curve, "bar": 0.9, "seconds_to_bar": seconds, "environment": ENVIRONMENT | {"threads": 1}},
        "steps_to_bar": None if seconds is None else round(100 * seconds),
        "final_accuracy": curve[-1]["accuracy"],
        "best_accuracy": curve[-1]["accuracy"],
    }


def _texts(records: list[dict]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.text) for finding in summary.summarize(records)]


def test_a_won_a_lost_and_a_level_cell():
    cells = [
        *(_cell(16, "tp", 3e-3), _cell(16, "bp", 1e-3), _cell(16, "nn.RNN", 2e-3)),
        *(_cell(64, "tp", 1e-3), _cell(64, "bp", 2e-3), _cell(64, "nn.RNN", 4e-3)),
        *(_cell(256, "tp", 1.00e-3), _cell(256, "bp", 1.02e-3), _cell(256, "nn.RNN", 4e-3)),
    ]
    assert [summary.verdict(cell, "tp") for cell in summary.cells_of(cells)] == ["loss", "win", "level"]
    texts = _texts(cells)
    assert ("note", "A step of TP costs 0.98× BP on the same kernels (0.50× to 3.00×) and 0.25× torch.nn.RNN "
            "(0.25× to 1.50×), in the median over the cells.") in texts  # fmt: skip
    assert ("win", "TP is faster per step than every BP contender (BP, same kernels and torch.nn.RNN), by more than "
            "the spread, in 1 of 3 cells: T=64, N=64, B=16.") in texts  # fmt: skip
    assert ("loss", "TP is slower per step than the fastest BP contender, by more than the spread, in 1 of 3 cells; at "
            "worst 3.00× BP, same kernels, at T=16, N=64, B=16.") in texts  # fmt: skip
    assert ("level", "TP is level with the fastest BP contender, within the spread, in 1 of 3 cells.") in texts


def test_a_failed_check_is_reported_and_beats_nobody():
    cells = [_cell(16, "tp", 1e-3, passed=False), _cell(16, "bp", 2e-3)]
    assert summary.verdict(summary.cells_of(cells)[0], "tp") is None
    assert _texts(cells)[0] == (
        "failure",
        "TP failed its check in 1 cell and was not timed there. At T=16, N=64, B=16 the error of its grad_weight_hh is "
        "3.0e-01, its budget 1.0e-05.",
    )


def _race(tp: float | None, bp: float | None, identity: float | None, random: float | None = None) -> list[dict]:
    entries = [("tp", "tp", tp), ("bp", "bp", bp), ("tp-identity", "control", identity)]
    entries += [("tp-random", "control", random)] if random else []
    return [
        _run(name, role, seed, None if seconds is None else seconds + 0.01 * seed)
        for name, role, seconds in entries
        for seed in range(3)
    ]


def test_a_race_won_by_the_inverse():
    (kind, text), (inverse_kind, inverse_text) = _texts(_race(tp=0.5, bp=1.0, identity=0.8, random=0.9))
    assert kind == inverse_kind == "win"
    assert "TP passes 90% in 3 of 3 seeds, after 510 ms and 51 steps in the median" in text
    assert text.endswith("A win for TP: it is there before every BP contender, whatever the seed.")
    assert inverse_text.startswith("Here the win is the inverse's")
    assert "Identity feedback passes in 3 of 3 seeds, after 810 ms" in inverse_text
    assert "Random feedback passes in 3 of 3 seeds, after 910 ms" in inverse_text


def test_random_feedback_alone_can_take_the_win_from_the_inverse():
    _, (kind, text) = _texts(_race(tp=0.5, bp=1.0, identity=0.8, random=0.4))
    assert kind == "level"
    assert text.startswith("But that the inverse is what helps is not shown here: a control is as fast.")


def test_a_widened_search_leaves_out_the_finals_of_the_point_before():
    narrow = _race(tp=0.5, bp=1.0, identity=0.8)
    search = [
        {**_run("bp", "bp", 100, seconds, phase="search"), "step_sizes": {"all": size}}
        for size, seconds in ((1e-3, 0.9), (1e-2, 0.2))
    ]
    better = [{**_run("bp", "bp", seed, 0.2), "step_sizes": {"all": 1e-2}} for seed in range(3)]
    finals = summary.finals_of(narrow + search[:1])
    assert {run["step_sizes"]["all"] for run in finals["bp"]} == {1e-3}
    finals = summary.finals_of(narrow + search + better)
    assert finals["bp"] == better
    assert [len(runs) for runs in finals.values()] == [3, 3, 3]
    (kind, text), _ = _texts(narrow + search + better)
    assert kind == "loss"
    assert "BP in 3 of 3 seeds, after 200 ms" in text


def test_a_control_with_two_step_sizes_is_one_as_well():
    better = [_run("tp-random-two", "control", seed, 0.4) for seed in range(3)]
    _, (kind, text) = _texts(_race(tp=0.5, bp=1.0, identity=0.8, random=0.9) + better)
    assert kind == "level"
    assert "Random feedback, two step sizes passes in 3 of 3 seeds, after 400 ms" in text


@pytest.mark.parametrize("name", train.CONTENDERS)
def test_every_contender_of_the_race_has_a_label_and_a_colour(name):
    assert summary.race_label(name) != name
    assert name in pictures.CURVE_COLOURS


def test_a_changed_contender_has_a_label_and_a_colour_of_its_own(monkeypatch):
    name = "tp-two:reg=0.01"
    assert summary.race_label(name) == "TP, two step sizes, reg=0.01"
    drawn = []
    monkeypatch.setattr(pictures, "_png", lambda figure: drawn.extend(figure.axes[0].get_lines()) or b"")
    contenders = ("tp", "tp-two", name, "tp-two:reg=0.1")
    pictures.race_curves([_run(contender, "tp", seed, 0.4) for contender in contenders for seed in range(3)])
    curves = [line for line in drawn if line.get_label()[0] != "_"]
    assert [line.get_label() for line in curves] == [summary.race_label(contender) for contender in contenders]
    assert len({line.get_color() for line in curves}) == 4


def test_a_race_won_but_not_by_the_inverse():
    (kind, _), (inverse_kind, text) = _texts(_race(tp=0.5, bp=None, identity=0.4))
    assert kind == "win"
    assert inverse_kind == "level"
    assert text.startswith("But that the inverse is what helps is not shown here: a control is as fast.")


def test_without_both_controls_nothing_is_claimed_for_the_inverse():
    _, (kind, text) = _texts(_race(tp=0.5, bp=1.0, identity=0.8))
    assert kind == "note"
    assert text.startswith("Nothing is claimed for the inverse itself here.")
    assert text.endswith("Random feedback did not run.")


def test_a_lost_race_is_called_one():
    (kind, text), _ = _texts(_race(tp=None, bp=0.5, identity=None))
    assert kind == "loss"
    assert "TP passes 90% in none of 3 seeds" in text
    assert text.endswith("A loss for TP: BP is there before it, whatever the seed.")


def test_few_seeds_are_no_verdict():
    (kind, text), _ = _texts([_run("tp", "tp", 0, 0.5), _run("bp", "bp", 0, 1.0)])
    assert kind == "note"
    assert text.endswith("With fewer than 3 seeds of each this is no verdict.")


def test_the_report_is_whole_and_stands_alone(tmp_path):
    scales = {"tp": 1.5, "tp-local": 1.2, "bp": 1.0, "nn.RNN": 3.0}
    records = [
        _cell(T, name, (1e-4 + model.operations("bp", T, N, 16, 1) / 1e10) * scale, N=N)
        for T in (16, 64, 256, 784)
        for N in (64, 256)
        for name, scale in scales.items()
    ]
    records += [*_race(0.5, 1.0, 0.8), _run("tp", "tp", 100, 0.7, phase="search")]
    records.append(_cell(3072, "tp", 1.0, passed=False))
    records.append(_cell(3072, "bp", 1.0))
    findings = report.write(records, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "http" not in page
    assert "data:image/png;base64," in page
    assert 'class="failed"' in page
    assert all(finding.text.split("'")[0][:40] in page for finding in findings)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["records"]) == len(records)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == len(records) + 1
    ratios = (tmp_path / "ratios.md").read_text()
    head, _, first, *_ = (line for line in ratios.splitlines() if line.startswith("|"))
    assert head.startswith("| T | B | N | TP, ms | TP / BP, same kernels | TP / torch.nn.RNN |")
    assert re.fullmatch(r"\| 16 \| 16 \| 64 \| \d+\.\d\d \| 1\.50 \| 0\.50 \| .*", first)
    assert "| 3072 | 16 | 64 | – | – | – |" in ratios  # its check failed: no ratio
    standings = (tmp_path / "standings.md").read_text()
    assert re.search(r"\| TP \| 0\.001 \| 3 of 3 \| 51 \(50 to 52\) \| 0\.51 \(0\.5 to 0\.52\) \| ", standings)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"time_tp_over_bp.png", "memory_tp_over_nn.RNN.png", "model.png"} < pictures
    assert any(name.startswith("race_digits") for name in pictures)


def test_ratios_name_what_differs_between_cells(tmp_path):
    records = [_cell(16, name, scale) for name, scale in (("tp", 3.0), ("bp", 2.0))]
    records += [record | {"threads": 2, "key": record["key"] + "2"} for record in records]
    report.write(records, tmp_path)
    rows = [line for line in (tmp_path / "ratios.md").read_text().splitlines() if line.startswith("|")]
    assert rows[0].startswith("| T | B | N | threads | TP, ms |")
    assert [row.split(" | ")[:4] for row in rows[2:]] == [["| 16", "16", "64", "1"], ["| 16", "16", "64", "2"]]


# --- all of it --------------------------------------------------------------------------------------------------------

_MAP = ["map", "--T", "3,4", "--N", "5", "--B", "2", "--contenders", "tp,bp", "--seconds", "0.01", "--min-rounds", "2"]


def test_an_interrupted_map_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    measured = []

    def measure_cell(case: Case, *rest: object) -> list[dict]:
        if len(measured) == interrupt_after:
            raise KeyboardInterrupt
        measured.append(case.T)
        return original(case, *rest)

    original = measure.measure_cell
    monkeypatch.setattr(measure, "measure_cell", measure_cell)
    arguments = [*_MAP, "--no-memory", "--out", str(tmp_path)]
    interrupt_after = 1
    assert command.main(arguments) == 130
    assert measured == [3]
    assert "interrupted: 2 records kept" in capsys.readouterr().out
    interrupt_after = None
    assert command.main(arguments) == 0
    assert measured == [3, 4]
    assert command.main(arguments) == 0
    assert measured == [3, 4]
    assert len((tmp_path / store.RECORDS).read_text().splitlines()) == 4


def test_a_tiny_map_from_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tp_kernels.regimes", *_MAP, "--out", "run"],
        cwd=tmp_path, capture_output=True, text=True, env=_environment(), check=True,
    )  # fmt: skip
    assert "A step of TP costs" in done.stdout
    assert "index.html" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / store.RECORDS).read_text().splitlines()]
    assert all(record["gate"]["passed"] and record["peak_bytes"] is not None for record in records)


@pytest.mark.parametrize("command_", [[], ["map"], ["race"], ["report"]])
def test_help_reads(command_, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main([*command_, "--help"])
    assert exit_.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_presets_are_sound():
    for preset in PRESETS.values():
        assert set(preset.grid.contenders) <= set(CONTENDERS)
        assert preset.grid.cases()


@pytest.mark.parametrize("flags", [["--benchmark", "--collect-only"], ["benchmarks", "--benchmark-disable"]])
def test_benchmarks_by_their_flag(flags):
    pytest.importorskip("pytest_benchmark")
    # A worker of pytest-xdist says so to its children, and there are no benchmarks in one.
    environment = {name: value for name, value in _environment().items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_regimes" not in done.stdout
    if "--collect-only" in flags:
        assert "bench_step[rnn-T784" in done.stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""), "COLUMNS": "200"}
