#!/bin/sh
# Makes the passwords and tokens of the compose stack in deploy/secrets/, once. Remove that folder
# to have new ones made.
set -eu
cd "$(dirname "$0")"

if [ -e secrets ]; then
    echo "deploy/secrets/ is there already; nothing done" >&2
    exit 0
fi

random() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

umask 077
new=$(mktemp -d secrets.XXXXXX)
password=$(random)
printf '%s' "$password" >"$new/redis_password"
printf 'requirepass %s\n' "$password" >"$new/redis_auth.conf"
printf 'redis://:%s@redis:6379/0' "$password" >"$new/redis_url"
random >"$new/ray_auth_token"
# The folder keeps others on this machine out. The files keep their mode inside the containers,
# whose users are not the one that runs this.
chmod 444 "$new"/*
mv "$new" secrets
echo "made deploy/secrets/" >&2
