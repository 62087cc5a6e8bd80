# Sourced by check_install.sh and build_wheels.sh.

# make_sdist PYTHON FOLDER: writes a source distribution of this checkout into FOLDER. It is made from a copy: what lies
# about in the checkout (build/, an old list of files in *.egg-info) must not get into it, nor anything new into the checkout.
make_sdist() {
    local python=$1 folder=$2 copy=$2/checkout left
    mkdir "$copy"
    if [[ -e .git ]]; then
        git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -cf - | tar -xf - -C "$copy"
    else
        cp -R . "$copy" # an unpacked source distribution
    fi
    "$python" -m venv "$folder/tools"
    "$folder/tools/bin/python" -m pip install -qq build
    "$folder/tools/bin/python" -m build --sdist --outdir "$folder" "$copy" >"$folder/sdist.log" 2>&1 || {
        cat "$folder/sdist.log" >&2
        return 1
    }
    # Everything that is not a dot file or a measurement has to be in it.
    left=$(comm -23 \
        <(cd "$copy" && find . -type f -not -path './.*' -not -path './benchmarks/results/*/*' | sed 's|^\./||' | sort) \
        <(tar -tzf "$folder"/*.tar.gz | cut -d/ -f2- | sort))
    rm -r "$copy"
    if [[ -n $left ]]; then
        echo "the source distribution lacks these files (see MANIFEST.in):" $left >&2
        return 1
    fi
}
