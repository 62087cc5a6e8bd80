"""The rules: what ``backward`` computes. Forward passes never depend on them."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

Inverse = Literal["weight", "layer", "identity", "jacobian"]
Update = Literal["total", "local"]
Mode = Literal["linearized", "difference", "direct"]
_INVERSES, _UPDATES, _MODES = map(get_args, (Inverse, Update, Mode))


def _check_word(argument: str, value: object, words: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"TargetProp: {argument} must be a str, got {type(value).__name__}")
    if value not in words:
        raise ValueError(f"TargetProp: {argument} must be one of {', '.join(map(repr, words))}, got {value!r}")


def _check_chunk(rule: str, chunk: object, overlap: object) -> tuple[int | Literal["auto"] | None, int | None]:
    """Both, as they are kept."""
    if chunk is None:
        if overlap is not None:
            raise ValueError(f"{rule}: overlap must be None without chunk, got {overlap!r}")
        return None, None
    if chunk == "auto" and isinstance(chunk, str):
        if overlap is not None:
            raise ValueError(f"{rule}: overlap must be None with chunk='auto', which says both, got {overlap!r}")
        return chunk, None
    overlap = 0 if overlap is None else overlap
    for argument, value, least, words in (
        ("chunk", chunk, 1, "an int, 'auto' or None"),
        ("overlap", overlap, 0, "an int"),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{rule}: {argument} must be {words}, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{rule}: {argument} must be at least {least}, got {value}")
    return chunk, overlap


def _check_number(argument: str, value: object, low: float, high: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"TargetProp: {argument} must be a real number, got {type(value).__name__}")
    if not low < value < high:  # false for NaN too
        raise ValueError(f"TargetProp: {argument} must be {expected}, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class TargetProp:
    """Target propagation by regularized inversion.

    Going back in time the displacement ``λ_t = h_t - v_t`` between a state and its target follows
    ``λ_{t-1} = step * g_{t-1} + inverse term(λ_t)``, with ``g_t = ∂loss/∂h_t``; ``update`` then turns displacements
    into parameter gradients.

    Args:
        reg: regularization r > 0 of the inverse. ``None``: 1e-4 at power 1/2, 1/4 at power 1 (no direction grows).
        inverse: what carries a displacement one step back. ``"weight"``: the regularized inverse P of the recurrent
            weight; ``"layer"``: P after the inverse of the activation (the paper's); ``"identity"``: nothing at all
            (a control); ``"jacobian"``: the regularized inverse of the layer's own linearization, a solve for every
            sample and step.
        update: ``"total"``: adjoints through the recurrence (what the authors' code computes); ``"local"``: each
            layer's own least-squares gradient, previous state held fixed (the paper's formula).
        mode: ``"linearized"``: ``inverse`` carries displacements, to first order. With ``inverse="layer"`` also the
            non-linear forms, with ``f⁻¹(v) = P(a⁻¹(clip v) - u_t)`` and relu's inverse taken as relu:
            ``"difference"``, ``v_{t-1} = h_{t-1} + f⁻¹(v_t) - f⁻¹(h_t)``, and ``"direct"``, ``v_{t-1} = f⁻¹(v_t)``.
        power: 1 or 1/2, the exponent α of ``P = (WᵀW + rI)^{-α} Wᵀ``. ``None``: 1/2 for ``inverse="weight"``
            (targets keep their length), 1 for the others. ``inverse="jacobian"`` supports power 1 only.
        step: γ > 0, the step from a state to its target along the negative gradient. A mere scale of all gradients
            where the mode is linearized; the other modes are not linear in it.
        clip: ε in (0, 1): ``inverse="layer"`` clips h, or v, to ±(1-ε) where the activation is tanh, and divides by
            ``1 - clip(h)²``, or takes atanh of it.
        rtol: in (0, 1): the relative residual to which ``inverse="jacobian"`` solves.
        blend, latch: β in (0, 1] and β' in [0, 1), for ``update="total"``: the adjoint's source at each step is
            ``g_t + β (λ_t - g_t) + β' (λ'_t - g_t)`` with the displacement λ' of ``inverse="identity"``, which costs no
            product. So gradients are ``1 - β - β'`` of back-propagation's, β of target propagation's by this inverse,
            which carries a memory that moves, and β' of that by identity, which carries one that is latched. Their sum
            is 1 at most. Not for the modes "difference" and "direct".
        chunk, overlap: C >= 1 and K >= 0, for ``update="total"``: time is cut into chunks of C steps. The adjoints of
            each begin at zero K steps after its end, and run back through it by themselves; displacements are exact at
            every step. So chunks are computed in parallel, and a gradient knows of the losses of C + K steps by its
            adjoint, and of all by its displacement. For an inverse in whose displacements there is no state: "identity"
            and, in a layer without gates, "weight". A chunk of T or more is the whole; C = 1 with K = 0 is
            ``update="local"``. ``None`` is the whole; overlap is 0 where it is left out; "auto" is
            ``C = min(128, max(10, ⌈T/5⌉))`` and ``K = min(32, ⌈2C/5⌉)``.

    The attributes hold resolved numbers: ``dataclasses.replace(rule, inverse=...)`` keeps reg and power as they are.

    Raises:
        TypeError: an argument is not of the stated kind.
        ValueError: an argument is outside the stated range, or a word is unknown.

    Source: Roulet and Harchaoui, "Target Propagation via Regularized Inversion", arXiv 2112.01453.

    Example:
        >>> TargetProp()  # doctest: +NORMALIZE_WHITESPACE
        TargetProp(reg=0.0001, inverse='weight', update='total', mode='linearized', power=0.5, step=1.0, clip=0.001,
        rtol=0.0001, blend=1.0, latch=0.0, chunk=None, overlap=None)
        >>> TargetProp(inverse="layer").reg
        0.25
    """

    reg: float | None = None
    inverse: Inverse = "weight"
    update: Update = "total"
    mode: Mode = "linearized"
    power: float | None = None
    step: float = 1.0
    clip: float = 1e-3
    rtol: float = 1e-4
    blend: float = 1.0
    latch: float = 0.0
    chunk: int | Literal["auto"] | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        _check_word("inverse", self.inverse, _INVERSES)
        _check_word("update", self.update, _UPDATES)
        _check_word("mode", self.mode, _MODES)
        if self.mode != "linearized" and self.inverse != "layer":
            raise ValueError(f"TargetProp: inverse must be 'layer' with mode={self.mode!r}, got {self.inverse!r}")
        power = (0.5 if self.inverse == "weight" else 1.0) if self.power is None else self.power
        if isinstance(power, bool) or not isinstance(power, (int, float)):
            raise TypeError(f"TargetProp: power must be a real number, got {type(power).__name__}")
        if power not in (1.0, 0.5):  # no global floats: with dynamic=True torch.compile makes symbols of them
            raise ValueError(f"TargetProp: power must be one of 1.0, 0.5, got {power!r}")
        if self.inverse == "jacobian" and power != 1.0:
            raise ValueError(f"TargetProp: power must be 1.0, inverse='jacobian' supports no other, got {power!r}")
        reg = (1e-4 if power == 0.5 else 0.25) if self.reg is None else self.reg
        positive = "positive and finite"
        object.__setattr__(self, "power", float(power))
        object.__setattr__(self, "reg", _check_number("reg", reg, 0.0, math.inf, positive))
        object.__setattr__(self, "step", _check_number("step", self.step, 0.0, math.inf, positive))
        object.__setattr__(self, "clip", _check_number("clip", self.clip, 0.0, 1.0, "in (0, 1)"))
        object.__setattr__(self, "rtol", _check_number("rtol", self.rtol, 0.0, 1.0, "in (0, 1)"))
        for argument, value in (("blend", self.blend), ("latch", self.latch)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"TargetProp: {argument} must be a real number, got {type(value).__name__}")
        blend, latch = float(self.blend), float(self.latch)
        if not 0 < blend <= 1:
            raise ValueError(f"TargetProp: blend must be in (0, 1], got {blend!r}")
        if not 0 <= latch <= 1 - blend:
            raise ValueError(f"TargetProp: latch must be in [0, 1 - blend], got {latch!r} with blend={blend!r}")
        if latch and self.inverse == "identity":
            raise ValueError(f"TargetProp: latch must be 0 with inverse='identity', which is the same, got {latch!r}")
        object.__setattr__(self, "blend", blend)
        object.__setattr__(self, "latch", latch)
        chunk, overlap = _check_chunk("TargetProp", self.chunk, self.overlap)
        object.__setattr__(self, "chunk", chunk)
        object.__setattr__(self, "overlap", overlap)
        for argument, is_there in (("blend", blend != 1), ("chunk", chunk is not None)):
            if is_there and self.update != "total":
                raise ValueError(f"TargetProp: update must be 'total' with {argument}, got {self.update!r}")
            if is_there and self.mode != "linearized":
                raise ValueError(f"TargetProp: mode must be 'linearized' with {argument}, got {self.mode!r}")
        if chunk is not None and self.inverse not in ("weight", "identity"):
            raise ValueError(
                "TargetProp: inverse must be 'weight' or 'identity' with chunk, as others need the states, "
                f"got {self.inverse!r}"
            )
        # Once: where torch.compile traces a call, a rule's numbers may be symbols by then, which have no words.
        object.__setattr__(self, "words", Sweep.of(self).words)

    @property
    def carries(self) -> bool:
        """Whether displacements go back in time."""
        return True

    @classmethod
    def paper(cls, reg: float = 1.0, step: float = 1.0) -> "TargetProp":
        """The paper's own rule: power 1, ``inverse="layer"``, ``update="local"``.

        Example:
            >>> TargetProp.paper(reg=10.0, step=0.01)  # doctest: +NORMALIZE_WHITESPACE
            TargetProp(reg=10.0, inverse='layer', update='local', mode='linearized', power=1.0, step=0.01, clip=0.001,
            rtol=0.0001, blend=1.0, latch=0.0, chunk=None, overlap=None)
        """
        return cls(reg=reg, inverse="layer", update="local", power=1.0, step=step)


@dataclass(frozen=True)
class BackProp:
    """Back-propagation, on the same kernels: the gradients of ``torch.nn.RNN``.

    Args:
        chunk, overlap: as in ``TargetProp``: without displacements that is truncated back-propagation through time. A
            gradient knows of the losses of C + K steps.

    Raises:
        TypeError, ValueError: they are not as stated there.

    Example:
        >>> BackProp()
        BackProp(chunk=None, overlap=None)
    """

    chunk: int | Literal["auto"] | None = None
    overlap: int | None = None
    carries: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "overlap", _check_chunk("BackProp", self.chunk, self.overlap)[1])
        object.__setattr__(self, "words", Sweep.of(self).words)


Rule = TargetProp | BackProp


def uses_inverse(rule: Rule) -> bool:
    """Whether it multiplies by P, the regularized inverse of the weight."""
    return isinstance(rule, TargetProp) and rule.inverse in ("weight", "layer")


class Sweep(NamedTuple):
    """What one sweep back over time computes: a rule, for any cell."""

    inverse: str = "none"  # with the update "total": back-propagation; or the mode, "difference" or "direct"
    update: str = "total"
    step: float = 1.0
    clip: float = 1e-3
    reg: float = 0.25
    rtol: float = 1e-4
    power: float = 1.0  # of P
    blend: float = 1.0
    latch: float = 0.0
    chunk: int = 0  # 0: the whole; -1: "auto"
    overlap: int = 0

    def cut(self, T: int) -> tuple[int, int] | None:
        """Chunk and overlap of T steps; ``None``: they are not cut.

        Example:
            >>> Sweep(chunk=-1).cut(200), Sweep(chunk=100).cut(100)
            ((40, 16), None)
        """
        chunk, overlap = self.chunk, self.overlap
        if chunk == -1:
            chunk = min(128, max(10, -(-T // 5)))
            overlap = min(32, -(-2 * chunk // 5))
        return (chunk, overlap) if 0 < chunk < T else None

    @property
    def is_pure(self) -> bool:
        """Whether adjoints come of the inverse's displacements alone, over the whole sequence."""
        return self.blend == 1 and not self.latch and not self.chunk

    @property
    def kinds(self) -> int:
        """How many displacements there are, side by side in what is carried back: the inverse's and the latched one."""
        return 2 if self.latch else 1

    @property
    def uses_inverse(self) -> bool:
        """Whether it multiplies by P."""
        return self.inverse in ("weight", "layer", "difference", "direct")

    @property
    def words(self) -> str:
        """As one argument of an op: a new option of a rule changes no schema. ``parse`` reads it.

        Example:
            >>> Sweep("identity").words  # doctest: +NORMALIZE_WHITESPACE
            'inverse=identity update=total step=1.0 clip=0.001 reg=0.25 rtol=0.0001 power=1.0 blend=1.0 latch=0.0
            chunk=0 overlap=0'
        """
        return (
            f"inverse={self.inverse} update={self.update} "
            f"step={self.step!r} clip={self.clip!r} reg={self.reg!r} rtol={self.rtol!r} power={self.power!r} "
            f"blend={self.blend!r} latch={self.latch!r} chunk={self.chunk} overlap={self.overlap}"
        )

    @classmethod
    def of(cls, rule: Rule) -> "Sweep":
        """The sweep of a rule.

        Example:
            >>> Sweep.of(TargetProp(inverse="identity")) == Sweep("identity")
            True
        """
        cut = -1 if rule.chunk == "auto" else rule.chunk or 0, rule.overlap or 0
        if isinstance(rule, BackProp):
            return cls(chunk=cut[0], overlap=cut[1])
        inverse = rule.inverse if rule.mode == "linearized" else rule.mode
        return cls(
            inverse, rule.update, rule.step, rule.clip, rule.reg, rule.rtol, rule.power, rule.blend, rule.latch, *cut
        )

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, words: str) -> "Sweep":
        """The sweep of these words.

        Raises:
            ValueError: they are not the words of a sweep.

        Example:
            >>> Sweep.parse(Sweep("weight", "local").words)  # doctest: +NORMALIZE_WHITESPACE
            Sweep(inverse='weight', update='local', step=1.0, clip=0.001, reg=0.25, rtol=0.0001, power=1.0, blend=1.0,
            latch=0.0, chunk=0, overlap=0)
        """
        fields = dict(word.partition("=")[::2] for word in words.split())
        if tuple(fields) != cls._fields:
            raise ValueError(f"sweep must have the words {', '.join(cls._fields)}, got {words!r}")
        for name, value in fields.items():
            expected = _WORDS.get(name)
            if expected is None:
                try:
                    fields[name] = int(value) if name in ("chunk", "overlap") else float(value)
                except ValueError:
                    raise ValueError(f"sweep must have a number as {name}, got {words!r}") from None
            elif value not in expected:
                raise ValueError(f"sweep must have as {name} one of {', '.join(expected)}, got {words!r}")
        return cls(**fields)


_WORDS = {"inverse": ("none", *_INVERSES, *_MODES[1:]), "update": _UPDATES}
"""Of a sweep; its other fields are numbers."""


_PLAIN = Sweep().words.partition(" blend=")[2]


def is_plain_weight(words: str) -> bool:
    """Of a sweep's words: whether displacements are the inverse "weight"'s alone, and adjoints come of nothing else."""
    return words.startswith("inverse=weight ") and words.endswith(f" blend={_PLAIN}")


def kinds_of(words: str) -> int:
    """``kinds`` of the sweep of these words."""
    return 1 if " latch=0.0 " in words else 2


WITHOUT_INVERSE = {update: Sweep("none", update).words for update in _UPDATES}
"""The words of sweeps with gradients, or what is put in their place, for displacements. Made once: where torch.compile
traces, numbers may be symbols.
"""


def resolve(op: str, rule: Rule | None) -> Rule:
    """The rule to use: ``None`` means ``TargetProp()``; anything that is not a rule is an error."""
    if rule is None:
        return TargetProp()
    if not isinstance(rule, (TargetProp, BackProp)):
        raise TypeError(f"{op}: rule must be a TargetProp, a BackProp or None, got {type(rule).__name__}")
    return rule
