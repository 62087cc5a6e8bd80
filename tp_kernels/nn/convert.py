"""``convert``: a model's recurrent layers and cells swapped for this library's, or back for those of ``torch.nn``."""

import warnings
from collections.abc import Callable

from torch import nn

from tp_kernels import _validate
from tp_kernels.nn._recurrent import Ruled
from tp_kernels.nn.cells import GRUCell, LSTMCell, RNNCell
from tp_kernels.nn.gru import GRU
from tp_kernels.nn.learned_inverse import LearnedInverse
from tp_kernels.nn.lstm import LSTM
from tp_kernels.nn.rnn import RNN
from tp_kernels.rules import Rule, resolve

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.GRU: GRU,
    nn.LSTM: LSTM,
    nn.RNNCell: RNNCell,
    nn.GRUCell: GRUCell,
    nn.LSTMCell: LSTMCell,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def _like(module: nn.Module, kind: type[nn.Module], **options: object) -> nn.Module:
    """A new module of that class, as this one is. On "meta" no memory is taken and no random number is drawn."""
    words = ["input_size", "hidden_size", "bias"]
    if isinstance(module, nn.RNNBase):
        words += ["num_layers", "batch_first", "bidirectional"]
    if hasattr(module, "nonlinearity"):
        words.append("nonlinearity")
    new = kind(**{word: getattr(module, word) for word in words}, device="meta", **options)
    if isinstance(module, nn.RNNBase):
        new.dropout = module.dropout  # with one layer the constructor would warn of it once more
    return new


def _why_not(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> str | None:
    """Why this module has no counterpart in ``classes``; ``None`` if it has."""
    if isinstance(module, LearnedInverse):
        return "it learns its inverse"
    if type(module) not in classes:
        return f"it is a subclass, {type(module).__name__}, whose own code would be lost"
    if getattr(module, "proj_size", 0):
        return f"proj_size={module.proj_size} is not implemented yet"
    if classes is THEIRS and getattr(module, "nonlinearity", "tanh") == "identity":
        return "torch.nn does not have nonlinearity='identity'"
    if classes is THEIRS and not getattr(module, "return_sequence", True):
        return "torch.nn does not have return_sequence=False"
    plain = _like(module, type(module))
    if {name for name, parameter in module._parameters.items() if parameter is not None} != {
        name for name, _ in plain.named_parameters()
    }:
        return f"its parameters are not {', '.join(name for name, _ in plain.named_parameters())}"
    if module._buffers.keys() != plain._buffers.keys() or module._modules.keys() - {"refreshed"}:
        return "it has buffers or modules of its own"
    if any(getattr(module, name) for name in vars(plain) if name.endswith("_hooks")):
        return "it has hooks"
    extra = sorted(vars(module).keys() - vars(plain).keys())
    return f"it has attributes of its own: {', '.join(extra)}" if extra else None


def _swapped(module: nn.Module, kind: type[nn.Module], **options: object) -> nn.Module:
    new = _like(module, kind, **options)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):  # biases may be tied
        setattr(new, name, parameter)
    return new.train(module.training)


def convert(
    model: nn.Module,
    rule: Rule | None = None,
    *,
    only: Callable[[str], bool] | None = None,
    to: str = "tp_kernels",
) -> nn.Module:
    """Swap the recurrent layers and cells of ``torch.nn`` in a model for this library's, in place, sharing parameters.

    Those are ``RNN``, ``GRU``, ``LSTM``, ``RNNCell``, ``GRUCell`` and ``LSTMCell``. Optimizers that hold the parameters
    go on as they were. This library's layers and cells already there get the new rule. A recurrent module that cannot
    be swapped (an LSTM with ``proj_size``, a subclass, a module with hooks) stays, with a ``UserWarning`` that names it
    and says why. Where it raises, nothing has been changed.

    Args:
        model: any module. If it is itself such a layer, the swap is the returned module.
        rule: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.
        only: is given the name of each module (as in ``model.named_modules()``), and says whether it is meant. ``None``
            is all of them.
        to: "tp_kernels", or "torch": this library's layers and cells become those of ``torch.nn`` again, with
            back-propagation and without a rule.

    Returns:
        ``model``, or its replacement where it is itself swapped.

    Warns:
        UserWarning: a recurrent module stays, or there is none to be swapped.

    Raises:
        TypeError: an argument is not of the stated kind, or there is a ``LearnedInverse``, which takes no rule.
        ValueError: a rule that a layer does not have; another word as ``to``; a rule with ``to="torch"``.

    Example:
        >>> import torch, tp_kernels as tp
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.RNN(4, 8), "readout": torch.nn.Linear(8, 2)})
        >>> type(tp.nn.convert(model, tp.BackProp())["rnn"])
        <class 'tp_kernels.nn.rnn.RNN'>
        >>> type(tp.nn.convert(model, to="torch")["rnn"])
        <class 'torch.nn.modules.rnn.RNN'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"nn.convert: model must be a torch.nn.Module, got {type(model).__name__}")
    _validate.word("nn.convert", "to", to, ("tp_kernels", "torch"))
    if only is not None and not callable(only):
        raise TypeError(f"nn.convert: only must be a function of a name or None, got {type(only).__name__}")
    if to == "torch" and rule is not None:
        raise ValueError(f"nn.convert: rule must be None with to='torch', whose layers have none, got {rule!r}")
    rule = resolve("nn.convert", rule)
    classes, options = (OURS, {"rule": rule}) if to == "tp_kernels" else (THEIRS, {})
    meant: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _RECURRENT) and module not in meant and (only is None or only(name)):
            meant[module] = name
    ruled = [module for module in meant if isinstance(module, Ruled)] if to == "tp_kernels" else []
    for module in ruled:
        module._resolved(rule)
    swaps: dict[nn.Module, nn.Module] = {}
    stay = []
    for module, name in meant.items():
        if isinstance(module, Ruled) == (to == "tp_kernels"):
            continue
        reason = _why_not(module, classes)
        if reason is None:
            swaps[module] = _swapped(module, classes[type(module)], **options)
        else:
            where = repr(name) if name else "the model itself"
            stay.append(f"{where} stays a {_kind(module)}: {reason}")
    for module in ruled:
        module.rule = rule
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a module's second name
            if child in swaps:
                setattr(parent, name, swaps[child])
    if not swaps and not ruled and not stay:
        library = "torch.nn" if to == "tp_kernels" else "tp_kernels.nn"
        stay = [f"nothing was swapped: no recurrent layer or cell of {library} was found"]
    for text in stay:
        warnings.warn(f"nn.convert: {text}", UserWarning, stacklevel=2)
    return swaps.get(model, model)


def _kind(module: nn.Module) -> str:
    """The class that it is one of."""
    for theirs, ours in OURS.items():
        if isinstance(module, ours):
            return f"tp_kernels.nn.{ours.__name__}"
        if isinstance(module, theirs):
            return f"torch.nn.{theirs.__name__}"
    return type(module).__name__
