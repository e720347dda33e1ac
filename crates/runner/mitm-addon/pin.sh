#!/bin/sh
# Makes requirements.txt and requirements-dev.txt from the .in files: one list for every Python from 3.11 on, each file
# by its SHA-256. Needs uv on PATH.
set -eu
cd "$(dirname "$0")"
pin() {
    uv pip compile --quiet --universal --python-version 3.11 --only-binary :all: --generate-hashes --no-annotate \
        --no-emit-index-url --override overrides.in --custom-compile-command ./pin.sh --output-file "$@"
}
pin requirements.txt requirements.in
pin requirements-dev.txt requirements-dev.in
