"""The matrix that carries displacements back: P of the recurrent weight, or of blocks of it, and for how long one P is
used.
"""

import threading
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tp_kernels._library import dispatches_to_nobody, register
from tp_kernels.ops.recurrence import parallel
from tp_kernels.ops.recurrence.cell import Cell
from tp_kernels.ops.regularized_inverse import op as regularized_inverse
from tp_kernels.rules import Sweep, TargetProp

LARGEST_DRIFT = 0.1
"""``‖W - W_0‖_F / ‖W_0‖_F`` from which P of W_0 is not used for W any more. P is then off by a tenth to a fifth."""


def _inverse(weight: Tensor, words: str, backend: str) -> Tensor:
    """P for the sweep of these words."""
    sweep = Sweep.parse(words)
    parallel.forget_powers()  # of a P that is used no more, most likely
    if backend != "auto" and not regularized_inverse.BACKENDS.supports(backend, weight)[0]:
        backend = "auto"  # the name is that of the recurrence's back-end, which need not have an inverse
    # Within an op there is nothing left to dispatch.
    r = torch.tensor(sweep.reg, dtype=torch.float64, device="cpu")
    # On other devices nothing waits: the NaN of a weight that has no P is found in the gradients, later.
    return regularized_inverse.compute(weight, r, sweep.power, weight.device.type == "cpu", backend)


_run = register(
    "recurrence_feedback(Tensor weight, str words, str backend) -> Tensor",
    _inverse,
    lambda weight, words, backend: weight.new_empty(weight.shape),
)


class _Kept(NamedTuple):
    """The last P of a weight: of which blocks of it, with which numbers."""

    inverted: Tensor
    options: tuple
    inverse: Tensor


_kept: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()  # what is kept of a weight goes when that goes
_one_at_a_time = threading.Lock()


def feedback_of(weight: Tensor, cell: Cell, sweep: Sweep, words: str, backend: str) -> Tensor:
    """P of the blocks of ``weight`` that the rule inverts. On the CPU each weight's last one is kept, for further
    backward passes with the very same numbers in it.

    They are compared by value: that costs N² against N³, and no change of the weight can escape it.
    """
    inverted = cell.inverted(weight, sweep.inverse)
    if weight.device.type != "cpu" or not dispatches_to_nobody(weight):
        return torch.ops.tp_kernels.recurrence_feedback(inverted, words, backend)
    options = inverted.dtype, sweep.reg, sweep.power, backend
    with _one_at_a_time:
        last = _kept.get(weight)
    if last is None or last.options != options or not torch.equal(last.inverted, inverted):
        last = _Kept(inverted.detach().clone(), options, _run(inverted, words, backend))
        with _one_at_a_time:
            _kept[weight] = last
    return last.inverse


def forget_feedback() -> None:
    """Forget every P that is kept, as a benchmark has to whose weight stays the same from step to step."""
    with _one_at_a_time:
        _kept.clear()


def _is_near(weight: Tensor, origin: Tensor) -> bool:
    """Whether P of ``origin`` may serve for ``weight``. On other devices than the CPU it always may: to see how far the
    weight is would be to wait for it, at every step, which costs more than what ``refresh`` saves.
    """
    if weight.device.type != "cpu":
        return True
    return bool(torch.dist(weight, origin) < LARGEST_DRIFT * torch.linalg.vector_norm(origin))  # false for NaN too


def _refreshed_feedback(
    weight: Tensor, origin: Tensor, kept: Tensor, age: Tensor, words: str, refresh: int, backend: str
) -> Tensor:
    if not (0 < int(age) < refresh and _is_near(weight, origin)):
        kept.copy_(_inverse(weight, words, backend))
        origin.copy_(weight)
        age.zero_()
    age.add_(1)
    return kept.clone(memory_format=torch.contiguous_format)


register(
    "recurrence_refreshed_feedback(Tensor weight, Tensor(a!) origin, Tensor(b!) kept, Tensor(c!) age, str words, "
    "int refresh, str backend) -> Tensor",
    _refreshed_feedback,
    lambda weight, *rest: weight.new_empty(weight.shape),
    cudagraph_unsafe=True,  # it counts on the host: a recording would do for ever what it did when it was made
)


def _runs_once_more() -> bool:
    """Whether this is the first run of ``torch.utils.checkpoint`` with ``use_reentrant=False``: the second, in
    backward, is the pass that counts. With ``use_reentrant=True`` the first has no gradients.
    """
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook.")


class RefreshedFeedback(nn.Module):
    """P of a weight that moves little from step to step: computed anew at every k-th call only, or, on the CPU, earlier
    once the weight has moved by ``LARGEST_DRIFT``.

    Not part of the ``state_dict``: what is kept is a function of weights that were.
    """

    def __init__(self, weight: Tensor, refresh: int) -> None:
        super().__init__()
        self.refresh = refresh
        self.register_buffer("origin", torch.zeros_like(weight, requires_grad=False), persistent=False)
        self.register_buffer("kept", torch.zeros_like(weight, requires_grad=False), persistent=False)
        # Calls since P was computed; 0: nothing is kept. On the CPU, where reading it waits for nothing.
        self.age = torch.zeros((), dtype=torch.int64, device="cpu")

    def forget(self) -> None:
        """The next call computes P."""
        self.age.zero_()

    def _apply(self, *arguments: Any, **options: Any) -> "RefreshedFeedback":
        self.forget()  # in another dtype P is another one
        return super()._apply(*arguments, **options)

    def forward(self, weight: Tensor, rule: TargetProp, backend: str) -> Tensor:
        if _runs_once_more():
            return self.kept  # of no use to that pass, which keeps nothing
        return torch.ops.tp_kernels.recurrence_refreshed_feedback(
            weight.detach(), self.origin, self.kept, self.age, rule.words, self.refresh, backend
        )

    def extra_repr(self) -> str:
        return f"refresh={self.refresh}"
