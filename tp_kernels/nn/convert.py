"""``convert``: a model's recurrent layers swapped for this library's."""

import warnings

from torch import nn

from tp_kernels.nn._recurrent import Recurrent
from tp_kernels.nn.gru import GRU
from tp_kernels.nn.rnn import RNN
from tp_kernels.rules import Rule, resolve

OURS: dict[type[nn.RNNBase], type[Recurrent]] = {nn.RNN: RNN, nn.GRU: GRU}


def _why_not(module: nn.RNNBase) -> str | None:
    """Why this layer of ``torch.nn`` cannot be swapped; ``None`` if it can."""
    if type(module) not in OURS:
        return f"it is a subclass, {type(module).__name__}, whose own code would be lost"
    if module.num_layers > 1:
        return f"num_layers={module.num_layers} is not implemented yet"
    if module.bidirectional:
        return "bidirectional=True is not implemented yet"
    names = ["weight_ih_l0", "weight_hh_l0", *(["bias_ih_l0", "bias_hh_l0"] if module.bias else [])]
    if sorted(module._parameters) != sorted(names) or any(
        parameter is None for parameter in module._parameters.values()
    ):
        return f"its parameters are not {', '.join(names)}"
    if module._buffers or module._modules:
        return "it has buffers or modules of its own"
    plain = type(module)(1, 1, device="meta")
    if any(getattr(module, name) for name in vars(plain) if name.endswith("_hooks")):
        return "it has hooks"
    extra = sorted(set(vars(module)) - set(vars(plain)))
    return f"it has attributes of its own: {', '.join(extra)}" if extra else None


def _swapped(module: nn.RNNBase, rule: Rule) -> Recurrent:
    words = ("input_size", "hidden_size", "bias", "batch_first", "dropout")
    options = {word: getattr(module, word) for word in words}
    if type(module) is nn.RNN:
        options["nonlinearity"] = module.nonlinearity
    # On "meta" no memory is taken and no random number is drawn: the parameters are shared below.
    new = OURS[type(module)](**options, device="meta", rule=rule)
    for name, parameter in module.named_parameters(remove_duplicate=False):  # biases may be tied
        setattr(new, name, parameter)
    return new.train(module.training)


def convert(model: nn.Module, rule: Rule | None = None) -> nn.Module:
    """Swap every ``torch.nn.RNN`` and ``torch.nn.GRU`` in ``model`` for this library's, in place, sharing parameters.

    Optimizers that hold the parameters go on as they were. This library's layers already there get the new rule. What
    cannot be swapped (several layers, two directions, a subclass, a module with hooks) stays, with a ``UserWarning``
    that names it and says why. Where it raises, nothing has been changed.

    Args:
        model: any module. If it is itself such a layer, the swap is the returned module.
        rule: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.

    Returns:
        ``model``, or its replacement where it is itself swapped.

    Raises:
        TypeError: ``model`` is not a module, ``rule`` not a rule, or there is a ``LearnedInverse``, which takes none.
        ValueError: a rule that a GRU does not have.

    Example:
        >>> import torch, tp_kernels as tp
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.RNN(4, 8), "readout": torch.nn.Linear(8, 2)})
        >>> type(tp.nn.convert(model, tp.BackProp())["rnn"])
        <class 'tp_kernels.nn.rnn.RNN'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"nn.convert: model must be a torch.nn.Module, got {type(model).__name__}")
    rule = resolve("nn.convert", rule)
    ours = [module for module in model.modules() if isinstance(module, Recurrent)]
    for module in ours:
        module._resolved(rule)
    swaps: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, tuple(OURS)):
            reason = _why_not(module)
            if reason is None:
                swaps[module] = _swapped(module, rule)
            else:
                where, kind = repr(name) if name else "the model itself", _kind(module)
                warnings.warn(f"nn.convert: {where} stays a torch.nn.{kind}: {reason}", UserWarning, stacklevel=2)
    for module in ours:
        module.rule = rule
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a module's second name
            if child in swaps:
                setattr(parent, name, swaps[child])
    return swaps.get(model, model)


def _kind(module: nn.RNNBase) -> str:
    return next(theirs.__name__ for theirs in OURS if isinstance(module, theirs))
