"""Drop-in modules: swap ``torch.nn.RNN`` for ``tp_kernels.nn.RNN(rule=...)``."""

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tp_kernels import _validate
from tp_kernels._library import autocast_enabled
from tp_kernels.ops.rnn.feedback import RefreshedFeedback
from tp_kernels.ops.rnn.op import rnn_layer
from tp_kernels.rules import Rule, resolve, uses_inverse


class RNN(nn.Module):
    """Elman recurrent layer with the constructor, shapes and ``state_dict`` of ``torch.nn.RNN``, plus ``rule``.

    ``h_t = a(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)``. Initialization draws the same numbers in the same order as
    ``torch.nn.RNN``, so one seed gives one network.

    Args:
        input_size, hidden_size: M and N.
        num_layers: 1; more is not implemented yet.
        nonlinearity: "tanh", "relu" or "identity".
        bias: whether there are ``bias_ih_l0`` and ``bias_hh_l0``.
        batch_first: inputs and outputs are [B, T, ·] instead of [T, B, ·].
        dropout: 0; ``torch.nn.RNN`` applies it between layers, so with one layer it has no effect there either.
        bidirectional: ``False``; ``True`` is not implemented yet.
        device, dtype: of the parameters.
        rule: what backward computes: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.
        checkpoint_every: k >= 1: keep every k-th state for backward and compute the others again, k steps at a time,
            input projection included. ``None`` keeps all states.
        return_sequence: with ``False`` the first output is ``None``, and with ``checkpoint_every`` no array of
            T states exists at any time: memory grows with T/k + k.
        feedback: [N, N], a fixed matrix in place of the rule's inverse P, as a control of what P itself contributes. A
            buffer that is not in ``state_dict``. ``None`` is P.
        refresh: k >= 1: compute P at every k-th training pass only, and whenever the weight has moved by a tenth
            (Frobenius norm) since; in between the last P serves. 1, the default, is exact. Worth it where P is a large
            share of a step: short sequences, few of them, large N. Then gradients depend on the passes before, and
            ``LinAlgError`` is raised in forward. Of no use to rules without P, or with ``feedback``.
        displacements: "sweep", "parallel" or "auto", as in ``tp_kernels.rnn``.
        backend: of the recurrence, as in ``tp_kernels.rnn``.

    Shape:
        Input ``[T, B, M]`` (``[B, T, M]`` with ``batch_first``) or unbatched ``[T, M]``; ``hx``: ``[1, B, N]`` or
        ``[1, N]``, zero where it is left out. Output: all states ``[T, B, N]``, ``[B, T, N]`` or ``[T, N]``, and the
        last one ``[1, B, N]`` or ``[1, N]``.

    Under autocast the layer computes in the dtype of its parameters. Its output must not be changed in place: backward
    computes from it. There are no second derivatives, no forward mode, no transforms of ``torch.func`` but
    ``functional_call``, and no TorchScript: each raises.

    Raises:
        TypeError, ValueError: an argument of another kind, shape or value than stated.
        NotImplementedError: several layers, two directions, packed sequences.

    Example:
        >>> import torch, tp_kernels as tp
        >>> layer = tp.nn.RNN(4, 8, rule=tp.TargetProp())
        >>> output, last = layer(torch.randn(10, 2, 4))
        >>> output.shape, last.shape
        (torch.Size([10, 2, 8]), torch.Size([1, 2, 8]))
    """

    _NAME = "nn.RNN"  # in errors

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rule: Rule | None = None,
        checkpoint_every: int | None = None,
        return_sequence: bool = True,
        feedback: Tensor | None = None,
        refresh: int = 1,
        displacements: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            _validate.count(self._NAME, name, size)
        for name, value in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
            if not isinstance(value, bool):
                raise TypeError(f"{self._NAME}: {name} must be a bool, got {type(value).__name__}")
        if num_layers > 1:
            raise self._not_implemented(f"num_layers={num_layers}")
        if bidirectional:
            raise self._not_implemented("bidirectional=True")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"{self._NAME}: dropout must be a number in [0, 1], got {dropout!r}")
        _validate.word(self._NAME, "nonlinearity", nonlinearity, _validate.NONLINEARITIES)
        _validate.checkpoint_every(self._NAME, checkpoint_every)
        if not isinstance(return_sequence, bool):
            raise TypeError(f"{self._NAME}: return_sequence must be a bool, got {type(return_sequence).__name__}")
        _validate.backend(self._NAME, backend)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.nonlinearity = nonlinearity
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.rule = rule
        self.checkpoint_every = checkpoint_every
        _validate.displacements(self._NAME, displacements, self.rule, checkpoint_every)
        self.displacements = displacements
        self.return_sequence = return_sequence
        self.backend = backend
        kind = {"device": device, "dtype": dtype}
        self.weight_ih_l0 = nn.Parameter(torch.empty(hidden_size, input_size, **kind))
        self.weight_hh_l0 = nn.Parameter(torch.empty(hidden_size, hidden_size, **kind))
        if bias:
            self.bias_ih_l0 = nn.Parameter(torch.empty(hidden_size, **kind))
            self.bias_hh_l0 = nn.Parameter(torch.empty(hidden_size, **kind))
        _validate.feedback(self._NAME, feedback, self.weight_hh_l0, "weight_hh_l0", self.rule)
        self.register_buffer("feedback", feedback, persistent=False)
        self.refresh = refresh
        self.reset_parameters()

    @property
    def rule(self) -> Rule:
        """What backward computes. Assigning ``None`` means ``TargetProp()``."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule | None) -> None:
        self._rule = self._resolved(rule)
        self._forget_inverse()

    def _resolved(self, rule: Rule | None) -> Rule:
        """The rule that assigning this one gives, or an error."""
        return resolve(self._NAME, rule)

    @property
    def refresh(self) -> int:
        """At every how many training passes P is computed anew."""
        return 1 if self.refreshed is None else self.refreshed.refresh

    @refresh.setter
    def refresh(self, refresh: int) -> None:
        _validate.count(self._NAME, "refresh", refresh)
        self.refreshed = RefreshedFeedback(self.weight_hh_l0, refresh) if refresh > 1 else None

    def _forget_inverse(self) -> None:
        if getattr(self, "refreshed", None) is not None:
            self.refreshed.forget()

    def reset_parameters(self) -> None:
        """Uniform on ±1/√N, as in ``torch.nn.RNN``."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self._forget_inverse()

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels take the parameters as they are. Here for code written for ``torch.nn.RNN``."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        return [list(self.parameters())]

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        if isinstance(input, PackedSequence):
            raise self._not_implemented("a PackedSequence as input")
        if isinstance(input, Tensor) and autocast_enabled(input.device.type):
            input, hx = self._in_own_dtype(input), self._in_own_dtype(hx)
        self._check_parameters()
        self._check_input(input, hx)
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        h, last = self._states(
            x.transpose(0, 1) if self.batch_first else x, hx[0] if batched and hx is not None else hx
        )
        if h is not None:
            h = h.squeeze(1) if not batched else h.transpose(0, 1) if self.batch_first else h
        return h, last.unsqueeze(0) if batched else last

    def _not_implemented(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{self._NAME}: {what} is not implemented yet")

    def _in_own_dtype(self, value: object) -> object:
        """A floating-point tensor in the dtype of the parameters, whatever that of the layer before; the rest as is."""
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.weight_ih_l0.dtype) if floating else value

    def _feedback(self) -> Tensor | None:
        """The matrix to take in place of P; ``None``: P of the weight as it is."""
        if self.feedback is None and self.refreshed is not None and torch.is_grad_enabled() and uses_inverse(self.rule):
            return self.refreshed(self.weight_hh_l0, self.rule, self.backend)
        return self.feedback

    def _states(self, x: Tensor, h0: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The layer itself, on x: [T, B, M] and h0: [B, N]."""
        return rnn_layer(
            x,
            self.weight_ih_l0,
            self.bias_ih_l0 + self.bias_hh_l0 if self.bias else None,
            self.weight_hh_l0,
            h0,
            feedback=self._feedback(),
            nonlinearity=self.nonlinearity,
            rule=self.rule,
            checkpoint_every=self.checkpoint_every,
            displacements=self.displacements,
            return_sequence=self.return_sequence,
            backend=self.backend,
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by name."""
        M, N = self.input_size, self.hidden_size
        biases = {"bias_ih_l0": (N,), "bias_hh_l0": (N,)} if self.bias else {}
        return {"weight_ih_l0": (N, M), "weight_hh_l0": (N, N)} | biases

    def _check_parameters(self) -> None:
        """Parameters can be put in from outside; the kernels read them by their address."""
        for name, shape in self._shapes().items():
            parameter = getattr(self, name)
            if parameter.shape != shape:
                raise ValueError(f"{self._NAME}: {name} must have shape {shape}, got {tuple(parameter.shape)}")
            _validate.same_kind(self._NAME, name, parameter, "weight_ih_l0", self.weight_ih_l0)
        _validate.feedback(self._NAME, self.feedback, self.weight_hh_l0, "weight_hh_l0", self.rule)
        _validate.displacements(self._NAME, self.displacements, self.rule, self.checkpoint_every)

    def _check_input(self, input: Tensor, hx: Tensor | None) -> None:
        _validate.floating_tensor(self._NAME, "input", input)
        letters = "[B, T, M]" if self.batch_first else "[T, B, M]"
        if input.dim() not in (2, 3):
            raise ValueError(f"{self._NAME}: input must have shape {letters} or [T, M], got {tuple(input.shape)}")
        if input.shape[-1] != self.input_size:
            letters = letters if input.dim() == 3 else "[T, M]"
            raise ValueError(
                f"{self._NAME}: input must have shape {letters} with M = {self.input_size}, got {tuple(input.shape)}"
            )
        if input.shape[1 if self.batch_first and input.dim() == 3 else 0] == 0:
            raise ValueError(f"{self._NAME}: input must have at least one time step (T >= 1), got {tuple(input.shape)}")
        _validate.same_kind(self._NAME, "input", input, "weight_ih_l0", self.weight_ih_l0)
        _validate.numbers_of_rule(self._NAME, self.rule, self.nonlinearity, input.dtype)
        if hx is None:
            return
        _validate.floating_tensor(self._NAME, "hx", hx)
        if input.dim() == 2:
            letters, expected = "[1, N]", [1, self.hidden_size]
        else:
            letters, expected = "[1, B, N]", [1, input.shape[0 if self.batch_first else 1], self.hidden_size]
        if list(hx.shape) != expected:
            raise ValueError(f"{self._NAME}: hx must have shape {letters} = {expected}, got {tuple(hx.shape)}")
        _validate.same_kind(self._NAME, "hx", hx, "input", input)

    def extra_repr(self) -> str:
        words = [f"{self.input_size}, {self.hidden_size}"]
        if self.nonlinearity != "tanh":
            words.append(f"nonlinearity={self.nonlinearity!r}")
        if not self.bias:
            words.append("bias=False")
        if self.batch_first:
            words.append("batch_first=True")
        words.append(f"rule={self.rule!r}")
        if self.checkpoint_every is not None:
            words.append(f"checkpoint_every={self.checkpoint_every}")
        if not self.return_sequence:
            words.append("return_sequence=False")
        if self.feedback is not None:
            words.append("feedback=...")
        if self.displacements != "auto":
            words.append(f"displacements={self.displacements!r}")
        if self.refresh > 1:
            words.append(f"refresh={self.refresh}")
        if self.backend != "auto":
            words.append(f"backend={self.backend!r}")
        return ", ".join(words)


def _why_not(module: nn.RNN) -> str | None:
    """Why this ``torch.nn.RNN`` cannot be swapped; ``None`` if it can."""
    if type(module) is not nn.RNN:
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
    plain = nn.RNN(1, 1, device="meta")
    if any(getattr(module, name) for name in vars(plain) if name.endswith("_hooks")):
        return "it has hooks"
    extra = sorted(set(vars(module)) - set(vars(plain)))
    return f"it has attributes of its own: {', '.join(extra)}" if extra else None


def _swapped(module: nn.RNN, rule: Rule) -> RNN:
    # On "meta" no memory is taken and no random number is drawn: the parameters are shared below.
    new = RNN(
        module.input_size,
        module.hidden_size,
        nonlinearity=module.nonlinearity,
        bias=module.bias,
        batch_first=module.batch_first,
        dropout=module.dropout,
        device="meta",
        rule=rule,
    )
    for name, parameter in module.named_parameters(remove_duplicate=False):  # biases may be tied
        setattr(new, name, parameter)
    return new.train(module.training)


def convert(model: nn.Module, rule: Rule | None = None) -> nn.Module:
    """Swap every ``torch.nn.RNN`` in ``model`` for ``tp_kernels.nn.RNN`` in place, sharing the parameters.

    Optimizers that hold the parameters go on as they were. ``tp_kernels.nn.RNN`` modules already there get the new
    rule. What cannot be swapped (several layers, two directions, a subclass, a module with hooks) stays, with a
    ``UserWarning`` that names it and says why.

    Args:
        model: any module. If it is itself a ``torch.nn.RNN``, the swap is the returned module.
        rule: ``TargetProp(...)``, ``BackProp()``; ``None`` is ``TargetProp()``.

    Returns:
        ``model``, or its replacement where it is itself a ``torch.nn.RNN``.

    Raises:
        TypeError: ``model`` is not a module or ``rule`` not a rule.

    Example:
        >>> import torch, tp_kernels as tp
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.RNN(4, 8), "readout": torch.nn.Linear(8, 2)})
        >>> type(tp.nn.convert(model, tp.BackProp())["rnn"])
        <class 'tp_kernels.nn.rnn.RNN'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"nn.convert: model must be a torch.nn.Module, got {type(model).__name__}")
    rule = resolve("nn.convert", rule)
    ours = [module for module in model.modules() if isinstance(module, RNN)]
    for module in ours:
        module._resolved(rule)  # one that takes no rule raises before anything is changed
    for module in ours:
        module.rule = rule
    swaps: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.RNN):
            reason = _why_not(module)
            if reason is None:
                swaps[module] = _swapped(module, rule)
            else:
                where = repr(name) if name else "the model itself"
                warnings.warn(f"nn.convert: {where} stays a torch.nn.RNN: {reason}", UserWarning, stacklevel=2)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a module's second name
            if child in swaps:
                setattr(parent, name, swaps[child])
    return swaps.get(model, model)
