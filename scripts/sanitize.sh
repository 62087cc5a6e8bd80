#!/usr/bin/env bash
# Do the CPU kernels stay within their memory, and within what C++ defines? Builds the CPU module with AddressSanitizer,
# then with UndefinedBehaviorSanitizer, each in a folder of its own under build/, and runs some of the tests of the ops
# with it. The first report ends the tests, and the script fails.
#
#     scripts/sanitize.sh                  # both: two minutes, and the first time three for the builds
#     scripts/sanitize.sh address          # or undefined
#     scripts/sanitize.sh address -k relu  # other tests of the ops, as pytest is told
#
# In the environment: PYTHON, with all that the tests need (python3); TPK_CPU, an instruction set (the best).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
compiler=${CXX:-c++}
sanitizers=(address undefined)
if (($# > 0)); then
    if [[ $1 != address && $1 != undefined ]]; then
        echo "sanitize.sh: expected address or undefined, got '$1'" >&2
        exit 2
    fi
    sanitizers=("$1")
    shift
fi
# Forward and backward of every cell and inverse at the edges of tiles and blocks, in odd layouts, in several threads,
# in pieces; both solvers and the iteration.
names='test_forward or test_backward or test_layouts or test_heads or test_calls_from or test_checkpoints'
names+=' or test_some_gradients or test_large or test_rank_deficient or test_polar_converges'
names+=' or test_not_positive_definite or test_activations'
tests=(tests/ops/test_{recurrence,rnn,gru,regularized_inverse}.py -k "cpu and not float64 and ($names)")
(($# == 0)) || tests=(tests/ops "$@")

for sanitizer in "${sanitizers[@]}"; do
    build=$PWD/build/sanitize-$sanitizer
    echo "sanitize.sh: $sanitizer: builds in $build"
    configure=(-S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTPK_SANITIZE="$sanitizer")
    configure+=(-DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)")
    mkdir -p "$build"
    if ! { cmake "${configure[@]}" && cmake --build "$build"; } >"$build/log" 2>&1; then
        tail -n 30 "$build/log" >&2
        exit 1
    fi
    rm -rf "$build/site"
    mkdir "$build/site"
    cp -R tp_kernels tests conftest.py pyproject.toml "$build/site"
    rm -f "$build"/site/tp_kernels/_*.so
    cmake --install "$build" --prefix "$build/site" >>"$build/log"
    (
        cd "$build/site"
        if [[ $sanitizer == address ]]; then # its runtime has to come before all else, and what it wraps next
            runtime=$("$compiler" -print-file-name=libasan.so)
            export LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so.6)"
        fi
        export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
        export PYTHONPATH=$PWD TPK_REQUIRE_BACKENDS=reference,cpu
        "$python" -m pytest -q -x -s -p no:cacheprovider "${tests[@]}"
    )
    echo "sanitize.sh: $sanitizer: no report"
done
