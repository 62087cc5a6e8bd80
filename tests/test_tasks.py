"""Every task against its definition, step by step in plain Python; real images against scikit-learn's own arrays."""

import gzip
import struct
from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from tp_kernels.regimes.tasks import TASKS, Task, make_task, read_idx

PLACES = {"temporal-order": ((0.1, 0.2), (0.5, 0.6)), "temporal-order-3bit": ((0.1, 0.2), (0.3, 0.4), (0.6, 0.7))}
NAMES = [name for name in TASKS if not name.startswith("idx")]


def draw(task: Task, B: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return task.batch(torch.Generator().manual_seed(seed), B)


@pytest.mark.parametrize("T", [10, 37, 60])
@pytest.mark.parametrize("name", PLACES)
def test_temporal_order_by_definition(name: str, T: int) -> None:
    task = make_task(name, T)
    x, y = draw(task, 400)
    assert x.shape == (T, 400, 6)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert (x.sum(-1) == 1).all()
    seen = set()
    for sequence, label in zip(x.transpose(0, 1), y.tolist(), strict=True):
        symbols = [step.tolist().index(1.0) for step in sequence]
        relevant = [(place, symbol) for place, symbol in enumerate(symbols) if symbol < 2]
        assert len(relevant) == len(PLACES[name])
        for (place, _), (low, high) in zip(relevant, PLACES[name], strict=True):
            assert int(low * T + 1e-9) <= place < high * T
        assert label == sum(symbol * 2**bit for bit, (_, symbol) in enumerate(relevant))
        seen.update([label], (("place", place) for place, _ in relevant))
    assert seen >= set(range(task.output_size)), "every class occurs"
    tenth = T // 10
    assert len(seen) - task.output_size == tenth * len(PLACES[name]), "every place occurs, and no other"


def test_temporal_order_distractors_are_all_used_evenly() -> None:
    counts = draw(make_task("temporal-order", 60), 1000)[0].sum((0, 1))
    torch.testing.assert_close(counts[2:], torch.full((4,), 58_000 / 4), rtol=0.03, atol=0)
    torch.testing.assert_close(counts[:2], torch.full((2,), 1000.0), rtol=0.1, atol=0)


@pytest.mark.parametrize("T", [10, 30, 45])
def test_adding_by_definition(T: int) -> None:
    task = make_task("adding", T)
    x, y = draw(task, 500)
    assert x.shape == (T, 500, 2)
    firsts, seconds = set(), set()
    for sequence, answer in zip(x.transpose(0, 1).tolist(), y.tolist(), strict=True):
        marked = [place for place, (mark, _) in enumerate(sequence) if mark == 1]
        assert {mark for mark, _ in sequence} == {0.0, 1.0}
        assert len(marked) == 2
        assert answer == pytest.approx(sum(sequence[place][1] for place in marked) / 2)
        firsts.add(marked[0])
        seconds.add(marked[1])
    assert firsts == set(range(T // 10))
    assert seconds == set(range(T // 10, T // 2))
    values = x[..., 1]
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert y.var().item() == pytest.approx(1 / 24, rel=0.15)


@pytest.mark.parametrize(("name", "tolerance", "guess"), [("adding", 0.04, 0.1536), ("adding-squared", 0.2, 0.64)])
def test_adding_is_right_within_the_tolerance(name: str, tolerance: float, guess: float) -> None:
    task = make_task(name)
    y = torch.tensor([0.5, 0.5, 0.5, 0.5])
    output = torch.tensor([[tolerance * 0.99], [-tolerance * 0.99], [tolerance * 1.01], [-tolerance * 1.01]]) + 0.5
    assert task.correct(output, y).tolist() == [True, True, False, False]
    _, answers = draw(task, 20_000)
    assert task.correct(torch.full((20_000, 1), 0.5), answers).float().mean().item() == pytest.approx(guess, abs=0.02)


@pytest.mark.parametrize(("name", "length"), [("copy", 10), ("copy-3", 3)])
@pytest.mark.parametrize("T", [21, 40])
def test_copy_by_definition(name: str, length: int, T: int) -> None:
    task = make_task(name, T)
    x, y = draw(task, 300)
    assert x.shape == (T, 300, 10)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert (x.sum(-1) == 1).all()
    for sequence, answers in zip(x.transpose(0, 1), y.tolist(), strict=True):
        symbols = [step.tolist().index(1.0) for step in sequence]
        assert symbols == answers + [8] * (T - 2 * length - 1) + [9] + [8] * length
    assert (task.answers, task.output_size) == (length, 8)
    counts = torch.bincount(y.flatten(), minlength=8)
    torch.testing.assert_close(counts / y.numel(), torch.full((8,), 1 / 8), rtol=0, atol=0.05)


def test_copy_is_judged_answer_by_answer() -> None:
    task = make_task("copy-3", 10)
    y = torch.tensor([[0, 1, 2], [3, 4, 5]])
    output = torch.zeros(2, 3, 8)
    output[0, 0, 0] = output[0, 1, 1] = 10.0
    output[0, 2, 7] = output[1, 0, 7] = output[1, 1, 7] = output[1, 2, 7] = 10.0
    assert task.correct(output, y).tolist() == [[True, True, False], [False, False, False]]
    each = [-torch.log_softmax(output[i, k], -1)[y[i, k]] for i in range(2) for k in range(3)]
    torch.testing.assert_close(task.loss(output, y), sum(each) / 6)


@cache
def whereabouts() -> dict[tuple[float, ...], int]:
    """Each of scikit-learn's images, 64 grey levels in raster order, and its index: no two are alike."""
    found = {tuple(image): index for index, image in enumerate(load_digits().images.reshape(-1, 64).tolist())}
    assert len(found) == 1797
    return found


def digit_of(pixels: Tensor) -> int:
    """Which of scikit-learn's images this is, given as 64 pixels in [0, 1]."""
    return whereabouts()[tuple((pixels * 16).tolist())]


def raster(task: Task, x: Tensor) -> Tensor:
    """[T, B, M] back to images of raster order, [B, pixels]."""
    pixels = x.transpose(0, 1).flatten(1)
    return pixels[:, torch.argsort(task.order)]


@pytest.mark.parametrize(("name", "T"), [("digits", 64), ("digits", 8), ("digits-permuted", 64)])
def test_digits_are_scikit_learns_pixel_by_pixel(name: str, T: int) -> None:
    task = make_task(name, T)
    x, y = draw(task, 30)
    assert x.shape == (T, 30, 64 // T)
    target = load_digits().target
    for image, label in zip(raster(task, x), y.tolist(), strict=True):
        assert target[digit_of(image)] == label


def test_digits_are_read_in_raster_order() -> None:
    x, _ = make_task("digits").held_out("test")
    image = load_digits().images[digit_of(x[:, 0, 0])] / 16
    for row in range(8):
        for column in range(8):
            assert x[8 * row + column, 0, 0].item() == pytest.approx(image[row, column])


def test_the_permutation_is_one_and_is_fixed() -> None:
    plain, permuted = make_task("digits"), make_task("digits-permuted")
    assert sorted(permuted.order.tolist()) == list(range(64))
    assert permuted.order.tolist() != list(range(64))
    x, y = plain.held_out("test")
    x_permuted, y_permuted = permuted.held_out("test")
    assert torch.equal(y, y_permuted)
    assert torch.equal(x[permuted.order], x_permuted)
    assert torch.equal(make_task("digits-permuted").order, permuted.order)


def test_digits_sets_are_disjoint_complete_and_stratified() -> None:
    task = make_task("digits")
    indices = {which: [digit_of(image) for image in task.splits[which][0]] for which in task.splits}
    assert {which: len(found) for which, found in indices.items()} == {"train": 1197, "validation": 300, "test": 300}
    assert sorted(chain(*indices.values())) == list(range(1797))
    share = np.bincount(load_digits().target) / 1797
    for which, (_, labels) in task.splits.items():
        np.testing.assert_allclose(np.bincount(labels) / len(labels), share, atol=0.004, err_msg=which)


def test_training_batches_come_from_the_training_set() -> None:
    task = make_task("digits")
    drawn = {tuple(image) for image in draw(task, 5000)[0][..., 0].T.tolist()}
    assert drawn <= {tuple(image) for image in task.splits["train"][0].tolist()}
    assert len(drawn) > 1100


def test_digits28_are_the_digits_up_sampled() -> None:
    task = make_task("digits28")
    x, y = task.held_out("test")
    small, y_small = make_task("digits").held_out("test")
    assert x.shape == (784, 300, 1)
    assert torch.equal(y, y_small)
    # Bilinear by the book: linear between pixels' centres, along one axis and then along the other.
    centres = (np.arange(28) + 0.5) * 8 / 28 - 0.5
    for image, original in zip(
        x[:, :5, 0].T.unflatten(1, (28, 28)), small[:, :5, 0].T.unflatten(1, (8, 8)), strict=True
    ):
        wide = np.stack([np.interp(centres, np.arange(8), row) for row in original.numpy()])
        large = np.stack([np.interp(centres, np.arange(8), column) for column in wide.T], axis=1)
        np.testing.assert_allclose(image, large, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_one_batch_and_one_held_out_set(name: str) -> None:
    first, second = make_task(name), make_task(name)
    for left, right in zip(draw(first, 5), draw(second, 5), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(draw(first, 5)[0], draw(first, 5, seed=1)[0])
    for which in ("validation", "test"):
        for left, right in zip(first.held_out(which), second.held_out(which), strict=True):
            assert torch.equal(left, right)
    assert not torch.equal(first.held_out("validation")[0], first.held_out("test")[0])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_a_loss_with_a_gradient(name: str) -> None:
    task = make_task(name)
    x, y = draw(task, 3)
    assert x.shape == (task.T, 3, task.input_size)
    assert x.dtype == torch.float32
    several = () if task.answers == 1 else (task.answers,)
    assert y.shape == (3, *several)
    output = torch.randn(3, *several, task.output_size, requires_grad=True)
    task.loss(output, y).backward()
    assert output.grad.abs().sum() > 0
    assert task.correct(output, y).shape == y.shape
    assert 0 < task.bar < 1


# --- IDX files --------------------------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """Four small files in MNIST's layout, two of them gzipped, and the arrays in them."""
    random = np.random.default_rng(0)
    arrays = {}
    for stem, count in (("train", 80), ("t10k", 20)):
        arrays[stem] = random.integers(0, 256, (count, 4, 6), np.uint8), (np.arange(count) % 4).astype(np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[stem], strict=True):
            path = tmp_path / f"{stem}-{kind}-ubyte"
            if stem == "train":
                path.write_bytes(idx_bytes(array))
            else:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx_bytes(array)))
    return tmp_path, arrays


def test_idx_files_are_read_as_they_are(idx_folder) -> None:
    folder, arrays = idx_folder
    np.testing.assert_array_equal(read_idx(folder / "train-images-idx3-ubyte"), arrays["train"][0])
    np.testing.assert_array_equal(read_idx(folder / "t10k-labels-idx1-ubyte.gz"), arrays["t10k"][1])


def test_idx_task(idx_folder) -> None:
    folder, arrays = idx_folder
    task = make_task("idx", T=12, data=folder)
    assert (task.T, task.input_size, task.output_size) == (12, 2, 4)
    x, y = task.held_out("test")
    np.testing.assert_allclose(x.transpose(0, 1).reshape(20, 4, 6), arrays["t10k"][0] / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(y, arrays["t10k"][1])
    assert len(task.splits["train"][1]) + len(task.splits["validation"][1]) == 80


def test_idx_files_that_are_damaged_or_absent(idx_folder, tmp_path) -> None:
    folder, _ = idx_folder
    path = folder / "train-labels-idx1-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"must hold \[80\] bytes after its header, got 79"):
        read_idx(path)
    path.write_bytes(b"\x00\x00\x0d" + whole[3:])
    with pytest.raises(ValueError, match=r"must start with bytes 00 00 08 .*got 00 00 0d"):
        read_idx(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds train-labels-idx1-ubyte or train-labels-idx1-ubyte\.gz"):
        make_task("idx", T=12, data=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sorting"}, "name must be one of 'temporal-order', .*got 'sorting'"),
        ({"name": "temporal-order", "T": 9}, "T must be at least 10 for 'temporal-order', got 9"),
        ({"name": "copy", "T": 20}, "T must be at least 21 for 'copy', got 20"),
        ({"name": "copy-3", "T": 6}, "T must be at least 7 for 'copy-3', got 6"),
        ({"name": "digits", "T": 784}, "T must divide the 64 pixels of an image of 'digits', got 784"),
        ({"name": "idx"}, "data must be a folder of IDX files for 'idx', got None"),
        ({"name": "digits", "data": "x"}, "data must be None for 'digits', got 'x'"),
    ],
    ids=["name", "short", "copy", "copy-3", "pixels", "no data", "data"],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**arguments)


def test_an_unknown_set() -> None:
    for name in ("digits", "adding"):
        with pytest.raises(ValueError, match="which must be 'validation' or 'test', got 'train'"):
            make_task(name).held_out("train")
