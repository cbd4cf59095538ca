#!/usr/bin/env bash
# `make observe`: serve CONFIG, scrape it with Prometheus, send load until Ctrl-C. Grafana, where there is one, can be pointed at it.
#   deploy/observe.sh BIN CONFIG
set -euo pipefail
bin=$1 config=$2
server_port=${CASCADE_PORT:-8000}
prometheus_port=${PROMETHEUS_PORT:-9090}
here=$(cd "$(dirname "$0")" && pwd)

command -v prometheus >/dev/null || {
    echo "Prometheus is not installed. On Debian and Ubuntu: apt install prometheus" >&2
    exit 1
}
folder=$(mktemp -d)
end() {
    trap - EXIT INT TERM
    sleep 1 # Ctrl-C reached all of them; a second signal would end the server at once
    kill $(jobs -p) 2>/dev/null || true
    wait
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 0' INT TERM

sed -e "s/127\.0\.0\.1:8000/127.0.0.1:$server_port/" -e 's/_interval: 15s/_interval: 5s/' -e "s|rules/|$here/prometheus/rules/|" \
    "$here/prometheus/prometheus.yml" >"$folder/prometheus.yml"
"$bin/cascade" serve "$config" --port "$server_port" &
server=$!
prometheus --config.file="$folder/prometheus.yml" --storage.tsdb.path="$folder/data" \
    --web.listen-address="127.0.0.1:$prometheus_port" 2>"$folder/prometheus.log" &
prometheus=$!

until "$bin/python" -c "import sys, urllib.request; urllib.request.urlopen('http://127.0.0.1:$server_port/ready')" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || exit 1
    sleep 1
done
kill -0 "$prometheus" 2>/dev/null || {
    tail -n 3 "$folder/prometheus.log" >&2
    exit 1
}
echo "Prometheus: http://127.0.0.1:$prometheus_port/graph?g0.expr=cascade%3Aspeedup%3Aratio_rate5m&g0.tab=0 - Ctrl-C ends everything" >&2
while kill -0 "$server" 2>/dev/null && kill -0 "$prometheus" 2>/dev/null; do
    "$bin/cascade" bench --url "http://127.0.0.1:$server_port" --concurrency 4 --max-tokens 64 >/dev/null &
    wait $!
done
