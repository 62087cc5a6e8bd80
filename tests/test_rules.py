"""The rules: frozen, validated when made, and what they resolve to."""

import copy
import dataclasses
import math
import pickle

import pytest

import tp_kernels as tp
from tp_kernels.rules import Sweep, resolve

TargetProp, BackProp = tp.TargetProp, tp.BackProp


@pytest.mark.parametrize(
    ("arguments", "reg", "power"),
    [
        ({}, 1e-4, 0.5),
        ({"power": 1.0}, 0.25, 1.0),
        ({"power": 1}, 0.25, 1.0),
        ({"reg": 3}, 3.0, 0.5),
        ({"inverse": "layer"}, 0.25, 1.0),
        ({"inverse": "layer", "power": 0.5}, 1e-4, 0.5),
        ({"inverse": "identity"}, 0.25, 1.0),
        ({"inverse": "jacobian"}, 0.25, 1.0),
        ({"inverse": "layer", "mode": "difference"}, 0.25, 1.0),
        ({"inverse": "layer", "mode": "direct", "power": 0.5}, 1e-4, 0.5),
        ({"inverse": "layer", "reg": 0.7}, 0.7, 1.0),
    ],
    ids=str,
)
def test_defaults_follow_inverse_and_power(arguments, reg, power):
    rule = TargetProp(**arguments)
    assert (rule.reg, rule.power) == (reg, power)
    assert type(rule.reg) is type(rule.power) is float


def test_other_defaults():
    rule = TargetProp()
    assert (rule.inverse, rule.update, rule.mode) == ("weight", "total", "linearized")
    assert (rule.step, rule.clip, rule.rtol) == (1.0, 1e-3, 1e-4)


def test_paper():
    rule = TargetProp.paper()
    assert rule == TargetProp(reg=1.0, inverse="layer", update="local", mode="linearized", power=1.0, step=1.0)
    assert TargetProp.paper(reg=10.0, step=0.01) == dataclasses.replace(rule, reg=10.0, step=0.01)


@pytest.mark.parametrize("rule", [TargetProp(), TargetProp.paper(10, 0.01), TargetProp(power=1, clip=0.5), BackProp()])
def test_round_trips(rule):
    """By ``repr``, pickle and copy; equal rules are one key of a dictionary."""
    for again in (eval(repr(rule)), pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
        assert again == rule
        assert type(again) is type(rule)
        assert hash(again) == hash(rule)
    assert rule != (BackProp() if isinstance(rule, TargetProp) else TargetProp())


def test_frozen():
    rule = TargetProp()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.reg = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del rule.inverse
    with pytest.raises(dataclasses.FrozenInstanceError):
        BackProp().step = 1.0
    assert rule == TargetProp()


INVERSES = "'weight', 'layer', 'identity', 'jacobian'"
POSITIVE = "must be positive and finite"
ERRORS = {
    "inverse": ({"inverse": "pinv"}, ValueError, f"inverse must be one of {INVERSES}, got 'pinv'"),
    "inverse-none": ({"inverse": "none"}, ValueError, f"inverse must be one of {INVERSES}, got 'none'"),
    "inverse-list": ({"inverse": ["weight"]}, TypeError, "inverse must be a str, got list"),
    "update": ({"update": "both"}, ValueError, "update must be one of 'total', 'local', got 'both'"),
    "mode": ({"mode": 1}, TypeError, "mode must be a str, got int"),
    "mode-word": ({"mode": "x"}, ValueError, "mode must be one of 'linearized', 'difference', 'direct', got 'x'"),
    "jacobian": (
        {"inverse": "jacobian", "power": 0.5},
        ValueError,
        "power must be 1.0, inverse='jacobian' supports no other, got 0.5",
    ),
    "difference": (
        {"mode": "difference"},
        ValueError,
        "inverse must be 'layer' with mode='difference', got 'weight'",
    ),
    "direct": (
        {"mode": "direct", "inverse": "jacobian"},
        ValueError,
        "inverse must be 'layer' with mode='direct', got 'jacobian'",
    ),
    "power": ({"power": 0.0}, ValueError, "power must be one of 1.0, 0.5, got 0.0"),
    "power-nan": ({"power": math.nan}, ValueError, "power must be one of 1.0, 0.5, got nan"),
    "power-word": ({"power": "1"}, TypeError, "power must be a real number, got str"),
    "power-bool": ({"power": True}, TypeError, "power must be a real number, got bool"),
    "reg-zero": ({"reg": 0.0}, ValueError, f"reg {POSITIVE}, got 0.0"),
    "reg-negative": ({"reg": -1}, ValueError, f"reg {POSITIVE}, got -1"),
    "reg-nan": ({"reg": math.nan}, ValueError, f"reg {POSITIVE}, got nan"),
    "reg-inf": ({"reg": math.inf}, ValueError, f"reg {POSITIVE}, got inf"),
    "reg-word": ({"reg": "0.1"}, TypeError, "reg must be a real number, got str"),
    "reg-bool": ({"reg": True}, TypeError, "reg must be a real number, got bool"),
    "step-zero": ({"step": 0}, ValueError, f"step {POSITIVE}, got 0"),
    "step-inf": ({"step": math.inf}, ValueError, f"step {POSITIVE}, got inf"),
    "step-none": ({"step": None}, TypeError, "step must be a real number, got NoneType"),
    "clip-zero": ({"clip": 0.0}, ValueError, "clip must be in (0, 1), got 0.0"),
    "clip-one": ({"clip": 1}, ValueError, "clip must be in (0, 1), got 1"),
    "rtol-zero": ({"rtol": 0.0}, ValueError, "rtol must be in (0, 1), got 0.0"),
    "rtol-one": ({"rtol": 1.0}, ValueError, "rtol must be in (0, 1), got 1.0"),
    "rtol-nan": ({"rtol": math.nan}, ValueError, "rtol must be in (0, 1), got nan"),
    "rtol-word": ({"rtol": "tight"}, TypeError, "rtol must be a real number, got str"),
    "clip-complex": ({"clip": 1j}, TypeError, "clip must be a real number, got complex"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    arguments, kind, text = ERRORS[name]
    with pytest.raises(kind) as caught:
        TargetProp(**arguments)
    assert type(caught.value) is kind
    assert str(caught.value) == f"TargetProp: {text}"


def test_the_words_of_a_sweep():
    """One word says how a displacement goes back: the mode where it is not linearized."""
    words = {
        "none": BackProp(),
        "weight": TargetProp(),
        "layer": TargetProp.paper(),
        "identity": TargetProp(inverse="identity"),
        "jacobian": TargetProp(inverse="jacobian"),
        "difference": TargetProp(inverse="layer", mode="difference"),
        "direct": TargetProp(inverse="layer", mode="direct"),
    }
    assert {word: Sweep.of(rule).inverse for word, rule in words.items()} == {word: word for word in words}
    assert [word for word, rule in words.items() if Sweep.of(rule).uses_inverse] == [
        "weight",
        "layer",
        "difference",
        "direct",
    ]
    rule = TargetProp(0.5, "jacobian", "local", step=2.0, clip=0.2, rtol=0.1)
    assert Sweep.of(rule) == Sweep("jacobian", "local", step=2.0, clip=0.2, reg=0.5, rtol=0.1)


@pytest.mark.parametrize(
    "rule",
    [
        BackProp(),
        TargetProp(),
        TargetProp.paper(reg=10, step=0.01),
        TargetProp(1 / 3, inverse="jacobian", step=1e-300, rtol=0.1 + 0.2),
        TargetProp(inverse="layer", mode="direct", clip=5e-324),
    ],
    ids=str,
)
def test_a_sweep_in_words_and_back(rule):
    """An op is told a rule in words: to the last bit of its numbers."""
    assert rule.words == Sweep.of(rule).words
    assert Sweep.parse(rule.words) == Sweep.of(rule)
    assert "words" not in repr(rule)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "weight",
        "inverse=weight",
        Sweep().words + " first=0",
        Sweep().words.replace("rtol", "tol"),
        " ".join(reversed(Sweep().words.split())),
    ],
)
def test_words_that_are_no_sweep(words):
    with pytest.raises(ValueError, match="sweep must have the words") as caught:
        Sweep.parse(words)
    names = "inverse, update, step, clip, reg, rtol, power, blend, latch, chunk, overlap"
    assert str(caught.value) == f"sweep must have the words {names}, got {words!r}"


def test_the_numbers_of_a_sweep_are_numbers():
    with pytest.raises(ValueError, match="sweep must have a number as step, got"):
        Sweep.parse(Sweep().words.replace("step=1.0", "step=one"))


def test_resolve():
    rule = TargetProp(step=0.5)
    assert resolve("rnn", rule) is rule
    assert resolve("rnn", BackProp()) == BackProp()
    assert resolve("rnn", None) == TargetProp()
    with pytest.raises(TypeError) as caught:
        resolve("rnn", TargetProp)
    assert str(caught.value) == "rnn: rule must be a TargetProp, a BackProp or None, got type"
