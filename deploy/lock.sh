#!/usr/bin/env bash
# Writes requirements/lock.txt: every package of every extra by exact version and hash, torch's own dependencies too,
# torch itself not (requirements/torch.txt). Run by `make lock`. Names no index: any that serves the same files will do.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
LOCK=requirements/lock.txt
trap 'rm -f "$LOCK.new" "$LOCK.log"' EXIT

{
    echo "# Made by \`make lock\` from pyproject.toml; do not edit. Python 3.11 and newer, Linux."
    echo "# torch is apart: requirements/torch.txt"
} >"$LOCK.new"
# The constraint makes the resolver look at the CPU build, whose dependencies have no CUDA among them.
.venv/bin/pip-compile --quiet --upgrade --all-extras --generate-hashes --strip-extras \
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header \
    --no-allow-unsafe --unsafe-package torch --constraint requirements/torch.txt \
    --no-build-isolation --extra-index-url "$TORCH_INDEX" --pip-args '--retries 1 --timeout 15' \
    --output-file - pyproject.toml 2>"$LOCK.log" |
    sed '/^# WARNING: The following packages were not pinned/,$d' >>"$LOCK.new" || { cat "$LOCK.log" >&2; exit 1; }

for wrong in '^nvidia-|^cuda-|^triton' '://' '^torch='; do
    if grep -E "$wrong" "$LOCK.new"; then
        echo "lock: the lines above must not be there; is TORCH_INDEX an index of CPU builds?" >&2
        exit 1
    fi
done
mv "$LOCK.new" "$LOCK"
