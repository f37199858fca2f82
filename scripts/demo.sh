#!/usr/bin/env bash
# From a fresh machine to a trained small DeepSeek-V3, its text and its report.
# usage: scripts/demo.sh [flags of experiments.pretrain]
[ "${1:-}" != --help ] || { sed -n '2,/^[^#]/s/^# //p' "$0"; exit 0; }
. "$(dirname "$0")/venv.sh" requirements.txt
# On CPU, a fifth faster with mimalloc than with the system's allocator.
mimalloc="$(find .venv/ -name libmimalloc.so -print -quit)"
LD_PRELOAD="${LD_PRELOAD-$mimalloc}" MIMALLOC_PURGE_DELAY=1000 \
  .venv/bin/python -m experiments.pretrain --variant=tiny --workdir=runs/demo \
  --mesh=data=2 "$@"
.venv/bin/python -m experiments.sample --workdir=runs/demo \
  --prompt="It is a truth universally acknowledged, that" --max_tokens=120
.venv/bin/python -m scripts.report --workdir=runs/demo
