#!/bin/sh
# Makes the secrets that docker-compose.yml and deploy/kubernetes mount, in deploy/secrets/ (or the folder that is named). What is there stays.
#
#   api_keys           the server's keys, one a line: the first for clients, the last for Prometheus
#   metrics_key        the one that Prometheus sends
#   hf_token           access to the hub; empty for none
#   grafana_password   of Grafana's user admin
set -eu

folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 700 "$folder" # other users of this machine stop here; the files themselves must be readable for the containers' users
cd "$folder"
umask 022

random() {
    head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

for name in metrics_key grafana_password; do
    if [ ! -s "$name" ]; then random > "$name"; fi
done
if [ ! -s api_keys ]; then printf '# One key a line.\n%s\n' "$(random)" > api_keys; fi
if ! grep -qxF "$(cat metrics_key)" api_keys; then printf '\n%s\n' "$(cat metrics_key)" >> api_keys; fi
touch hf_token
chmod 644 api_keys metrics_key hf_token grafana_password

echo "Secrets are in $(pwd): clients send the first key of api_keys, Grafana's admin has grafana_password."
