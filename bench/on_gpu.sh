#!/usr/bin/env bash
# All that a GPU is asked, in one command: python needs this folder's requirements and PyTorch 2.11 or later, no network.
#
#     bash bench/on_gpu.sh                              about half an hour on one GPU; results/gpu/
#     bash bench/on_gpu.sh --device cpu --quick         does the command itself run?
#
# 1. float32 against the CPU (losses, training steps, generation, head), bfloat16, graph breaks, waits: gpu_check.py
# 2. MFU of the training step of a GPT-2-sized model, dense, with our experts and with those of transformers, eager and
#    compiled
# 3. ERL's step against the LM step at ERL's own batch of 4 sequences, and the memory of both
# 4. rollouts beside transformers' GPT-2
# 5. ERPO and RAIS at ERPO's scale
# Every part runs, whatever the others do; the status is 1 if one failed.
set -u
cd "$(dirname "$0")/.."
device=cuda model=gpt2 out=results/gpu quick=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --quick) quick=(--quick); model=tiny; shift ;;
        *) echo "on_gpu.sh: unknown argument $1: see the head of this file" >&2; exit 2 ;;
    esac
done
if [ "$device" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "on_gpu.sh: this machine has no CUDA device that PyTorch can use: add --device cpu --quick to try the command" >&2
    exit 2
fi
export HF_HUB_OFFLINE=1
failed=0
part() {
    echo "== $*"
    "$@" || { failed=1; echo "== failed: $*"; }
}
bench() {
    part python bench/bench.py "$1" --device "$device" --out "$out/$2" "${@:3}" ${quick[@]+"${quick[@]}"}
}
mkdir -p "$out"
part python bench/gpu_check.py --device "$device"
bench step eager --model "$model" --batch-size 8
bench step compiled --model "$model" --batch-size 8 --compile
bench erl batch4 --model "$model" --batch-size 4
bench erl batch4-compiled --model "$model" --batch-size 4 --compile
bench rollout tiny --model tiny
bench rollout gpt2 --model "$model"
bench loss losses
exit $failed
