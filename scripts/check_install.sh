#!/usr/bin/env bash
# Does what a user installs work? The package is installed into an empty virtual environment, as pip does it, and used from
# another folder: every file is there, `python -m tp_kernels.info` runs, so does the README's code, and so do some of the
# tests of the ops, all of it with the installed package.
#
#     scripts/check_install.sh                        # a source distribution, and from that the wheel
#     scripts/check_install.sh dist/tp_kernels-….whl  # this wheel, of this very checkout
#
# In the environment: PYTHON, whose empty environment it is (python3); TORCH, what to install first (the README's torch==…).
# Exit status 3: torch could not be installed for this Python, as it says; all that needs no torch has passed.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_sdist.sh
if (($# > 1)) || [[ $# == 1 && ! -f $1 ]]; then
    echo "check_install.sh: expected at most one argument, the path of a wheel, got '$*'" >&2
    exit 2
fi
python=$(command -v "${PYTHON:-python3}")
torch=${TORCH:-$(grep -om1 'torch==[0-9.]*' README.md)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH PYTHONHOME

"$python" -m venv "$work/env"
installed=$work/env/bin/python
"$installed" -m pip install -qq --upgrade pip
if (($# == 1)); then
    wheel=$1
else
    make_sdist "$python" "$work"
    "$installed" -m pip wheel -qq --no-deps --wheel-dir "$work" "$work"/*.tar.gz
    wheel=$(echo "$work"/*.whl)
fi
echo "check_install.sh: $("$installed" --version), $(basename "$wheel"), $(du -k "$wheel" | cut -f1) kB"

"$installed" -m pip install -qq --no-deps "$wheel"
site=$("$installed" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
diff -r --exclude=__pycache__ --exclude='*.so' tp_kernels "$site/tp_kernels"

mkdir "$work/elsewhere"
cp scripts/_installed.py README.md "$work/elsewhere"
cp -R tests "$work/elsewhere"
cd "$work/elsewhere"
"$installed" _installed.py module

# A CUDA build of torch is several gigabytes, of no use without the driver: only what pip would do is asked for.
if ! "$installed" -m pip install -qq --dry-run --report plan.json "$torch" 2>plan.log; then
    echo "check_install.sh: not checked with torch: pip finds no $torch for $("$installed" --version): $(tail -n 1 plan.log)"
    exit 3
fi
if ! command -v nvidia-smi >/dev/null && grep -q '"name": *"nvidia-' plan.json; then
    echo "check_install.sh: not checked with torch: for $("$installed" --version) pip has $torch as a CUDA build only," \
        "and this machine has no NVIDIA driver; TORCH=… names another torch"
    exit 3
fi
"$installed" -m pip install -qq "$torch" "$wheel"
"$installed" -m tp_kernels.info
"$installed" _installed.py readme README.md
"$installed" -m pip install -qq "$wheel[test]"
TPK_REQUIRE_BACKENDS=reference,cpu "$installed" -m pytest -q -p _installed -p no:cacheprovider \
    -k 'cpu and not cuda and not triton' tests/ops
echo "check_install.sh: passed"
