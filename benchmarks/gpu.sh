#!/bin/bash
# For the day there is a GPU: ten checks, in the order in which they should be run. Each says what it
# expects; the first that fails ends the script, where its failure can be told by a program.
#
#   benchmarks/gpu.sh SHARDS [MODEL]        SHARDS: of `lightning shards voc`; MODEL: ViT-B-16 by default
#
# Check 9 needs nvJPEG and a compiler, check 10 two GPUs. From the repository's root, in its environment.
set -euo pipefail
shards=$1 model=${2:-ViT-B-16}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tasks=(Explainability Segmentation Recognition Interactive Analysis)
say() { printf '\n== %s\n   expected: %s\n' "$1" "$2"; }
run() { # TASK FOLDER [more words]; with run_as=exec in a process of its own, the shell becomes the command
    local task=$1 folder=$2
    shift 2
    ${run_as:-} lightning predict --model "$task" --data VOC --data.shards "$shards" \
        --model.backbone.model "$model" --writer.output "$work/$folder" \
        --trainer.enable_progress_bar false "$@"
}
gpu=(--trainer.accelerator gpu --trainer.devices 1 --data.batch_size 64)
same() { # FOLDER FOLDER: their shards and metrics, byte for byte
    local file
    for file in "$work/$1"/*.tar "$work/$1/metrics.json"; do cmp "$file" "$work/$2/${file##*/}"; done
}
metrics() {
    python - "$work/$1" <<'PY'
import sys
import tasks
print("  ", {k: round(v, 5) for k, v in tasks.Run.load(sys.argv[1]).metrics.items() if v is not None})
PY
}

say "1. CPU against GPU" \
    "32-true: the CPU's metrics within 0.0001; bf16-mixed and 16-mixed within 0.002; the -true ones within 0.01"
for task in "${tasks[@]}"; do
    run "$task" "cpu-$task" --trainer.accelerator cpu
    metrics "cpu-$task"
    for precision in 32-true bf16-mixed 16-mixed bf16-true 16-true; do
        run "$task" "$precision-$task" "${gpu[@]}" --trainer.precision "$precision"
        echo "   $task, $precision"
        metrics "$precision-$task"
    done
done

say "2. Waits of the host" \
    "two warnings a batch at most (benchmarks/operations.py), and a few at the start and for each shard"
for task in "${tasks[@]}"; do
    PYTHONWARNINGS=always PYTHONPATH=. run "$task" "sync-$task" "${gpu[@]}" \
        --trainer.callbacks '[{"class_path": "benchmarks._sync_warnings.SyncWarnings"}]' 2> "$work/sync"
    echo "   $task: $(grep -c 'called a synchronizing' "$work/sync" || true) waits"
done

say "3. Large batches" "256 images with 8 workers: ends with 0, no 'Too many open files', no 'ancdata'"
(ulimit -n 1024 && run Explainability large "${gpu[@]}" --data.batch_size 256 --data.num_workers 8)

say "4. Two runs" "byte for byte the same"
run Explainability once "${gpu[@]}" && run Explainability twice "${gpu[@]}"
same once twice

say "5. Two parts" "byte for byte the same as one"
run Explainability parts "${gpu[@]}" --data.part 0 --data.parts 2
run Explainability parts "${gpu[@]}" --data.part 1 --data.parts 2
lightning metrics "$work/parts" > /dev/null
same once parts

say "6. 200 decodes behind queued kernels" "no picture differs from the one that was decoded alone"
python - "$shards" <<'PY'
import glob, io, sys, tarfile
import torch
from datamodules._device_decode import _decode

device = torch.device("cuda")
tar = tarfile.open(sorted(glob.glob(f"{sys.argv[1]}/*.tar"))[0])
files = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")][:16]
alone = [_decode([file], device, 1 << 28)[0].cpu() for file in files]
busy = torch.randn(8192, 8192, device=device)
for turn in range(200):
    for _ in range(8):
        busy = (busy @ busy).clamp(-1, 1)
    trash = [torch.full((1 << 22,), turn % 256, dtype=torch.uint8, device=device) for _ in range(16)]
    del trash
    for one, other in zip(alone, _decode(files, device, 1 << 28), strict=True):
        assert torch.equal(one, other.cpu()), f"turn {turn}: a picture was damaged"
PY

say "7. Little memory" "halved at least once ('encoding them in halves'), no errors listed, metrics of check 1"
python - "$shards" "$model" "$work/little" <<'PY'
import sys
import torch
from tasks import predict

torch.cuda.set_per_process_memory_fraction(0.05)
shards, model, output = sys.argv[1:]
run = predict({"model": "Explainability", "data": "VOC"}, data={"shards": shards, "batch_size": 1024},
              writer={"output": output}, trainer={"accelerator": "gpu", "devices": 1},
              **{"model.backbone.model": model})
assert not run.errors, run.errors[:3]
print("  ", run.metrics)
PY

say "8. Encoding" "surgery at most 1.1 of plain CLIP's time in bf16; the share of the peak is printed"
python benchmarks/encode.py --accelerator gpu --output "$work/encode.json" || true
say "8. The released code" "the goals of benchmarks/README.md, if its clone is at \$REFERENCE"
if [ -n "${REFERENCE:-}" ]; then
    python benchmarks/released.py --accelerator gpu --reference "$REFERENCE" || true
fi

say "9. The pipeline" "85 % of the model's own rate; with torchcodec, and with compile, no less"
for fields in "" "data.decoder=torchcodec" "model.backbone.compile=true" \
    "data.decoder=torchcodec model.backbone.compile=true"; do
    echo "   with: ${fields:-pillow, not compiled}"
    # shellcheck disable=SC2086
    python benchmarks/pipeline.py --accelerator gpu --precision bf16-mixed --workers 16 \
        ${fields:+--fields $fields} || true
done

say "10. Two GPUs, the last shard ten times as large; a stop while the other waits" \
    "143 within two minutes, nothing left running; started again it goes on, to check 4's bytes"
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -ge 2 ]; then
    echo "   ranks take shards as they become free: make the last one ten times as large, with"
    echo "   --data.shards '[small, small, small, large]'; a process group's timeout is 60 s here:"
    two=(--trainer.accelerator gpu --trainer.devices 2 --data.batch_size 64
        --trainer.strategy.class_path lightning.pytorch.strategies.DDPStrategy
        --trainer.strategy.init_args.timeout "0:01:00")
    run_as=exec run Explainability two "${two[@]}" & # else the signal would reach a shell
    pid=$!
    sleep "${STOP_AFTER:-90}"
    code=0
    kill -TERM "$pid" && wait "$pid" || code=$?
    echo "   exit code $code"
    run Explainability two "${two[@]}"
    same once two
else
    echo "   left out: there are not two"
fi
