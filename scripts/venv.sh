# Sourced by the other scripts: makes .venv once and installs what is listed.
# usage: . scripts/venv.sh REQUIREMENTS_FILE...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for python in python3.11 python3.12 python3.13 python3; do
  if "$python" -c 'import sys, venv; sys.exit(sys.version_info[:2] < (3, 11))' \
      2>/dev/null; then
    break
  fi
  python=
done
if [ -z "${python:-}" ]; then
  echo "error: Python 3.11 or newer with the venv module is needed" >&2
  exit 2
fi
stamp=".venv/$(cat "$@" | cksum | cut -d' ' -f1).installed"
if [ ! -e "$stamp" ]; then
  echo "installing $* into .venv"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    "${@/#/--requirement=}"
  touch "$stamp"
fi
