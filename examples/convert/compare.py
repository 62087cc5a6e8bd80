"""What the examples share: one model, trained with ``torch.nn``, with ours under ``BackProp()`` and under a rule."""

import argparse
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

import tp_kernels as tp

RULES = {
    "tp": tp.TargetProp(),
    "identity": tp.TargetProp(inverse="identity"),
    "local": tp.TargetProp(update="local"),
    "power-1": tp.TargetProp(power=1.0),
}


def compare(
    description: str,
    make: Callable[[int], nn.Module],
    train: Callable[[nn.Module, int], list[float]],
    arguments: Sequence[str] | None = None,
) -> dict[str, list[float]]:
    """Trains the same model on the same data three times, and prints the last losses.

    Args:
        description: of the example, for ``--help``.
        make: the model, of ``torch.nn`` only, given its hidden size.
        train: trains it for so many steps, and returns the loss of each.
        arguments: of the command line; ``None`` is those that the script was called with.

    Returns:
        The losses of every step, "torch.nn", "BackProp()" and by the name of the rule.

    Raises:
        AssertionError: the last losses of the first two differ by more than 1e-5, relatively.
        UserWarning: a state that a layer returned was changed, or a layer was not swapped.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=30, help="of the optimizer (30)")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size (64)")
    parser.add_argument("--rule", choices=RULES, default="tp", help="of the third training (tp)")
    options = parser.parse_args(arguments)
    losses = {}
    ways = {"torch.nn": None, "BackProp()": tp.BackProp(), options.rule: RULES[options.rule]}
    for name, rule in ways.items():
        torch.manual_seed(0)
        model = make(options.hidden)
        with warnings.catch_warnings():
            for message in (".*no displacement goes back", "nn.convert"):
                warnings.filterwarnings("error", message=message, category=UserWarning)
            if rule is not None:
                model = tp.nn.convert(model, rule)
            losses[name] = train(model, options.steps)
        print(f"{name:>10}: loss {losses[name][0]:.6f} at first, {losses[name][-1]:.6f} after {options.steps} steps")
    last, of_ours = losses["torch.nn"][-1], losses["BackProp()"][-1]
    assert math.isclose(last, of_ours, rel_tol=1e-5), f"torch.nn ends at {last}, BackProp() at {of_ours}"
    return losses
