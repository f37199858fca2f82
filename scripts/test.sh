#!/usr/bin/env bash
# From a fresh machine to tested: installs, lints, runs the suite.
# usage: scripts/test.sh [--all]   (--all: the slow tests too)
[ "${1:-}" != --help ] || { sed -n '2,/^[^#]/s/^# //p' "$0"; exit 0; }
. "$(dirname "$0")/venv.sh" requirements.txt requirements-dev.txt
case "${1:-}" in
  "") selection="not slow" ;;
  --all) selection="slow or not slow" ;;
  *) echo "error: unknown argument $1; usage: scripts/test.sh [--all]" >&2
     exit 2 ;;
esac
# Builds a C extension: without a compiler its tests are skipped, no more.
if ! .venv/bin/python -c 'import reasoning_gym' 2> /dev/null; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    reasoning-gym==0.1.25 || echo "tests of reasoning-gym are skipped" >&2
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyrefly check
exec .venv/bin/python -m pytest -m "$selection" --durations=10
