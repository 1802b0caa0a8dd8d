#!/usr/bin/env bash
# Everything that needs a CUDA GPU, measured within ten minutes: the tests marked `gpu`, then parity and latency
# of the GPU profiles beside torch.compile in float16. Prints Markdown; the logs stay in a folder.
#
#   benchmarks/gpu.sh [FOLDER]       FOLDER: for packages and logs; default: a temporary one
#   MODELS="resnet50 vit_b_16" PROFILES="cuda-fp16 cuda-bf16 tensorrt-fp16" PYTHON=python LIMIT=600 benchmarks/gpu.sh
#
# Exit code 0: all was measured. 1: something failed, or could not run; the line says what and why.
set -u
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python}
MODELS=${MODELS:-"resnet50 vit_b_16"}
PROFILES=${PROFILES:-"cuda-fp16 cuda-bf16 tensorrt-fp16"}
BATCHES=${BATCHES:-1,32}
LIMIT=${LIMIT:-600}
FOLDER=${1:-$(mktemp -d)}
mkdir -p "$FOLDER"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
missing=0

# step NAME SECONDS LOG COMMAND...: run within SECONDS and what is left of LIMIT; a failure is a line in the report.
step() {
  local name=$1 seconds=$2 log=$3 left code
  shift 3
  left=$((LIMIT - SECONDS))
  if [ "$left" -le 5 ]; then
    miss "$name" "the $LIMIT seconds are used up"
    return 1
  fi
  [ "$seconds" -lt "$left" ] || seconds=$left
  timeout --kill-after=10 "$seconds" "$@" >"$log" 2>&1
  code=$?
  [ "$code" -eq 0 ] && return 0
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    miss "$name" "not done within $seconds s (log: $log)"
  else
    miss "$name" "exit code $code: $(reason "$log") (log: $log)"
  fi
  return 1
}

miss() {
  printf -- '- **not measured**: %s: %s\n' "$1" "$2"
  missing=1
}

# The last line of a log that says something, on one line and not too long.
reason() {
  grep -E 'error|Error|failed|FAIL|fault' "$1" | tail -n 1 | cut -c 1-300 | grep . || tail -n 1 "$1" | cut -c 1-300
}

# works PROVIDER: empty where ONNX Runtime runs on it, else why not.
works() {
  "$PYTHON" - "$1" 2>&1 <<'PYTHON_END' | tail -n 1 | cut -c 1-300
import sys
from tldist.errors import TldistError
from tldist.runtime.session import require_provider
try:
    require_provider(sys.argv[1])
except TldistError as error:
    print(" ".join(str(error).split()))
PYTHON_END
}

no_gpu() {
  command -v "$PYTHON" >/dev/null || { echo "no '$PYTHON' here (set PYTHON=)"; return; }
  command -v timeout >/dev/null || { echo "no 'timeout' command here (coreutils)"; return; }
  "$PYTHON" -c 'import torch' 2>/dev/null || { echo "PyTorch is not installed: pip install 'tldist[train]'"; return; }
  "$PYTHON" - <<'PYTHON_END' 2>/dev/null
import torch
if not torch.cuda.is_available():
    built = torch.version.cuda or "no CUDA"
    print(f"PyTorch {torch.__version__} (built for {built}) finds no CUDA GPU on this machine")
PYTHON_END
}

echo "# GPU figures"
echo
echo "Made by \`benchmarks/gpu.sh\` on $(date -u +%Y-%m-%d)."
why=$(no_gpu)
if [ -n "$why" ]; then
  echo
  miss "the machine" "$why"
  miss "tests marked gpu" "$why"
  for model in $MODELS; do
    for profile in $PROFILES; do
      miss "$model, $profile: parity and latency against torch.compile" "$why"
    done
  done
  exit 1
fi

echo
"$PYTHON" - <<'PYTHON_END'
import onnxruntime, torch
card = torch.cuda.get_device_properties(0)
print(f"- {card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}")
print(f"- torch {torch.__version__}, CUDA {torch.version.cuda}, ONNX Runtime {onnxruntime.__version__}")
PYTHON_END
cuda=$(works CUDAExecutionProvider)
tensorrt=$(works TensorrtExecutionProvider)
echo "- CUDAExecutionProvider: ${cuda:-works}"
echo "- TensorrtExecutionProvider: ${tensorrt:-works}"

echo
echo "## Tests marked gpu"
echo
if step "tests marked gpu" 150 "$FOLDER/tests.log" "$PYTHON" -m pytest -m gpu -rs tests/runtime/test_gpu.py; then
  echo "- $(tail -n 1 "$FOLDER/tests.log")"
  grep '^SKIPPED' "$FOLDER/tests.log" | sed 's/^/- /'
fi

echo
echo "## Parity and latency"
echo
echo "Median and p99 in milliseconds, images in and outputs back on the host; variants take turns."
echo
rows="$FOLDER/rows.md"
: >"$rows"
for model in $MODELS; do
  bundle="$FOLDER/$model"
  step "$model: bundle" 90 "$FOLDER/$model.log" "$PYTHON" benchmarks/gpu_models.py bundle "$model" "$bundle" || continue
  echo "- $(tail -n 1 "$FOLDER/$model.log")"
  # torch.compile takes most of the time, and is the same for every profile.
  variants=channels_last,fp16_weights+channels_last,compile+fp16_weights+channels_last
  for profile in $PROFILES; do
    name="$model, $profile"
    case $profile in tensorrt*) why=$tensorrt ;; *) why=$cuda ;; esac
    if [ -n "$why" ]; then
      miss "$name" "$why"
      continue
    fi
    log="$FOLDER/$model-$profile"
    step "$name: export and parity" 120 "$log.export.log" \
      "$PYTHON" -m tldist export "$bundle" "profile=$profile" "out=$log" --json || continue
    step "$name: latency" 180 "$log.bench.log" \
      "$PYTHON" -m tldist bench "$log" "bundle=$bundle" "batches=$BATCHES" seconds=1 "variants=$variants" --json || continue
    "$PYTHON" benchmarks/gpu_models.py rows "$model" "$profile" "$log.export.log" "$log.bench.log" >>"$rows"
    variants=fp16_weights+channels_last
  done
done
echo
echo "| model | profile | batch | variant | median ms | p99 ms | images/s | times eager | parity |"
echo "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
cat "$rows"
echo
echo "$SECONDS seconds in all; logs in $FOLDER."
exit "$missing"
