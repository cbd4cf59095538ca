#!/bin/sh
# The tests that need an NVIDIA GPU, then the bars of benchmarks/gpu.py, in pieces of less than ten minutes each. Needs no network.
#
#     benchmarks/gpu.sh [PIECE ...]      tests, passes, generate, lengths, text; none named: all, one after another
#
# PYTHON is the Python that has the packages (python3), OUT the folder of results (runs/gpu). A piece that fails does not stop the others; the
# exit code is that of the worst: 0 every bar is met, 1 one is missed or a test failed, 2 something could not be run. What is there of a piece
# that was cut off is in its file.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD"

bars() {
    name=$1
    shift
    set -- $(printf -- '--bar %s ' "$@")
    timeout 580 "$PYTHON" -m benchmarks.gpu "$@" --output "$OUT/gpu-$name.json"
}

piece() {
    case $1 in
    tests) timeout 580 "$PYTHON" -m pytest -q -m gpu -W default -p no:cacheprovider $(grep -rl --include='test_*.py' 'mark\.gpu' tests) ;;
    passes) bars passes decode-1 decode-64 verify-6 idle-32 prefill draft-step fused int8 fp8 recorded-1 ;;
    generate) bars generate agreement-0.8 generate generate-assisted agreement-0.7 agreement-0.6 ;;
    lengths) bars lengths adaptive-1 adaptive-8 adaptive-32 adaptive-128 recorded-drafts ;;
    text) bars text real-text ;;
    *) echo "There is no piece $1; there are tests, passes, generate, lengths and text." >&2 && return 2 ;;
    esac
}

mkdir -p "$OUT" || exit 2
worst=0
for name in ${*:-tests passes generate lengths text}; do
    echo "== $name" >&2
    piece "$name"
    code=$?
    [ "$code" -gt 2 ] && code=2
    [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
