#!/usr/bin/env bash
# Builds dist/fieldfare-agent_*.deb and dist/fieldfare-aggregator_*.deb, each with a virtual environment of its own.
# Run by `make deb`. Needs Debian's debhelper, dh-virtualenv and python3-venv (`deploy/setup.sh tests` installs them) and
# the .venv of `make setup`. The packages fit the Debian release and the architecture that they were built on.
#
#   OUT          where the packages go (dist)
#   REVISION     of the packages of one version (1)
#   PYTHON       with the tools of requirements/lock.txt (.venv/bin/python)
#   and dpkg-deb's own: DPKG_DEB_COMPRESSOR_TYPE=gzip DPKG_DEB_COMPRESSOR_LEVEL=1 is quick, xz is small
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=$(realpath -m "${OUT:-dist}")
REVISION=${REVISION:-1}
TREE=$PWD/build/deb/fieldfare
PYTHON=${PYTHON:-$PWD/.venv/bin/python}

say() { echo "deb: $*" >&2; }
die() { say "$*"; exit 1; }

missing=()
for package in debhelper dh-virtualenv dpkg-dev fakeroot python3-venv; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] || die "please run this, then again: sudo apt-get install -y --no-install-recommends ${missing[*]}"

rm -rf build/deb
mkdir -p "$TREE"/{source,wheel} "$OUT"
cp -r deploy/deb/debian "$TREE/"

# From here on with the code of this checkout, wherever .venv says that Fieldfare lies.
export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1
VERSION=$("$PYTHON" -c 'from shared.version import VERSION; print(VERSION)')
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH

# --- the wheel, from a copy, because a build writes beside what it builds ----------------------------------------------

cp -r pyproject.toml setup.cfg LICENSE README.md shared edge_agent aggregator mosquitto systemd requirements "$TREE/source/"
find "$TREE/source" -name __pycache__ -prune -exec rm -rf {} +
say "building the wheel of $VERSION"
(cd "$TREE/source" && PYTHONPATH='' "$PYTHON" -m pip --disable-pip-version-check wheel -q \
    --no-deps --no-build-isolation --no-index -w ../wheel .)

# --- what each package installs, and says about itself -----------------------------------------------------------------

"$PYTHON" -m deploy.deb.contents "$TREE" "$VERSION"
cp LICENSE CHANGELOG.md "$TREE/"
cp docs/samples/agent.full.toml "$TREE/agent.full.toml"

cat >"$TREE/debian/changelog" <<END
fieldfare ($VERSION-$REVISION) unstable; urgency=medium

  * changelog.gz has what changed.

 -- Fieldfare maintainers <maintainers@fieldfare.invalid>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
END

# --- the packages ------------------------------------------------------------------------------------------------------

say "building the packages"
log=build/deb/build.log
(cd "$TREE" && env -u PYTHONPATH DEB_BUILD_OPTIONS="nocheck parallel=$(nproc)" dpkg-buildpackage -b -us -uc) >"$log" 2>&1 || {
    tail -n 40 "$log" >&2
    die "failed; all of it is in $log"
}
rm -f "$OUT"/fieldfare-{agent,aggregator}_*.deb
cp build/deb/*.deb "$OUT/"
for package in "$OUT"/fieldfare-*_"$VERSION-$REVISION"_*.deb; do
    say "$package ($(du -h "$package" | cut -f 1))"
done
