"""The tasks of the race: many steps in, an answer at the last ones. Real images come with scikit-learn."""

import gzip
import math
import struct
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Sets that every run shares, whatever its own seed. The search for a step size looks at the validation set only.
_SET_SEEDS = {"validation": 20_000_003, "test": 20_000_033}
_SYNTHETIC_SET_SIZE = 1000
# Two times 300 of the 1,797 digits leave 1,197 to train on.
_DIGITS_HELD_OUT = 300
# Of an IDX data set this many held-out images are looked at: a run evaluates many times.
_IDX_EVALUATED = 2000
_SPLIT_SEED = 0
_PERMUTATION_SEED = 92_916


@dataclass(frozen=True)
class Task:
    """A task with an answer at the last step, or at each of the last ``answers`` steps.

    Attributes:
        name: what ``make_task`` takes.
        T: sequence length.
        input_size: M.
        output_size: classes, or 1 for a regression.
        bar: the running accuracy, in [0, 1], that a run is timed to.
    """

    name: str
    T: int
    input_size: int
    output_size: int
    bar: float

    @property
    def answers(self) -> int:
        """How many steps have an answer, K: the last ones. Of one answer y and outputs have no axis."""
        return 1

    def batch(self, generator: torch.Generator, B: int) -> tuple[Tensor, Tensor]:
        """Training input x: [T, B, M], float32, and answers y: [B] or [B, K]. The generator alone decides on both."""
        raise NotImplementedError

    def held_out(self, which: str) -> tuple[Tensor, Tensor]:
        """The fixed "validation" or "test" set: x: [T, B', M], y: [B'] or [B', K]."""
        raise NotImplementedError

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean loss of output: [B, output_size] or [B, K, output_size] against y."""
        return functional.cross_entropy(output.flatten(0, -2), y.flatten())

    def correct(self, output: Tensor, y: Tensor) -> Tensor:
        """Whether each answer is right: bool, of the shape of y."""
        return output.argmax(-1) == y


class _Synthetic(Task):
    """Fresh sequences for every batch; the held-out sets are batches of seeds of their own."""

    def held_out(self, which: str) -> tuple[Tensor, Tensor]:
        _check_set(which)
        return self.batch(torch.Generator().manual_seed(_SET_SEEDS[which]), _SYNTHETIC_SET_SIZE)


@dataclass(frozen=True)
class TemporalOrder(_Synthetic):
    """Which of two symbols stood at each of two (or three) places, in order?

    One-hot input over six symbols. Symbols 0 and 1 are the relevant ones; everywhere else stands one of the
    distractors 2 … 5. The places are drawn evenly from ``[T/10, 2T/10)`` and ``[5T/10, 6T/10)``; with three bits from
    ``[T/10, 2T/10)``, ``[3T/10, 4T/10)`` and ``[6T/10, 7T/10)``. The class is ``Σ_k 2^k · symbol at place k``.

    Source: experiment 6 of Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997, with
    the places of Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    whose generator Manchev and Spratling, "Target Propagation in Recurrent Neural Networks", JMLR 21, 2020, used too.
    The latter call the one with 4 classes "1 bit" or just temporal order, and the one with 8 classes "3 bit".

    Args:
        relevant: 2 (4 classes) or 3 (8 classes) relevant symbols.
    """

    relevant: int = 2

    STARTS: ClassVar[dict[int, tuple[int, ...]]] = {2: (1, 5), 3: (1, 3, 6)}  # in tenths of T

    def batch(self, generator: torch.Generator, B: int) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(2, 6, (self.T, B), generator=generator)
        y = torch.zeros(B, dtype=torch.long)
        column = torch.arange(B)
        for bit, tenths in enumerate(self.STARTS[self.relevant]):
            place = self.T * tenths // 10 + torch.randint(self.T // 10, (B,), generator=generator)
            symbol = torch.randint(2, (B,), generator=generator)
            symbols[place, column] = symbol
            y += symbol << bit
        return functional.one_hot(symbols, 6).float(), y


@dataclass(frozen=True)
class Adding(_Synthetic):
    """Half the sum of the two marked values.

    Channel 0 marks two steps by a one, channel 1 is uniform on [0, 1). The first mark is drawn from ``[0, T/10)``, the
    second from ``[T/10, T/2)``, so that they never meet. Trained on the squared error (guessing 1/2 always: 1/24); an
    answer is right if ``|output - y| ≤ tolerance``.

    Two criteria go under the number 0.04. Hochreiter and Schmidhuber's is on the *absolute* error: "adding", where
    guessing 1/2 scores 15 %. The code of Pascanu et al. and of Manchev and Spratling compares the *squared* error with
    0.04, so it takes any answer within 0.2: "adding-squared", where guessing 1/2 already scores 64 %.

    Source: experiment 4 of Hochreiter and Schmidhuber, 1997; marks and scale as Pascanu et al., 2013 (see
    ``TemporalOrder``), but for the length, which is exactly T here and up to 1.1 T there.
    """

    tolerance: float = 0.04

    def batch(self, generator: torch.Generator, B: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(self.T, B, 2, generator=generator)
        x[..., 0] = 0
        column = torch.arange(B)
        tenth = self.T // 10
        first = torch.randint(tenth, (B,), generator=generator)
        second = torch.randint(tenth, self.T // 2, (B,), generator=generator)
        x[first, column, 0] = 1
        x[second, column, 0] = 1
        return x, (x[first, column, 1] + x[second, column, 1]) / 2

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(output[:, 0], y)

    def correct(self, output: Tensor, y: Tensor) -> Tensor:
        return (output[:, 0] - y).abs() <= self.tolerance


@dataclass(frozen=True)
class Copy(_Synthetic):
    """Repeat the first symbols, in order, at the last steps.

    One-hot input over ten symbols: ``length`` of the symbols 0 … 7, then blanks (8), a delimiter (9) at the step before
    the first answer, and blanks again while the symbols are to be given back. An answer is a symbol, so guessing scores
    1/8. The loss is over the answers only; Arjovsky et al. also ask for blanks everywhere else, and count the blanks
    between the symbols and the answers, which are ``T - 2 length`` with the delimiter here.

    Source: Arjovsky, Shah and Bengio, "Unitary Evolution Recurrent Neural Networks", ICML 2016, after experiment 2 of
    Hochreiter and Schmidhuber, 1997.
    """

    length: int = 10

    @property
    def answers(self) -> int:
        return self.length

    def batch(self, generator: torch.Generator, B: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(8, (self.length, B), generator=generator)
        symbols = torch.full((self.T, B), 8)
        symbols[: self.length] = y
        symbols[-self.length - 1] = 9
        return functional.one_hot(symbols, 10).float(), y.T.contiguous()


@dataclass(frozen=True)
class Images(Task):
    """Images read as sequences, a few pixels a step, in raster order or in one fixed random order.

    Batches are drawn with replacement. Source: Le, Jaitly and Hinton, "A Simple Way to Initialize Recurrent Networks
    of Rectified Linear Units", arXiv 1504.00941 (pixel by pixel, plain and permuted).

    Attributes:
        splits: "train", "validation" and "test": images [B', pixels] in [0, 1], float32, and labels [B'].
        order: the pixels' order, a permutation of 0 … pixels - 1.
    """

    splits: dict[str, tuple[Tensor, Tensor]] = field(repr=False, compare=False, default_factory=dict)
    order: Tensor = field(repr=False, compare=False, default_factory=lambda: torch.empty(0))

    @cached_property
    def _train(self) -> tuple[Tensor, Tensor]:
        return self._sequences("train")

    def _sequences(self, which: str) -> tuple[Tensor, Tensor]:
        images, labels = self.splits[which]
        return images[:, self.order].unflatten(1, (self.T, self.input_size)).transpose(0, 1).contiguous(), labels

    def batch(self, generator: torch.Generator, B: int) -> tuple[Tensor, Tensor]:
        x, y = self._train
        chosen = torch.randint(len(y), (B,), generator=generator)
        return x[:, chosen], y[chosen]

    def held_out(self, which: str) -> tuple[Tensor, Tensor]:
        _check_set(which)
        return self._sequences(which)


def _check_set(which: str) -> None:
    if which not in _SET_SEEDS:
        raise ValueError(f"held_out: which must be 'validation' or 'test', got {which!r}")


def _split(images: Tensor, labels: Tensor, held_out: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A stratified split by a fixed seed: what is left, and ``held_out`` images."""
    from sklearn.model_selection import train_test_split

    kept, held = train_test_split(
        np.arange(len(labels)), test_size=held_out, random_state=_SPLIT_SEED, stratify=labels.numpy()
    )
    return (images[kept], labels[kept]), (images[held], labels[held])


@cache
def _digits(side: int) -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 handwritten digits, [B', side²], up-sampled bilinearly where ``side`` is not 8."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    if side != 8:
        size = (side, side)
        images = functional.interpolate(images[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    rest, test = _split(images.flatten(1), torch.from_numpy(data.target).long(), _DIGITS_HELD_OUT)
    train, validation = _split(*rest, _DIGITS_HELD_OUT)
    return {"train": train, "validation": validation, "test": test}


def read_idx(path: Path) -> Tensor:
    """The array of an IDX file of unsigned bytes, plain or gzipped.

    Raises:
        ValueError: not an IDX file of unsigned bytes, or one of another length than its header says.

    Source: the format's description at http://yann.lecun.com/exdb/mnist.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"read_idx: {path} must start with bytes 00 00 08 (unsigned bytes), got {raw[:3].hex(' ')}")
    start = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:start]) if len(raw) >= start else ()
    if not shape or len(raw) - start != math.prod(shape):
        raise ValueError(f"read_idx: {path} must hold {list(shape)} bytes after its header, got {len(raw) - start}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def _find(folder: Path, stem: str) -> Path:
    for name in (stem, f"{stem}.gz"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"make_task: data must be a folder that holds {stem} or {stem}.gz, got {folder}")


@cache
def _idx(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """MNIST's layout: two files for training, of which the validation set is taken, and two for the test."""
    parts = []
    for stem in ("train", "t10k"):
        images = read_idx(_find(folder, f"{stem}-images-idx3-ubyte"))
        labels = read_idx(_find(folder, f"{stem}-labels-idx1-ubyte")).long()
        if len(images) != len(labels):
            raise ValueError(
                f"make_task: {stem} in {folder} must have a label an image, {len(images)}, got {len(labels)}"
            )
        parts.append((images.flatten(1).float() / 255, labels))
    rest, test = parts
    train, validation = _split(*rest, min(_IDX_EVALUATED, len(rest[1]) // 4))
    if len(test[1]) > _IDX_EVALUATED:
        _, test = _split(*test, _IDX_EVALUATED)
    return {"train": train, "validation": validation, "test": test}


TASKS = {
    "temporal-order": 60,
    "temporal-order-3bit": 60,
    "adding": 30,
    "adding-squared": 30,
    "copy": 40,
    "copy-3": 40,
    "digits": 64,
    "digits-permuted": 64,
    "digits28": 784,
    "digits28-permuted": 784,
    "idx": 784,
    "idx-permuted": 784,
}
"""Every task's name and its default T."""


def _images(name: str, T: int, splits: dict[str, tuple[Tensor, Tensor]], bar: float) -> Images:
    pixels = splits["train"][0].shape[1]
    if T < 1 or pixels % T:
        raise ValueError(f"make_task: T must divide the {pixels} pixels of an image of {name!r}, got {T}")
    order = torch.arange(pixels)
    if name.endswith("-permuted"):
        order = torch.randperm(pixels, generator=torch.Generator().manual_seed(_PERMUTATION_SEED))
    classes = int(max(labels.max() for _, labels in splits.values())) + 1
    return Images(name, T, pixels // T, classes, bar, splits, order)


def make_task(name: str, T: int | None = None, data: str | Path | None = None) -> Task:
    """The task of that name.

    Args:
        name: "temporal-order", "temporal-order-3bit": 4 and 8 classes. "adding", "adding-squared": right within 0.04
            and within 0.2. "copy", "copy-3": 10 and 3 symbols to repeat. "digits": scikit-learn's 8×8 images,
            "digits28": up-sampled to 28×28, "idx": those in ``data``, each plain or "-permuted".
        T: sequence length; ``None``: 60 for temporal order, 30 for adding, 40 for copying, a pixel a step for images.
            A shorter T for images takes pixels / T of them a step.
        data: for "idx" and "idx-permuted": a folder with MNIST's (or Fashion-MNIST's) four IDX files, gzipped or not.
            Nothing is ever downloaded. Of the images held out, 2,000 by a fixed seed are looked at.

    Raises:
        ValueError: an unknown name, a T too short or that does not divide the pixels, ``data`` missing or unwanted.
        FileNotFoundError: a file that ``data`` lacks.

    Example:
        >>> import torch
        >>> task = make_task("temporal-order", T=60)
        >>> x, y = task.batch(torch.Generator().manual_seed(0), 5)
        >>> x.shape, y.shape
        (torch.Size([60, 5, 6]), torch.Size([5]))
    """
    if name not in TASKS:
        raise ValueError(f"make_task: name must be one of {', '.join(map(repr, TASKS))}, got {name!r}")
    T = TASKS[name] if T is None else T
    if (data is not None) != name.startswith("idx"):
        expected = "a folder of IDX files" if data is None else "None"
        raise ValueError(f"make_task: data must be {expected} for {name!r}, got {data!r}")
    if name.startswith("digits28"):
        return _images(name, T, _digits(28), bar=0.9)
    if name.startswith("digits"):
        return _images(name, T, _digits(8), bar=0.9)
    if name.startswith("idx"):
        return _images(name, T, _idx(Path(data)), bar=0.9)
    if name.startswith("copy"):
        length = 3 if name == "copy-3" else 10
        if T - 2 * length < 1:  # no step for the delimiter
            raise ValueError(f"make_task: T must be at least {2 * length + 1} for {name!r}, got {T}")
        return Copy(name, T, 10, 8, bar=0.9, length=length)
    if T < 10:
        raise ValueError(f"make_task: T must be at least 10 for {name!r}, got {T}")
    if name == "adding":
        return Adding(name, T, 2, 1, bar=0.9)
    if name == "adding-squared":
        return Adding(name, T, 2, 1, bar=0.95, tolerance=0.2)
    relevant = 3 if name == "temporal-order-3bit" else 2
    return TemporalOrder(name, T, 6, 2**relevant, bar=0.95, relevant=relevant)
