#!/bin/bash
# Runs Ray's head node, and on it the driver of the decode pool. Ends when either ends. On SIGTERM
# the pool drains its workers first.
set -euo pipefail

readonly address=127.0.0.1:6379

ray start --head --block --port=6379 --num-cpus=1 --include-dashboard=false \
    --object-store-memory="${RAY_OBJECT_STORE_BYTES:-100000000}" &
ray_pid=$!

stop() {
    kill -TERM "${pool_pid:-$ray_pid}" 2>/dev/null || true
}
trap stop TERM INT

until ray health-check --address "$address" 2>/dev/null; do
    kill -0 "$ray_pid" 2>/dev/null || { echo "Ray's head did not start" >&2; exit 1; }
    sleep 0.5
done

RAY_ADDRESS=$address python -m services.decode &
pool_pid=$!

# A signal ends `wait` too: go on until a process has ended.
status=0
while kill -0 "$ray_pid" 2>/dev/null && kill -0 "$pool_pid" 2>/dev/null; do
    status=0
    wait -n "$ray_pid" "$pool_pid" || status=$?
done
kill -TERM "$ray_pid" "$pool_pid" 2>/dev/null || true
wait
exit "$status"
