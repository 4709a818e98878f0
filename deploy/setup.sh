#!/usr/bin/env bash
# Makes a clone ready to work in: system programs by apt, then .venv from the hashed lock, torch apart, Fieldfare itself.
# Does nothing when nothing changed since the last time. Run by `make setup`; `deploy/setup.sh tests` also wants what
# only the tests use.
#
#   PYTHON       the interpreter the virtual environment is made with (python3)
#   TORCH_INDEX  where to find the CPU build of torch (https://download.pytorch.org/whl/cpu)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
PATH=$PATH:/usr/sbin:/sbin # Debian keeps mosquitto there, away from the PATH of ordinary users
STAMP=.venv/fieldfare.setup

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

# --- system programs -------------------------------------------------------------------------------------------------

missing_packages() { # the Debian packages of what is not there
    command -v mosquitto >/dev/null || echo mosquitto
    command -v mosquitto_pub >/dev/null || echo mosquitto-clients
    command -v "$PYTHON" >/dev/null || echo python3
    [ -x .venv/bin/python ] || "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    if [ "${1:-}" = tests ]; then
        command -v openssl >/dev/null || echo openssl
        command -v systemd-analyze >/dev/null || echo systemd
        # The Debian packages, and machines to install them on.
        if command -v apt-get >/dev/null; then
            command -v dh >/dev/null || echo debhelper
            command -v dh_virtualenv >/dev/null || echo dh-virtualenv
            command -v dpkg-buildpackage >/dev/null || echo dpkg-dev
            command -v fakeroot >/dev/null || echo fakeroot
            command -v lintian >/dev/null || echo lintian
            command -v mmdebstrap >/dev/null || echo mmdebstrap
            command -v systemd-nspawn >/dev/null || echo systemd-container
            /usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
        fi
    fi
}

install_packages() {
    local as_root=()
    command -v apt-get >/dev/null || die "please install these with your system's package manager: $*"
    if [ "$(id -u)" != 0 ]; then
        as_root=(sudo)
        sudo -n true 2>/dev/null || die "please run this, then again: sudo apt-get install -y $*"
    fi
    say "installing by apt: $*"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" </dev/null
    # Debian enables and starts a broker on port 1883 with the package. Only the program is wanted here.
    if [[ " $* " == *" mosquitto "* ]] && command -v systemctl >/dev/null; then
        "${as_root[@]}" systemctl --quiet disable mosquitto.service 2>/dev/null || true
        [ ! -d /run/systemd/system ] || "${as_root[@]}" systemctl stop mosquitto.service
    fi
}

missing=$(missing_packages "$@")
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # one word per package
    install_packages $missing
    missing=$(missing_packages "$@")
    [ -z "$missing" ] || die "still missing after installing: $(echo "$missing" | xargs)"
fi

# --- the virtual environment -----------------------------------------------------------------------------------------

wanted=$(pwd; "$PYTHON" --version; sha256sum deploy/setup.sh requirements/*.txt pyproject.toml setup.cfg)
if [ -x .venv/bin/python ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$PYTHON is $("$PYTHON" --version); Python 3.11 or newer is needed (PYTHON=...)"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if [ ! -x .venv/bin/python ] || { [ -e "$STAMP" ] && [ "$(head -n 1 "$STAMP")" != "$(pwd)" ]; }; then # new, or moved
    say "making .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear .venv
fi
rm -f "$STAMP"

say "installing what requirements/lock.txt names (hashes checked)"
pip install -q --require-hashes --no-deps -r requirements/lock.txt

# Few retries: where the index cannot be reached, pip's own configuration may still offer a CPU build.
say "installing $(grep '^torch' requirements/torch.txt) (CPU build; $TORCH_INDEX)"
pip install -q --no-deps --retries 1 --timeout 15 --extra-index-url "$TORCH_INDEX" -r requirements/torch.txt ||
    die "torch could not be installed; TORCH_INDEX=URL names another index that has its CPU build"
cuda=$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")') || die "the installed torch cannot be imported"
if [ -n "$cuda" ]; then
    pip uninstall -q -y torch
    die "the torch found is a build for CUDA $cuda, gigabytes more than needed; TORCH_INDEX=URL names an index with the CPU build"
fi

PYTHONWARNINGS=ignore pip install -q --no-deps --no-build-isolation --no-index -e .
pip check >/dev/null || die "$(pip check)"
printf '%s\n' "$wanted" >"$STAMP"
say "ready"
