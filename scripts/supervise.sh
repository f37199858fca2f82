#!/usr/bin/env bash
# Keeps a run going: starts the command again after it was preempted (exit code
# 75), crashed or was killed; never after it is done (0), refused its input (2),
# lost its loss (3), has no usable checkpoint (4) or was stopped
# together with this script.
# usage: scripts/supervise.sh COMMAND...
#   such as: scripts/supervise.sh .venv/bin/python -m experiments.pretrain \
#     --variant=small --workdir=runs/mine
set -uo pipefail
[ "${1:-}" != --help ] || { sed -n '2,/^[^#]/s/^# //p' "$0"; exit 0; }
[ $# -gt 0 ] || { echo "usage: $0 COMMAND..." >&2; exit 2; }
stopping=
trap 'stopping=1; [ -z "${child:-}" ] || kill -TERM "$child" 2>/dev/null' TERM INT
wait_s=1
while true; do
  began=$SECONDS
  "$@" &
  child=$!
  wait "$child"; code=$?
  # A signal to this script ends `wait` before the command has ended.
  while [ "$code" -gt 128 ] && kill -0 "$child" 2>/dev/null; do
    wait "$child"; code=$?
  done
  if [ -n "$stopping" ]; then wait "$child"; last=$?; [ $last = 127 ] || code=$last; fi
  case $code in 0|2|3|4) exit "$code" ;; esac
  [ -z "$stopping" ] || exit "$code"
  # Longer waits where it fails at once; the run itself ends crash loops.
  [ $((SECONDS - began)) -lt 60 ] && [ "$code" != 75 ] || wait_s=1
  echo "supervise: exit code $code; starting again in $wait_s s" >&2
  sleep "$wait_s" & wait $!
  [ -z "$stopping" ] || exit "$code"
  wait_s=$((wait_s < 60 ? wait_s * 2 : 60))
done
