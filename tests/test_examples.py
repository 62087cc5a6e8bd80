"""The examples run, in a short form, and what they print is so."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from torch import distributed

EXAMPLES = Path(__file__).parent.parent / "examples"
CONVERT = sorted(path.stem for path in (EXAMPLES / "convert").glob("*.py") if path.stem != "compare")


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script of that name, imported."""
    monkeypatch.syspath_prepend(EXAMPLES / "convert")
    monkeypatch.delitem(sys.modules, "compare", raising=False)
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / "convert" / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("compare")


def test_all_are_there():
    assert CONVERT == ["char_rnn", "recurrent_policy", "seq2seq", "session_gru", "word_language_model"]
    listed = (EXAMPLES / "convert" / "README.md").read_text()
    assert all(f"({name}.py)" in listed for name in CONVERT)


@pytest.mark.parametrize("example", CONVERT, indirect=True)
@pytest.mark.parametrize("rule", ["tp", "identity"])
def test_converted(example, rule):
    """A changed state is an error in it."""
    losses = example.main(["--steps", "4", "--hidden", "16", "--rule", rule])
    assert list(losses) == ["torch.nn", "BackProp()", rule]
    theirs, ours, ruled = losses.values()
    assert len(theirs) == 4
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(map(math.isfinite, ruled))
    assert ruled[-1] != pytest.approx(theirs[-1], rel=1e-5), "the rule changes what is learned"


@pytest.mark.parametrize("example", ["char_rnn", "seq2seq", "session_gru"], indirect=True)
def test_converted_trains(example):
    *_, losses = example.main(["--steps", "12", "--hidden", "24"]).values()
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("example", ["session_gru"], indirect=True)
def test_a_masked_state_is_an_error(example, monkeypatch):
    """As it would be if the example did to ours what it does to torch.nn."""
    masks = example.Model.forward

    def forward(self, items, state, begins):
        return masks(self, items, state * ~begins[:, None], begins)

    monkeypatch.setattr(example.Model, "forward", forward)
    with pytest.raises(UserWarning, match="was changed after a layer"):
        example.main(["--steps", "2", "--hidden", "8"])


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo")
def test_sequence_parallel(monkeypatch):
    """Four processes are as one: what reaches the second comes from the third and, through it, from the fourth."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("sequence_parallel")
    options = "--ranks 4 --chunk 7 --hidden 6 --steps 3 --overlap 0 3 7 --inverse weight identity"
    results = example.main(options.split())
    assert len(results) == 6
    for losses, difference in results:
        assert difference < 1e-12
        assert losses[-1] < losses[0]
    assert len({losses[-1] for losses, _ in results}) == 6, "each rule learns something else"
