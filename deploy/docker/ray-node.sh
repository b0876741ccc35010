#!/bin/bash
# Runs a node of the Ray cluster whose head is at RAY_HEAD_ADDRESS (host:port).
set -euo pipefail

exec ray start --block --address="$RAY_HEAD_ADDRESS" --num-cpus=1 \
    --object-store-memory="${RAY_OBJECT_STORE_BYTES:-100000000}"
