"""The recurrence of every cell once more, in NumPy and in extended precision where the machine has it.

It shares no code with the library, only the names in a ``Sweep``.
"""

from typing import NamedTuple

import numpy as np

from tp_kernels.rules import Sweep

ACTIVATIONS = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0), "identity": lambda z: z}
# Of the inverse, at h_t: relu's is taken as relu.
INVERSE_SLOPES = {
    "tanh": lambda lam, h, high: lam / (1 - np.clip(h, -high, high) ** 2),
    "relu": lambda lam, h, high: np.where(h > 0, lam, 0),
    "identity": lambda lam, h, high: lam,
}
SLOPES = {"tanh": lambda h: 1 - h**2, "relu": lambda h: (h > 0).astype(h.dtype), "identity": np.ones_like}


class ElmanStep:
    """One step of ``h_t = a(u_t + W h_{t-1})``, at the given states."""

    def __init__(
        self,
        nonlinearity: str,
        u: np.ndarray | None,
        weight: np.ndarray,
        bias: np.ndarray | None,
        before: np.ndarray,
        h: np.ndarray | None = None,
    ) -> None:
        self.nonlinearity, self.u, self.weight, self.before, self.h = nonlinearity, u, weight, before, h

    def forward(self) -> np.ndarray:
        return ACTIVATIONS[self.nonlinearity](self.u + self.before.dot(self.weight.T))

    def kept(self) -> tuple[np.ndarray, ...]:
        return ()

    def delta(self, mu: np.ndarray) -> np.ndarray:
        """The gradient in u."""
        return SLOPES[self.nonlinearity](self.h) * mu

    into = delta
    """The gradient in ``W h_{t-1}``."""

    def back(self, mu: np.ndarray) -> np.ndarray:
        """``Jᵀ μ``."""
        return self.delta(mu).dot(self.weight)

    def jacobian(self) -> np.ndarray:
        """``∂h_t/∂h_{t-1}`` of each sample: [B, N, N]."""
        return SLOPES[self.nonlinearity](self.h)[:, :, None] * self.weight

    def term(self, lam: np.ndarray, feedback: np.ndarray, sweep: Sweep) -> np.ndarray:
        if sweep.inverse == "weight":
            return lam.dot(feedback.T)
        if sweep.inverse == "layer":
            return INVERSE_SLOPES[self.nonlinearity](lam, self.h, 1 - sweep.clip).dot(feedback.T)
        return self.before - self._target_before(self.h - lam, feedback, sweep)

    def _target_before(self, v: np.ndarray, feedback: np.ndarray, sweep: Sweep) -> np.ndarray:
        """``v_{t-1}`` of ``v_t``, by the inverse of the whole layer."""
        high = 1 - sweep.clip
        activation = {"tanh": lambda x: np.arctanh(np.clip(x, -high, high)), "relu": lambda x: np.maximum(x, 0)}
        invert = activation.get(self.nonlinearity, lambda x: x)
        target, own = ((invert(x) - self.u).dot(feedback.T) for x in (v, self.h))
        return target if sweep.inverse == "direct" else self.before + target - own


class GRUStep:
    """One step of the gated recurrent unit, as in ``torch.nn.GRU``."""

    def __init__(
        self,
        u: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray | None,
        before: np.ndarray,
        h: np.ndarray | None = None,
    ) -> None:
        self.weight, self.before = weight, before
        of_r, of_z, of_n = np.split(weight, 3)
        u_r, u_z, u_n = np.split(u, 3, axis=-1)
        self.q = before.dot(of_n.T) + (0 if bias is None else bias)
        self.r, self.z = (1 / (1 + np.exp(-x)) for x in (u_r + before.dot(of_r.T), u_z + before.dot(of_z.T)))
        self.n = np.tanh(u_n + self.r * self.q)

    def forward(self) -> np.ndarray:
        return (1 - self.z) * self.n + self.z * self.before

    def kept(self) -> tuple[np.ndarray, ...]:
        return self.r, self.z, self.n, self.q

    def _gradients(self, mu: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In the arguments of r, z and n."""
        r, z, n, q = self.kept()
        of_n = mu * (1 - z) * (1 - n**2)
        return of_n * q * r * (1 - r), mu * (self.before - n) * z * (1 - z), of_n

    def delta(self, mu: np.ndarray) -> np.ndarray:
        """The gradient in u."""
        return np.concatenate(self._gradients(mu), axis=-1)

    def into(self, mu: np.ndarray) -> np.ndarray:
        """The gradient in ``W h_{t-1}``."""
        of_r, of_z, of_n = self._gradients(mu)
        return np.concatenate([of_r, of_z, self.r * of_n], axis=-1)

    def back(self, mu: np.ndarray) -> np.ndarray:
        """``Jᵀ μ``."""
        return np.einsum("bij,bi->bj", self.jacobian(), mu)

    def jacobian(self) -> np.ndarray:
        """``∂h_t/∂h_{t-1}`` of each sample: [B, N, N], by the product rule on ``(1 - z) n + z h``."""
        r, z, n, q = (gate[:, :, None] for gate in self.kept())
        of_r, of_z, of_n = np.split(self.weight, 3)
        d_z = z * (1 - z) * of_z
        d_r = r * (1 - r) * of_r
        d_n = (1 - n**2) * (d_r * q + r * of_n)
        eye = np.eye(self.weight.shape[1], dtype=self.weight.dtype)
        return (1 - z) * d_n - d_z * n + d_z * self.before[:, :, None] + z * eye

    def term(self, lam: np.ndarray, feedback: np.ndarray, sweep: Sweep) -> np.ndarray:
        r, z, n, q = self.kept()
        if sweep.inverse == "weight":
            return z * lam + np.sqrt(1 - z) * (np.sqrt(1 - z) * r * lam).dot(feedback.T)
        r, z = np.clip(r, sweep.clip, 1 - sweep.clip), np.clip(z, sweep.clip, 1 - sweep.clip)
        through_n = (1 - n**2) * (1 - z) * lam
        through_r, through_z = q * through_n / (r * (1 - r)), (self.before - n) * lam / (z * (1 - z))
        of_r, of_z, of_n = feedback
        return z * lam + through_z.dot(of_z.T) + through_r.dot(of_r.T) + (r * through_n).dot(of_n.T)


class LSTMStep:
    """One step of long short-term memory, as in ``torch.nn.LSTM``. A state is h and c, side by side."""

    def __init__(
        self,
        u: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray | None,
        before: np.ndarray,
        state: np.ndarray | None = None,
    ) -> None:
        self.weight = weight
        h_before, self.c_before = np.split(before, 2, axis=-1)
        i, f, g, o = np.split(u + h_before.dot(weight.T), 4, axis=-1)
        self.i, self.f, self.o = (1 / (1 + np.exp(-x)) for x in (i, f, o))
        self.g = np.tanh(g)
        self.c = self.f * self.c_before + self.i * self.g if state is None else np.split(state, 2, axis=-1)[1]

    def forward(self) -> np.ndarray:
        return np.concatenate([self.o * np.tanh(self.c), self.c], axis=-1)

    def kept(self) -> tuple[np.ndarray, ...]:
        return self.i, self.f, self.g, self.o, self.c

    def delta(self, mu: np.ndarray) -> np.ndarray:
        """The gradient in u."""
        of_h, of_c = np.split(mu, 2, axis=-1)
        return sum(
            np.concatenate([slope * part for slope in slopes], axis=-1)
            for slopes, part in zip(self._slopes(), (of_h, of_c), strict=True)
        )

    into = delta
    """The gradient in ``W h_{t-1}``."""

    def _slopes(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of h_t, and of c_t, in the arguments of i, f, g and o."""
        i, f, g, o, c = self.kept()
        of_c = [i * (1 - i) * g, f * (1 - f) * self.c_before, (1 - g**2) * i, np.zeros_like(o)]
        of_h = [self._slope_of_h() * slope for slope in of_c[:3]]
        return [*of_h, o * (1 - o) * np.tanh(c)], of_c

    def _slope_of_h(self) -> np.ndarray:
        """In c_t, where o is held fixed."""
        return self.o * (1 - np.tanh(self.c) ** 2)

    def back(self, mu: np.ndarray) -> np.ndarray:
        """``Jᵀ μ``."""
        return np.einsum("bij,bi->bj", self.jacobian(), mu)

    def jacobian(self) -> np.ndarray:
        """``∂(h, c)_t/∂(h, c)_{t-1}`` of each sample: [B, 2N, 2N]."""
        blocks = np.split(self.weight, 4)
        in_h = (
            sum(slope[:, :, None] * block for slope, block in zip(slopes, blocks, strict=True))
            for slopes in self._slopes()
        )
        eye = np.eye(self.weight.shape[1], dtype=self.weight.dtype)
        in_c = ((factor * self.f)[:, :, None] * eye for factor in (self._slope_of_h(), 1))
        return np.concatenate([np.concatenate(row, axis=2) for row in zip(in_h, in_c, strict=True)], axis=1)

    def term(self, lam: np.ndarray, feedback: np.ndarray, sweep: Sweep) -> np.ndarray:
        """Of "weight", the only one with a matrix."""
        of_h, of_c = np.split(lam, 2, axis=-1)
        kappa = of_c + self.o * of_h
        i, f = (gate / np.maximum(1, self.i + self.f) for gate in (self.i, self.f))
        return np.concatenate([np.sqrt(i) * (np.sqrt(i) * kappa).dot(feedback.T), f * kappa], axis=-1)


def step_of(cell: str, *arguments: np.ndarray | None) -> ElmanStep | GRUStep | LSTMStep:
    """With u_t, W, b, the state before and, for a backward pass, that after."""
    gated = {"gru": GRUStep, "lstm": LSTMStep}.get(cell)
    return ElmanStep(cell.removeprefix("rnn_"), *arguments) if gated is None else gated(*arguments)


def parts(cell: str) -> int:
    """Of a state, side by side; the first is h."""
    return 2 if cell == "lstm" else 1


def solved(lam: np.ndarray, jacobian: np.ndarray, reg: float) -> np.ndarray:
    """``(JᵀJ + rI)⁻¹ Jᵀ λ`` of each sample: solved in float64, then refined in extended precision."""
    plain = jacobian.astype(np.float64)
    gram = plain.swapaxes(-1, -2) @ plain + reg * np.eye(plain.shape[-1])
    right = np.einsum("bij,bi->bj", jacobian, lam)
    result = np.zeros_like(right)
    for _ in range(3):
        products = np.einsum("bij,bi->bj", jacobian, np.einsum("bij,bj->bi", jacobian, result))
        missed = right - products - reg * result
        result = result + np.linalg.solve(gram, missed.astype(np.float64)[..., None])[..., 0]
    return result


def states_before(h: np.ndarray, h0: np.ndarray | None) -> np.ndarray:
    return np.concatenate([np.zeros_like(h[:1]) if h0 is None else h0[None], h[:-1]])


def _head(array: np.ndarray | None, axis: int, k: int) -> np.ndarray | None:
    return None if array is None else array.take(k, axis)


def forward(cell: str, u: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, h0: np.ndarray | None) -> np.ndarray:
    """All states, [T, B, N], of several parts [T, B, S N]; heads are independent layers."""
    if u.ndim == 4:
        heads = [forward(cell, u[:, :, k], weight[k], _head(bias, 0, k), _head(h0, 1, k)) for k in range(u.shape[2])]
        return np.stack(heads, axis=2)
    state = np.zeros((u.shape[1], parts(cell) * weight.shape[1]), u.dtype) if h0 is None else h0
    states = []
    for u_t in u:
        state = step_of(cell, u_t, weight, bias, state).forward()
        states.append(state)
    return np.stack(states)


def kept(
    cell: str, u: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, h0: np.ndarray | None, h: np.ndarray
) -> np.ndarray:
    """What the cell keeps of every step, [T, B, K, N], at the given states."""
    if u.ndim == 4:
        heads = [
            kept(cell, u[:, :, k], weight[k], _head(bias, 0, k), _head(h0, 1, k), h[:, :, k]) for k in range(u.shape[2])
        ]
        return np.stack(heads, axis=2)
    steps = (step_of(cell, u[t], weight, bias, before) for t, before in enumerate(states_before(h, h0)))
    return np.stack([np.stack(step.kept(), axis=-2) for step in steps])


def weight_gradient(into: np.ndarray, h: np.ndarray, h0: np.ndarray | None) -> np.ndarray:
    """``∂W = Σ_t into_tᵀ h_{t-1}``, for each head where there are heads. ``h``: no other parts."""
    before = states_before(h, h0)
    if h.ndim == 4:
        heads = [weight_gradient(into[:, :, k], h[:, :, k], before[0][:, k]) for k in range(h.shape[2])]
        return np.stack(heads)
    return into.reshape(-1, into.shape[-1]).T.dot(before.reshape(-1, h.shape[-1]))


class Backward(NamedTuple):
    """Gradients in u, W, the GRU's own bias and the first state; the displacements λ_0 … λ_T and what ``total`` sends
    on, of all parts of a state.
    """

    grad_u: np.ndarray
    grad_weight: np.ndarray
    grad_bias: np.ndarray
    grad_h0: np.ndarray
    into: np.ndarray
    displacements: np.ndarray
    through: np.ndarray


def backward(
    cell: str,
    sweep: Sweep,
    *,
    grad: np.ndarray,
    h: np.ndarray,
    weight: np.ndarray,
    u: np.ndarray | None = None,
    h0: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    feedback: np.ndarray | None = None,
) -> Backward:
    """By the rule, at the given states, h, of all parts, as ``grad`` and ``h0`` are. Back-propagation is "none" with
    "total".
    """
    if h.ndim == 4:
        heads = [
            backward(
                cell,
                sweep,
                grad=grad[:, :, k],
                h=h[:, :, k],
                weight=weight[k],
                u=_head(u, 2, k),
                h0=_head(h0, 1, k),
                bias=_head(bias, 0, k),
                feedback=_head(feedback, 0, k),
            )
            for k in range(h.shape[2])
        ]
        axes = Backward(grad_u=2, grad_weight=0, grad_bias=0, grad_h0=1, into=2, displacements=2, through=1)
        return Backward(*(np.stack(parts, axis) for parts, axis in zip(zip(*heads, strict=True), axes, strict=True)))
    carried = through = np.zeros_like(h[0])
    deltas, intos, displacements = [], [], []
    for t in range(len(h) - 1, -1, -1):
        before = h[t - 1] if t else np.zeros_like(h[0]) if h0 is None else h0
        step = step_of(cell, None if u is None else u[t], weight, bias, before, h[t])
        lam = sweep.step * grad[t] + carried
        mu = lam + through
        deltas.append(step.delta(mu))
        intos.append(step.into(mu))
        displacements.append(lam)
        if sweep.inverse == "none":
            carried = np.zeros_like(lam)
        elif sweep.inverse == "identity":
            carried = lam
        elif sweep.inverse == "jacobian":
            carried = solved(lam, step.jacobian(), sweep.reg)
        else:
            carried = step.term(lam, feedback, sweep)
        if sweep.update == "total":
            through = step.back(mu)
    into, N = np.stack(intos[::-1]), weight.shape[1]
    return Backward(
        grad_u=np.stack(deltas[::-1]),
        grad_weight=weight_gradient(into, h[..., :N], None if h0 is None else h0[..., :N]),
        grad_bias=into[..., -N:].sum((0, 1)),
        grad_h0=through if sweep.update == "total" else carried,
        into=into,
        displacements=np.stack([carried, *displacements[::-1]]),
        through=through,
    )
