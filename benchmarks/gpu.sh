#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests first, then every benchmark.
#
#     benchmarks/gpu.sh [OUT] [PART ...]
#
# On a machine with an NVIDIA GPU and torch >= 2.10 in the environment that is active (PYTHON chooses
# another). Each part takes less than ten minutes and is left out once it is done, so that a run cut
# short goes on with the same command; a part that fails is said at the end, and tried again by the
# next run. Everything goes into OUT (default gpu_output): a log and the figures of each part, and
# gpu.json with all of them. Nothing is timed where the tests of the kernels fail.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_output}
shift || true
python=${PYTHON:-python}
mkdir -p "$out"
failed=()

"$python" - <<'EOF' || exit 1
import torch
assert torch.cuda.is_available(), "no CUDA device"
assert torch.cuda.get_device_capability() >= (8, 0), "expected Ampere or newer"
EOF
# Whatever else is installed, this torch stays. Without a network: what is there has to do.
"$python" -c 'import torch; print(f"torch=={torch.__version__}")' >"$out/constraints.txt"
"$python" -m pip install --quiet -c "$out/constraints.txt" -e '.[bench,test,plot]' ||
    "$python" -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1

# part NAME COMMAND...: once, for at most ten minutes.
part() {
    local name=$1
    shift
    if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return 0; fi
    if [ -e "$out/$name.done" ]; then return 0; fi
    echo "== $name: $*"
    if timeout 600 "$@" >"$out/$name.log" 2>&1; then
        touch "$out/$name.done"
    else
        failed+=("$name")
        tail -n 5 "$out/$name.log"
        return 1
    fi
}
wanted=("$@")
pytest=("$python" -m pytest -q -m "slow or not slow")
bench=("$python" -m atlas_blocks.recipes bench)
long=("$python" benchmarks/long_context.py)

sound=true
part test-recurrence "${pytest[@]}" tests/kernels/test_recurrence.py || sound=false
part test-kernels "${pytest[@]}" tests/kernels --ignore tests/kernels/test_recurrence.py || sound=false
part test-attention "${pytest[@]}" tests/functional/test_attention.py tests/blocks/test_attention.py
part test-compile "${pytest[@]}" tests/compile_passes tests/ops

if $sound; then
    part kernels-quick "${bench[@]}" kernels --quick --out "$out/kernels-quick"
    for width in 64 128; do
        part "kernels-$width" "${bench[@]}" kernels --dims "$width" --out "$out/kernels-$width"
    done
    for recipe in atlas-tiny omeganet-tiny atlas-mag-170m; do
        part "model-$recipe" "${bench[@]}" "$recipe" --device cuda --out "$out/model-$recipe"
    done
    for recipe in atlas-mag-tiny atlas-mag-170m; do
        part "stream-$recipe" "${long[@]}" stream "$recipe" --json "$out/stream-$recipe.json"
        part "decode-$recipe" "${long[@]}" decode "$recipe" --json "$out/decode-$recipe.json"
    done
    for memory in matrix mlp; do
        part "train-$memory" "${long[@]}" train --compile --memory "memory=$memory" update=gd \
            --json "$out/train-$memory.json"
    done
else
    echo "the kernels' tests fail: nothing is timed"
fi

"$python" - "$out" <<'EOF'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
parts = {str(f.relative_to(out).with_suffix("")): json.loads(f.read_text())
         for f in sorted(out.rglob("*.json")) if f.name != "gpu.json"}
done = sorted(f.stem for f in out.glob("*.done"))
(out / "gpu.json").write_text(json.dumps({"done": done, "parts": parts}, indent=2) + "\n")
EOF
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
