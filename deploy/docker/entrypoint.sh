#!/bin/sh
# Completes the environment of a service, then becomes it.
set -eu

# A URL with a password comes as a file, so that it does not show in the container's configuration.
if [ -n "${CHUNKSERVE_REDIS_URL_FILE:-}" ]; then
    CHUNKSERVE_REDIS_URL=$(cat "$CHUNKSERVE_REDIS_URL_FILE")
    export CHUNKSERVE_REDIS_URL
fi

exec "$@"
