#!/bin/sh
# Makes the server's kit, and lets each site make its own key and be admitted. A site's key never leaves the site's volume.
# Requests and replies go through a volume that all four services may write to. A trial trusts them: it does not compare
# fingerprints (--yes).
set -eu
cd "$(dirname "$0")"

in_container() {
    docker compose run --rm --no-deps -T --entrypoint sh "$1" -c "$2"
}

in_container server "mira kit server --out /kit/server --address server:9443"
for site in hospital-1 hospital-2 hospital-3; do
    in_container "$site" "mira kit join --kit /kit/site --server server:9443 --name $site && cp /kit/$site.request /mail"
    in_container server "mira kit admit /mail/$site.request --server /kit/server --yes"
    in_container "$site" "mira kit accept /mail/$site.reply --kit /kit/site --yes"
done
