"""The race: seconds and steps until the running test accuracy of a task passes the task's bar.

Each contender searches a grid of step sizes, as many points for every one of them, on the validation set and with
seeds of its own; the chosen point then runs on fresh seeds and the test set. Contenders of one seed start from the
same weights and see the same batches.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import tp_kernels as tp
from tp_kernels._json import finite
from tp_kernels.regimes.store import key_of
from tp_kernels.regimes.tasks import TASKS, Task, make_task
from tp_kernels.rules import BackProp, Rule, TargetProp

RUNNING_WINDOW = 3
"""The running accuracy is the mean of this many evaluations, the latest included; before that many there is none."""

OPTIMIZERS = ("adam", "sgd")
INITIALIZATIONS = ("default", "orthogonal", "rotation")
SCHEDULES = ("constant", "cosine")
CLIPPINGS = ("together", "apart")
# How far "rotation" is from the identity: its largest angles are about 2√2 times as much, in radians.
_ROTATION_ANGLE = 0.1
# Adam's gradient is clipped to this global norm; SGD's is not, as in the paper.
_CLIP = {"adam": 1.0, "sgd": None}
_FIRST_SEARCH_SEED = 100
# Batches and random feedback come from streams of their own: the seed alone also draws the weights.
_BATCH_SEED = 1_000_000
_FEEDBACK_SEED = 2_000_000
_EVALUATED_AT_ONCE = 1000

Progress = Callable[[str, int, int], None]


def _choose_word(argument: str, value: object, words: Sequence[str]) -> None:
    if value not in words:
        raise ValueError(f"race: {argument} must be one of {', '.join(map(repr, words))}, got {value!r}")


# --- contenders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way to train the same net.

    Attributes:
        name: as in the plan and the records.
        role: "tp", "bp" or "control".
        rule: what backward computes; ``None``: ``torch.nn.RNN`` as it is.
        two_step_sizes: one step size for the readout, another for the recurrent layer.
        frozen: the recurrent layer keeps its first weights and only the readout is trained.
        feedback: what takes the place of the rule's inverse P: "random", an orthogonal matrix, fixed for the run;
            "first", P of the first weights, fixed; "transpose", the transpose of the weights as they are. ``None``: P.
        refresh: at every how many steps P is computed.
        learned: the update of a ``LearnedInverse``, which takes the place of the layer; ``None``: no such.
    """

    name: str
    role: str
    rule: Rule | None
    two_step_sizes: bool = False
    frozen: bool = False
    feedback: str | None = None
    refresh: int = 1
    learned: str | None = None

    def grid(self, step_sizes: Sequence[float], ratio: float) -> tuple["StepSizes", ...]:
        """One point per step size, so that all contenders get the same number of trials.

        With two step sizes, the readout gets the one at hand and the recurrent layer ``ratio`` times as much.
        """
        if self.frozen:
            return tuple(StepSizes(readout=size, recurrent=0.0) for size in step_sizes)
        if self.two_step_sizes:
            # Rounded, so that a record says 0.0003 and not 0.00030000000000000003.
            return tuple(StepSizes(readout=size, recurrent=float(f"{size * ratio:.6g}")) for size in step_sizes)
        return tuple(StepSizes(all=size) for size in step_sizes)


@dataclass(frozen=True)
class StepSizes:
    """``all``, or ``readout`` and ``recurrent`` (0: frozen)."""

    all: float | None = None
    readout: float | None = None
    recurrent: float | None = None

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("tp", "tp", TargetProp()),
        Contender("tp-two", "tp", TargetProp(), two_step_sizes=True),
        Contender("tp-local", "tp", TargetProp(update="local")),
        Contender("tp-power1", "tp", TargetProp(power=1.0)),
        # The paper's inverse with the update of its formula, and with the update of its released code. The plan
        # gives each task its r.
        Contender("tp-paper-local", "tp", TargetProp(inverse="layer", update="local")),
        Contender("tp-paper", "tp", TargetProp(inverse="layer", update="total")),
        Contender("tp-refresh8", "tp", TargetProp(), refresh=8),
        Contender("tp-jacobian", "tp", TargetProp(inverse="jacobian")),
        Contender("tp-difference", "tp", TargetProp(inverse="layer", mode="difference")),
        Contender("tp-direct", "tp", TargetProp(inverse="layer", mode="direct")),
        Contender("tp-learned", "control", None, learned="local"),
        Contender("tp-learned-total", "control", None, learned="total"),
        Contender("tp-identity", "control", TargetProp(inverse="identity")),
        Contender("tp-identity-two", "control", TargetProp(inverse="identity"), two_step_sizes=True),
        Contender("tp-random", "control", TargetProp(), feedback="random"),
        Contender("tp-random-two", "control", TargetProp(), feedback="random", two_step_sizes=True),
        Contender("tp-first", "control", TargetProp(), feedback="first"),
        Contender("tp-transpose", "control", TargetProp(), feedback="transpose"),
        Contender("bp", "bp", BackProp()),
        Contender("bp-two", "bp", BackProp(), two_step_sizes=True),
        Contender("nn.RNN", "bp", None),
        Contender("frozen", "control", BackProp(), frozen=True),
    )
}


@lru_cache
def contender_of(name: str) -> Contender:
    """One of ``CONTENDERS``, or one with numbers and words of its rule in place of its own, after colons.

    Raises:
        ValueError: there is no such contender, it has no such number or word, or its rule cannot be so.

    Example:
        >>> contender_of("tp-two:reg=0.01").rule.reg
        0.01
    """
    base, *changes = name.split(":")
    _choose_word("contenders", base, tuple(CONTENDERS))
    contender = CONTENDERS[base]
    if not changes:
        return contender
    if not isinstance(contender.rule, TargetProp):
        raise ValueError(f"race: contenders must be of TargetProp to be changed after ':', got {name!r}")
    given = dict(change.partition("=")[::2] for change in changes)
    settable = {f.name: getattr(contender.rule, f.name) for f in fields(TargetProp)}
    for option in given:
        _choose_word("contenders, after ':',", option, tuple(settable))
    try:
        values = {option: type(settable[option])(text) for option, text in given.items()}
        return replace(contender, name=name, rule=replace(contender.rule, **values))
    except ValueError as error:
        raise ValueError(f"race: contenders must have a rule that there is, got {name!r}: {error}") from error


# --- what to run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RaceSpec:
    """One run: everything that its result depends on, but for the machine.

    ``steps`` is the most it takes; with ``stop_at_bar`` it stops once the bar is passed and ``floor`` steps are done.
    The schedule "cosine" takes the step sizes down to zero over ``steps``. ``beta2`` is Adam's β₂, ``None`` with SGD.
    ``clip`` is the largest norm of the gradient: of all of it with the clipping "together", of the readout's and of the
    layer's with "apart". The phase decides the set that accuracy is measured on:
    "search" the validation set, "final" the test set.
    """

    task: str
    T: int
    N: int
    B: int
    contender: str
    rule: Rule | None
    optimizer: str
    beta2: float | None
    schedule: str
    initialization: str
    step_sizes: StepSizes
    grid: tuple[StepSizes, ...]
    clip: float | None
    clipping: str
    seed: int
    phase: str
    steps: int
    floor: int
    evaluate_every: int
    bar: float
    stop_at_bar: bool = True
    device: str = "cpu"
    data: str | None = None

    @property
    def key(self) -> str:
        """Canonical JSON: equal for equal runs, now and after a restart. The grid is not part of a run."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grid"}
        content["step_sizes"] = self.step_sizes.to_dict()
        content["rule"] = None if self.rule is None else {"name": type(self.rule).__name__, **asdict(self.rule)}
        return key_of({"kind": "run", **content})


@dataclass(frozen=True)
class Setting:
    """One task at one size, with its contenders and their grids of equal length."""

    task: str
    T: int
    N: int
    B: int
    optimizer: str
    beta2: float | None
    schedule: str
    clipping: str
    initialization: str
    steps: int
    floor: int
    evaluate_every: int
    bar: float
    contenders: tuple[str, ...]
    grids: tuple[tuple[StepSizes, ...], ...]
    rules: tuple[Rule | None, ...]
    search_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    stop_at_bar: bool = True
    device: str = "cpu"
    data: str | None = None

    def __post_init__(self) -> None:
        trials = {name: len(grid) for name, grid in zip(self.contenders, self.grids, strict=True)}
        if len(set(trials.values())) > 1:
            raise ValueError(f"race: grids must have one length for every contender, got {trials}")
        if set(self.search_seeds) & set(self.seeds):
            raise ValueError(f"race: search_seeds must differ from seeds {self.seeds}, got {self.search_seeds}")

    def _spec(self, index: int, step_sizes: StepSizes, seed: int, phase: str) -> RaceSpec:
        shared = {f.name: getattr(self, f.name) for f in fields(RaceSpec) if hasattr(self, f.name)}
        return RaceSpec(
            **shared,
            contender=self.contenders[index],
            rule=self.rules[index],
            step_sizes=step_sizes,
            grid=self.grids[index],
            clip=_CLIP[self.optimizer],
            seed=seed,
            phase=phase,
        )

    def search(self, contender: str) -> list[RaceSpec]:
        """The trials of a contender. A grid of one point leaves nothing to search."""
        index = self.contenders.index(contender)
        grid = self.grids[index]
        if len(grid) == 1:
            return []
        return [self._spec(index, point, seed, "search") for point in grid for seed in self.search_seeds]

    def final(self, contender: str, search_records: Sequence[Mapping[str, Any]]) -> list[RaceSpec]:
        """The runs of the point that the search chose, on fresh seeds."""
        index = self.contenders.index(contender)
        grid = self.grids[index]
        point = grid[0] if len(grid) == 1 else choose(grid, search_records)
        return [self._spec(index, point, seed, "final") for seed in self.seeds]

    def most_steps(self) -> int:
        trials = len(self.grids[0]) * len(self.search_seeds) if len(self.grids[0]) > 1 else 0
        return len(self.contenders) * (trials + len(self.seeds)) * self.steps


@dataclass(frozen=True)
class RacePlan:
    """What a call of ``race`` runs."""

    settings: tuple[Setting, ...]

    def most_steps(self) -> int:
        """Training steps if no run stops early."""
        return sum(setting.most_steps() for setting in self.settings)


def choose(grid: Sequence[StepSizes], search_records: Sequence[Mapping[str, Any]]) -> StepSizes:
    """The point that passed the bar with the most seeds, then in the fewest steps, then the most accurate one.

    The accuracy is the highest running one; of equals the first in the grid.
    """

    def merit(point: StepSizes) -> tuple[float, float, float]:
        mine = [record for record in search_records if record["step_sizes"] == point.to_dict()]
        if not mine:
            raise ValueError(f"race: the search must have a record of every point of the grid, got none of {point}")
        passed = [record["steps_to_bar"] for record in mine if record["steps_to_bar"] is not None]
        mean_steps = sum(passed) / len(passed) if passed else math.inf
        return len(passed), -mean_steps, sum(record["best_accuracy"] for record in mine) / len(mine)

    return max(grid, key=merit)


# --- presets --------------------------------------------------------------------------------------------------------

# Readout and recurrent layer apart: the ratio of the two step sizes in the searches of bp-two.
_RATIO = {"adam": 0.1, "sgd": 0.01}
_ADAM_GRID = (1e-2, 3e-3, 1e-3, 3e-4)
_SGD_GRID = (1.0, 0.1, 0.01, 1e-3)
_COMPARED = ("tp", "tp-identity", "tp-random", "bp", "bp-two", "nn.RNN", "frozen")

_BASE = {
    "N": 64,
    "B": 20,
    "optimizer": "adam",
    "beta2": 0.999,
    "schedule": "constant",
    "clipping": "together",
    "initialization": "default",
    "steps": 6000,
    "floor": 200,
    "evaluate_every": 50,
    "contenders": _COMPARED,
    "step_sizes": _ADAM_GRID,
    "search_seeds": (_FIRST_SEARCH_SEED,),
    "seeds": (0, 1, 2),
}
# The paper's settings: SGD, N = 100, orthogonal start; r and γ_h are the paper's choice for each task, so tp-paper
# comes with a search done before ours. Its BP has one step size out of 1e-5 … 1e-2.
_PAPER = {
    "N": 100,
    "B": 20,
    "optimizer": "sgd",
    "beta2": 0.999,
    "schedule": "constant",
    "clipping": "together",
    "initialization": "orthogonal",
    "steps": 20_000,
    "floor": 200,
    "evaluate_every": 100,
    "contenders": ("tp-paper", "tp-paper-local", "tp", "tp-identity", "tp-random", "bp", "bp-two", "frozen"),
    "step_sizes": _SGD_GRID,
    "bp_step_sizes": (1e-2, 1e-3, 1e-4, 1e-5),
    "two_step_sizes": ((0.1, 1e-2), (0.1, 1e-3), (0.1, 1e-4), (0.01, 1e-3)),
    "search_seeds": (_FIRST_SEARCH_SEED,),
    "seeds": (0, 1, 2),
}

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "quick": (
        {
            **_BASE,
            "task": "digits",
            "T": 64,
            "B": 50,
            "initialization": "orthogonal",
            "steps": 800,
            "evaluate_every": 25,
            "floor": 100,
            "bar": 0.8,
            "contenders": ("tp", "bp", "bp-two", "frozen", "tp-identity", "tp-random"),
            "step_sizes": (1e-2, 3e-3, 1e-3),
        },
    ),
    "default": (
        {**_BASE, "task": "temporal-order", "T": 60},
        {**_BASE, "task": "temporal-order", "T": 120, "initialization": "orthogonal"},
        {**_BASE, "task": "adding", "T": 30},
        {**_BASE, "task": "adding-squared", "T": 30},
        {**_BASE, "task": "digits", "T": 64, "B": 50, "steps": 4000},
    ),
    "paper": (
        {**_PAPER, "task": "temporal-order", "T": 60, "reg": 10.0, "gamma": 0.01},
        {**_PAPER, "task": "temporal-order", "T": 120, "reg": 1.0, "gamma": 0.01},
        {**_PAPER, "task": "adding-squared", "T": 30, "reg": 1.0, "gamma": 0.1},
        {**_PAPER, "task": "digits28", "T": 784, "B": 16, "reg": 1.0, "gamma": 1e-4},
    ),
}
"""Settings by name. ``paper`` takes the up-sampled digits for the paper's MNIST: give ``task="idx"`` and ``data`` for
that one; its CIFAR, GRU and text settings are not here."""

_LISTS = ("task", "T", "N", "B", "seeds", "search_seeds", "contenders", "step_sizes", "bp_step_sizes")
_KNOWN = (
    *_LISTS,
    *("two_step_sizes", "optimizer", "beta2", "schedule", "clipping", "initialization", "steps", "floor"),
    *("evaluate_every", "bar", "reg", "gamma", "stop_at_bar", "device", "data"),
)


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple, range)) else (value,)


def _family(task: str) -> str:
    return (
        "images"
        if task.startswith(("digits", "idx"))
        else task.removesuffix("-3bit").removesuffix("-squared").removesuffix("-3")
    )


def _start(preset: tuple[dict[str, Any], ...], task: str, T: int | None) -> dict[str, Any]:
    """The preset's setting that is nearest to a task of the user's. Another task or T has a bar of its own."""

    def nearness(setting: dict[str, Any]) -> tuple[bool, bool, bool]:
        return _family(setting["task"]) == _family(task), setting["task"] == task, setting["T"] == T

    nearest = max(preset, key=nearness)
    dropped = set()
    if (nearest["task"], nearest["T"]) != (task, T):
        dropped.add("bar")
    if _family(nearest["task"]) != _family(task):
        dropped |= {"reg", "gamma"}
    return {name: value for name, value in nearest.items() if name not in dropped}


def _rule(contender: Contender, reg: float | None, gamma: float) -> Rule | None:
    if not contender.name.startswith("tp-paper"):
        return contender.rule
    numbers = {"step": gamma} if reg is None else {"step": gamma, "reg": reg}
    changed = {change.partition("=")[0] for change in contender.name.split(":")[1:]}  # by name: that holds
    return replace(contender.rule, **{name: value for name, value in numbers.items() if name not in changed})


def _setting(options: dict[str, Any]) -> Setting:
    """A setting of one task, T, N and B."""
    optimizer = options["optimizer"]
    _choose_word("optimizer", optimizer, OPTIMIZERS)
    _choose_word("schedule", options["schedule"], SCHEDULES)
    _choose_word("clipping", options["clipping"], CLIPPINGS)
    _choose_word("initialization", options["initialization"], INITIALIZATIONS)
    for name in ("N", "B", "steps", "evaluate_every"):
        if options[name] < 1:
            raise ValueError(f"race: {name} must be at least 1, got {options[name]}")
    if not 0 < options["beta2"] < 1:
        raise ValueError(f"race: beta2 must be in (0, 1), got {options['beta2']}")
    task = make_task(options["task"], options["T"], options.get("data"))
    contenders = [contender_of(name) for name in options["contenders"]]
    grids = []
    for contender in contenders:
        if contender.two_step_sizes and "two_step_sizes" in options:
            pairs = options["two_step_sizes"]
            grids.append(tuple(StepSizes(readout=readout, recurrent=recurrent) for readout, recurrent in pairs))
        else:
            own = "bp_step_sizes" if contender.role == "bp" and not contender.two_step_sizes else "step_sizes"
            grids.append(contender.grid(options.get(own, options["step_sizes"]), _RATIO[optimizer]))
    return Setting(
        task=task.name,
        T=task.T,
        N=options["N"],
        B=options["B"],
        optimizer=optimizer,
        beta2=options["beta2"] if optimizer == "adam" else None,
        schedule=options["schedule"],
        clipping=options["clipping"],
        initialization=options["initialization"],
        steps=options["steps"],
        floor=min(options["floor"], options["steps"]),
        evaluate_every=min(options["evaluate_every"], options["steps"]),
        bar=options.get("bar", task.bar),
        contenders=tuple(options["contenders"]),
        grids=tuple(grids),
        rules=tuple(_rule(contender, options.get("reg"), options.get("gamma", 1.0)) for contender in contenders),
        search_seeds=options["search_seeds"],
        seeds=options["seeds"],
        stop_at_bar=options.get("stop_at_bar", True),
        device=str(torch.device(options.get("device", "cpu"))),
        data=None if options.get("data") is None else str(options["data"]),
    )


def plan(preset: str | None = None, **overrides: Any) -> RacePlan:
    """What to run: a preset, with whatever the user gives in its place.

    Args:
        preset: "quick" (about a minute on two cores), "default", "paper"; ``None`` is "default".
        task, T, N, B: one or several; every combination is a setting. Without ``task`` and ``T`` the preset's own
            settings stay. With ``task`` alone each has its usual T.
        contenders: names in ``CONTENDERS``, those of ``TargetProp`` also with changes of their rule, as in
            "tp-two:reg=0.01" or "tp:power=1:reg=0.1".
        seeds: a number of seeds (0, 1, …), or the seeds themselves. ``search_seeds``: those of the search, a number of
            them (100, 101, …) or themselves; they must be others.
        step_sizes: the search grid, one trial a point and search seed; every contender gets as many. ``bp_step_sizes``
            is another grid of that length for "bp" and "nn.RNN", ``two_step_sizes`` pairs (readout, recurrent) for
            "bp-two" and other "-two"; without pairs these take the grid with a recurrent step size of 1/10 (Adam) or
            1/100 (SGD).
        optimizer: "adam" (gradient clipped to norm 1) or "sgd" (not clipped). clipping: "together" (the norm is that of
            the whole gradient) or "apart" (the readout's and the layer's are each clipped to it). beta2: Adam's β₂.
            schedule: "constant" or "cosine" (step sizes go down to zero over ``steps``). initialization: of the
            recurrent weight, "default" as in ``torch.nn.RNN``, "orthogonal", or "rotation" (orthogonal and near the
            identity).
        steps: the most a run takes; evaluate_every: steps between evaluations; floor: steps before a run may stop;
            stop_at_bar: whether it stops once the bar is passed; bar: the running accuracy to pass.
        reg, gamma: r and step γ of "tp-paper" and "tp-paper-local".
        device: "cpu", "cuda", …; data: a folder of IDX files for the tasks "idx" and "idx-permuted".

    Arguments that are ``None`` count as not given.

    Raises:
        TypeError: an unknown argument.
        ValueError: an unknown word, an impossible T, or grids of different lengths.

    Example:
        >>> quick = plan("quick", seeds=2)
        >>> quick.settings[0].contenders, quick.settings[0].seeds
        (('tp', 'bp', 'bp-two', 'frozen', 'tp-identity', 'tp-random'), (0, 1))
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    unknown = set(given) - set(_KNOWN)
    if unknown:
        raise TypeError(f"race: plan takes {', '.join(_KNOWN)}, got {', '.join(sorted(unknown))}")
    preset = "default" if preset is None else preset
    _choose_word("preset", preset, tuple(PRESETS))
    for name, first in (("seeds", 0), ("search_seeds", _FIRST_SEARCH_SEED)):
        if isinstance(given.get(name), int):
            given[name] = tuple(range(first, first + given[name]))
    given.update({name: _as_tuple(given[name]) for name in _LISTS if name in given})
    for name in ("seeds", "search_seeds", "contenders", "step_sizes", "task", "T", "N", "B"):
        if given.get(name) == ():
            raise ValueError(f"race: {name} must not be empty")

    starts = PRESETS[preset]
    if "task" in given or "T" in given:
        tasks = given.pop("task", tuple(dict.fromkeys(setting["task"] for setting in starts)))
        for task in tasks:
            _choose_word("task", task, tuple(TASKS))
        lengths = given.pop("T", None)
        starts = [
            {**_start(starts, task, T), "task": task, "T": T} for task in tasks for T in (lengths or (TASKS[task],))
        ]
    settings = []
    for start in starts:
        # A user's grid is for everyone, and another optimizer has step sizes of another size.
        optimizer = given.get("optimizer", start["optimizer"])
        if optimizer == "sgd" and "beta2" in given:
            raise ValueError(f"race: beta2 must be left out where the optimizer is 'sgd', got {given['beta2']}")
        changed = optimizer != start["optimizer"]
        if changed or "step_sizes" in given:
            start = {name: value for name, value in start.items() if not name.endswith("step_sizes")}
            start["step_sizes"] = _ADAM_GRID if given.get("optimizer", "adam") == "adam" else _SGD_GRID
        for N in given.get("N", (start["N"],)):
            for B in given.get("B", (start["B"],)):
                settings.append(_setting({**start, **given, "N": N, "B": B}))
    return RacePlan(tuple(settings))


# --- one run --------------------------------------------------------------------------------------------------------

_task = lru_cache(make_task)


def build(spec: RaceSpec, task: Task) -> nn.ModuleDict:
    """The net: "rnn", one tanh layer of N, and "readout", linear on its last states. One seed, one net.

    Every contender's is made as ``torch.nn.RNN`` and then converted, so that all of them start alike.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        rnn = nn.RNN(task.input_size, spec.N)
        if spec.initialization == "orthogonal":
            nn.init.orthogonal_(rnn.weight_hh_l0)
        elif spec.initialization == "rotation":
            _rotation_(rnn.weight_hh_l0)
        model = nn.ModuleDict({"rnn": rnn, "readout": nn.Linear(spec.N, task.output_size)})
    if spec.rule is not None:
        tp.nn.convert(model, spec.rule)
    contender = contender_of(spec.contender)
    if contender.learned is not None:
        model["rnn"] = _with_learned_inverse(rnn, spec, contender.learned)
    if contender.refresh > 1:
        model["rnn"].refresh = contender.refresh
    if contender.frozen:
        model["rnn"].requires_grad_(False)
    model.to(spec.device)
    if contender.feedback is not None:
        model["rnn"].feedback = _feedback(spec, model["rnn"].weight_hh_l0.detach())
    return model


@torch.no_grad()
def _rotation_(weight: Tensor) -> None:
    """The exponential of a random skew-symmetric matrix: orthogonal, and the smaller its angles the nearer to I."""
    half = torch.randn_like(weight) * (_ROTATION_ANGLE / math.sqrt(len(weight)))
    weight.copy_(torch.linalg.matrix_exp(half - half.T))


def _with_learned_inverse(rnn: nn.RNN, spec: RaceSpec, update: str) -> tp.nn.LearnedInverse:
    """The same layer, and an inverse from a random stream of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_FEEDBACK_SEED + spec.seed)
        learned = tp.nn.LearnedInverse(rnn.input_size, rnn.hidden_size, update=update)
    learned.load_state_dict(rnn.state_dict(), strict=False)
    return learned


def _feedback(spec: RaceSpec, weight: Tensor) -> Tensor:
    """The matrix in place of P."""
    kind = contender_of(spec.contender).feedback
    if kind == "transpose":
        return weight.mT  # the parameter's own memory: it follows the optimizer
    if kind == "first":
        return tp.regularized_inverse(weight, spec.rule.reg, power=spec.rule.power)
    generator = torch.Generator().manual_seed(_FEEDBACK_SEED + spec.seed)
    return nn.init.orthogonal_(torch.empty(spec.N, spec.N), generator=generator).to(weight.device)


def build_optimizer(spec: RaceSpec, model: nn.ModuleDict) -> torch.optim.Optimizer:
    """One group per part of the net that is trained."""
    sizes = spec.step_sizes
    per_part = (
        {"readout": sizes.readout, "rnn": sizes.recurrent} if sizes.all is None else dict.fromkeys(model, sizes.all)
    )
    groups = [
        {"params": [p for p in model[part].parameters() if p.requires_grad], "lr": size}
        for part, size in per_part.items()
    ]
    groups = [group for group in groups if group["params"]]
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, spec.beta2))


def build_schedule(spec: RaceSpec, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
    """What sets the step sizes after every step; ``None`` where they stay."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.steps) if spec.schedule == "cosine" else None


def batches(spec: RaceSpec, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """The run's batches, on its device. One seed, one stream, whoever the contender is."""
    generator = torch.Generator().manual_seed(_BATCH_SEED + spec.seed)
    while True:
        x, y = task.batch(generator, spec.B)
        yield x.to(spec.device), y.to(spec.device)


def _forward(model: nn.ModuleDict, task: Task, x: Tensor) -> tuple[Tensor, Tensor]:
    """All states, [T, B, N], and the output: [B, output_size], or [B, K, output_size] of the K > 1 steps answered."""
    h, last = model["rnn"](x)
    return h, model["readout"](last[0] if task.answers == 1 else h[-task.answers :].transpose(0, 1))


def _clock(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _evaluate(model: nn.ModuleDict, task: Task, x: Tensor, y: Tensor) -> dict[str, float]:
    """Over a held-out set: accuracy and mean loss, and what tells a collapse apart from slow learning: ``slope``, the
    mean of a'(z) over all states (near 0: saturated), and ``gain``, the largest singular value of W."""
    right = loss = slope = 0.0
    for part, answers in zip(x.split(_EVALUATED_AT_ONCE, 1), y.split(_EVALUATED_AT_ONCE), strict=True):
        h, output = _forward(model, task, part)
        right += task.correct(output, answers).sum().item() / task.answers
        loss += task.loss(output, answers).item() * len(answers)
        slope += (1 - h.square()).mean().item() * len(answers)
    weight = model["rnn"].weight_hh_l0.double()
    gain = torch.linalg.matrix_norm(weight, 2).item() if weight.isfinite().all() else math.inf
    return {"accuracy": right / len(y), "loss": loss / len(y), "slope": slope / len(y), "gain": gain}


def running_accuracy(curve: Sequence[Mapping[str, Any]]) -> float:
    """Mean accuracy of the last ``RUNNING_WINDOW`` evaluations of a curve.

    The first evaluation is of the untrained net, so the mean cannot pass a bar above chance by one lucky evaluation.
    """
    recent = curve[-RUNNING_WINDOW:]
    return sum(point["accuracy"] for point in recent) / len(recent)


def passed_at(curve: Sequence[Mapping[str, Any]], bar: float) -> tuple[int | None, float | None]:
    """Steps and seconds at the first evaluation whose running accuracy is at least ``bar``; ``None`` if there is none.

    Example:
        >>> curve = [{"step": s, "seconds": s / 10, "accuracy": a} for s, a in ((0, 0.0), (5, 0.9), (10, 0.9))]
        >>> passed_at(curve, 0.6), passed_at(curve, 0.7)
        ((10, 1.0), (None, None))
    """
    for end in range(1, len(curve) + 1):
        if running_accuracy(curve[:end]) >= bar:
            return curve[end - 1]["step"], curve[end - 1]["seconds"]
    return None, None


def _train(
    spec: RaceSpec, task: Task, model: nn.ModuleDict, curve: list[dict[str, Any]], on_steps: Callable[[int], None]
) -> str | None:
    """Fill the curve: a point an evaluation, with the mean norm of the gradients since the last one, before clipping.
    Returns why the run diverged, or ``None``.

    Seconds are those of forward, backward, clipping and the optimizer's step: batches are made beforehand, and
    evaluation is left out.
    """
    optimizer = build_optimizer(spec, model)
    schedule = build_schedule(spec, optimizer)
    trained = [group["params"] for group in optimizer.param_groups]  # the readout's and the layer's
    if spec.clipping == "together":
        trained = [[parameter for group in trained for parameter in group]]
    x_held_out, y_held_out = (
        tensor.to(spec.device) for tensor in task.held_out("test" if spec.phase == "final" else "validation")
    )

    def backward(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(_forward(model, task, x)[1], y)
        loss.backward()
        return loss.detach()

    def evaluate(step: int, seconds: float, gradient: float | None) -> bool:
        found = _evaluate(model, task, x_held_out, y_held_out)
        curve.append(finite({"step": step, "seconds": seconds, **found, "gradient": gradient}))
        return math.isfinite(found["loss"])

    stream = batches(spec, task)
    step, seconds = 0, 0.0
    evaluate(step, seconds, None)
    # A first call pays for loading and compiling kernels; nothing of it is left but the gradients, zeroed later.
    backward(*next(batches(spec, task)))
    while step < spec.steps:
        chunk = [next(stream) for _ in range(min(spec.evaluate_every, spec.steps - step))]
        total, norms = torch.zeros((), device=spec.device), torch.zeros((), device=spec.device)
        begin = _clock(spec.device)
        for x, y in chunk:
            total += backward(x, y)
            if spec.clip is not None:
                found = [nn.utils.clip_grad_norm_(parameters, spec.clip) for parameters in trained]
                norms += torch.linalg.vector_norm(torch.stack(found))
            optimizer.step()
            if schedule is not None:
                schedule.step()
        seconds += _clock(spec.device) - begin
        step += len(chunk)
        on_steps(step)
        gradient = None if spec.clip is None else norms.item() / len(chunk)
        if not evaluate(step, seconds, gradient) or not math.isfinite(total.item()):
            return f"the loss is not finite by step {step}"
        if spec.stop_at_bar and step >= spec.floor and passed_at(curve, spec.bar)[0] is not None:
            break
    return None


def _rule_words(spec: RaceSpec) -> str:
    if spec.rule is not None:
        return repr(spec.rule)
    update = contender_of(spec.contender).learned
    return "torch.nn.RNN" if update is None else f"LearnedInverse(update={update!r})"


def run(spec: RaceSpec, on_steps: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Train one net and return its record.

    ``steps_to_bar`` and ``seconds_to_bar`` are at the first evaluation whose running accuracy passes the bar, or
    ``None``. ``final_accuracy`` is the last running accuracy, at the step where the run stopped, and ``best_accuracy``
    the highest. A run that diverges, by a loss that is not finite or by a weight that has no regularized inverse, stops
    there with ``diverged`` true and the reason in ``message``.
    """
    task = _task(spec.task, spec.T, spec.data)
    model = build(spec, task)
    curve: list[dict[str, Any]] = []
    try:
        message = _train(spec, task, model, curve, on_steps)
    except torch.linalg.LinAlgError as error:
        message = str(error)
    steps_to_bar, seconds_to_bar = passed_at(curve, spec.bar)
    running = [running_accuracy(curve[:end]) for end in range(1, len(curve) + 1)]
    return {
        "kind": "run",
        "key": spec.key,
        "task": spec.task,
        "T": spec.T,
        "N": spec.N,
        "B": spec.B,
        "contender": spec.contender,
        "role": contender_of(spec.contender).role,
        "rule": _rule_words(spec),
        "feedback": contender_of(spec.contender).feedback,
        "phase": spec.phase,
        "optimizer": spec.optimizer,
        "beta2": spec.beta2,
        "schedule": spec.schedule,
        "clipping": spec.clipping,
        "initialization": spec.initialization,
        "step_sizes": spec.step_sizes.to_dict(),
        "grid": [point.to_dict() for point in spec.grid],
        "seed": spec.seed,
        "steps": curve[-1]["step"],
        "max_steps": spec.steps,
        "device": spec.device,
        "curve": curve,
        "bar": spec.bar,
        "steps_to_bar": steps_to_bar,
        "seconds_to_bar": seconds_to_bar,
        "final_accuracy": running[-1],
        "best_accuracy": max(running),
        "diverged": message is not None,
        "message": message,
    }


# --- all of them ----------------------------------------------------------------------------------------------------


def race(
    plan: RacePlan,
    done: Mapping[str, dict[str, Any]],
    on_record: Callable[[dict[str, Any]], None],
    progress: Progress | None = None,
) -> None:
    """Run what ``plan`` has and ``done`` has not: every contender's search, then the chosen points, seed by seed.

    Args:
        plan: from ``plan(...)``.
        done: records by key, of any kinds; nothing in it is run again.
        on_record: called with each record as its run ends. What it raises, and ``KeyboardInterrupt``, passes through:
            the records handed over until then stay.
        progress: called with a description, the steps behind us and the steps there are at most. A run that stops
            early counts in full.
    """
    records = dict(done)
    total, behind = plan.most_steps(), 0

    def ensure(spec: RaceSpec) -> dict[str, Any]:
        nonlocal behind
        if spec.key not in records:
            sizes = ", ".join(f"{name} {size:g}" for name, size in spec.step_sizes.to_dict().items())
            description = f"{spec.task} T={spec.T} {spec.contender} ({spec.phase}, step size {sizes}, seed {spec.seed})"

            def on_steps(step: int) -> None:
                if progress is not None:
                    progress(description, behind + step, total)

            on_steps(0)
            record = run(spec, on_steps)
            records[spec.key] = record
            on_record(record)
        behind += spec.steps
        return records[spec.key]

    for setting in plan.settings:
        finals = []
        for contender in setting.contenders:
            finals.append(setting.final(contender, [ensure(spec) for spec in setting.search(contender)]))
        # Seed by seed, so that contenders take turns and a machine that slows down slows all of them.
        for specs in zip(*finals, strict=True):
            for spec in specs:
                ensure(spec)
    if progress is not None:
        progress("race", total, total)
