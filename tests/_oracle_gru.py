"""``gru`` once more, in NumPy and in extended precision; it shares no code with the library."""

import numpy as np

from tp_kernels.rules import Sweep


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gates_of(
    u: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """r, z, n and q of one step."""
    of_r, of_z, of_n = np.split(weight, 3)
    u_r, u_z, u_n = np.split(u, 3, axis=-1)
    q = before.dot(of_n.T) + (0 if bias is None else bias)
    r, z = _sigmoid(u_r + before.dot(of_r.T)), _sigmoid(u_z + before.dot(of_z.T))
    return r, z, np.tanh(u_n + r * q), q


def states_before(h: np.ndarray, h0: np.ndarray | None) -> np.ndarray:
    return np.concatenate([np.zeros_like(h[:1]) if h0 is None else h0[None], h[:-1]])


def forward(u: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, h0: np.ndarray | None) -> np.ndarray:
    state = np.zeros((u.shape[1], weight.shape[1]), u.dtype) if h0 is None else h0
    states = []
    for u_t in u:
        _, z, n, _ = gates_of(u_t, weight, bias, state)
        state = (1 - z) * n + z * state
        states.append(state)
    return np.stack(states)


def jacobians(gates: tuple[np.ndarray, ...], weight: np.ndarray, before: np.ndarray) -> np.ndarray:
    """``∂h_t/∂h_{t-1}`` of each sample: [B, N, N], by the product rule on ``(1 - z) n + z h``."""
    r, z, n, q = (gate[:, :, None] for gate in gates)
    of_r, of_z, of_n = np.split(weight, 3)
    d_z = z * (1 - z) * of_z
    d_r = r * (1 - r) * of_r
    d_n = (1 - n**2) * (d_r * q + r * of_n)
    return (1 - z) * d_n - d_z * n + d_z * before[:, :, None] + z * np.eye(weight.shape[1], dtype=weight.dtype)


def term(
    lam: np.ndarray,
    gates: tuple[np.ndarray, ...],
    weight: np.ndarray,
    before: np.ndarray,
    feedback: np.ndarray | None,
    sweep: Sweep,
) -> np.ndarray:
    """What a displacement sends to the step before."""
    r, z, n, q = gates
    if sweep.inverse == "none":
        return np.zeros_like(lam)
    if sweep.inverse == "identity":
        return lam
    if sweep.inverse == "weight":
        return z * lam + np.sqrt(1 - z) * (np.sqrt(1 - z) * r * lam).dot(feedback.T)
    if sweep.inverse == "layer":
        r, z = np.clip(r, sweep.clip, 1 - sweep.clip), np.clip(z, sweep.clip, 1 - sweep.clip)
        through_n = (1 - n**2) * (1 - z) * lam
        through_r, through_z = q * through_n / (r * (1 - r)), (before - n) * lam / (z * (1 - z))
        of_r, of_z, of_n = feedback
        return z * lam + through_z.dot(of_z.T) + through_r.dot(of_r.T) + (r * through_n).dot(of_n.T)
    return solved(lam, jacobians(gates, weight, before), sweep.reg)


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


def backward(
    grad: np.ndarray,
    u: np.ndarray,
    h: np.ndarray,
    h0: np.ndarray | None,
    weight: np.ndarray,
    bias: np.ndarray | None,
    feedback: np.ndarray | None,
    sweep: Sweep,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients in u and h_0, and the displacements λ_1 … λ_T, at the given states."""
    before = states_before(h, h0)
    lam = through = np.zeros_like(h[0])
    deltas, displacements, carried = [], [], lam
    for t in range(len(h) - 1, -1, -1):
        gates = r, z, n, q = gates_of(u[t], weight, bias, before[t])
        lam = sweep.step * grad[t] + carried
        mu = lam + through
        d_n = mu * (1 - z) * (1 - n**2)
        deltas.append(np.concatenate([d_n * q * r * (1 - r), mu * (before[t] - n) * z * (1 - z), d_n], axis=-1))
        displacements.append(lam)
        carried = term(lam, gates, weight, before[t], feedback, sweep)
        if sweep.update == "total":
            through = np.einsum("bij,bi->bj", jacobians(gates, weight, before[t]), mu)
    return np.stack(deltas[::-1]), through if sweep.update == "total" else carried, np.stack(displacements[::-1])
