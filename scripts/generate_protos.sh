#!/usr/bin/env bash
# Generates the Python code of protos/ in place. `--check` fails if that changes anything.
set -euo pipefail
cd "$(dirname "$0")/.."
out=protos
if [ "${1:-}" = --check ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
python -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" \
  --grpc_python_out="$out" --mypy_grpc_out="$out" protos/chunkserve/v1/*.proto
if [ "$out" != protos ]; then
  for file in "$out"/chunkserve/v1/*; do
    cmp -s "$file" "protos/chunkserve/v1/$(basename "$file")" || {
      echo "generated code is out of date: $(basename "$file"); run make protos" >&2
      exit 1
    }
  done
fi
