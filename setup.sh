#!/bin/sh
# Make a virtual environment in .venv beside this file and install pizoo into it, with what its tests need.
set -eu
cd "$(dirname "$0")"
if ! python3 -c 'import ensurepip' 2>/dev/null; then
    # Debian ships Python without what makes virtual environments.
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update -qq
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv
fi
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
