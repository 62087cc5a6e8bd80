"""``pytest --benchmark``: the short form of ``pytest benchmarks --benchmark-only``."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        dest="benchmarks",
        help="run the benchmarks, and nothing else: short for 'pytest benchmarks --benchmark-only'",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its own flag
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmarks"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: python -m pip install -e '.[test]'")
    config.option.benchmark_only = not config.option.benchmark_disable
    if config.args_source is not pytest.Config.ArgsSource.ARGS:  # no path given on the command line
        config.args[:] = [str(config.rootpath / "benchmarks")]
