# Sourced by the scripts in the folders beside it; POSIX sh, runs nothing by itself.
#
# GPUS      processes on each node; unset: as many as CUDA_VISIBLE_DEVICES names (none: one on the CPU), else as many as SLURM gave
#           this node, else as many as nvidia-smi lists, else one on the CPU
# NAME      the folder under checkpoints/ of a run; unset: what the script says
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT
#           seconds that ranks have to finish a step and to save when a signal comes; unset: 110, of the 120 that the scripts ask
#           SLURM for. torch 2.13 knows it; a torchrun that does not always gives 30
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#           several nodes, the same command on each; under SLURM (sbatch --nodes=N) all of it is found
set -eu
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
# torchrun's --signals-to-handle, which one of torch 2.8 does not have, and as a variable does not mind.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"

gpus() {
    if [ -n "${GPUS:-}" ]; then
        echo "$GPUS"
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        case $CUDA_VISIBLE_DEVICES in
        '' | -1* | NoDevFiles) echo 1 ;; # the last is how SLURM says none
        *) echo "$CUDA_VISIBLE_DEVICES" | tr , '\n' | wc -l ;;
        esac
    elif [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        echo "${SLURM_GPUS_ON_NODE##*:}" # 8, or gpu:a100:8
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus | wc -l
    else
        echo 1
    fi
}

# launch PROGRAM ARGUMENT...: on all GPUs of all nodes.
launch() {
    case " $* " in
    *" --cfg "*) exec python "$@" ;; # to be shown once
    esac
    set -- --nproc-per-node "$(gpus)" "$@"
    if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
        head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        port=$((20000 + SLURM_JOB_ID % 20000))
        # What dies on one node ends on all: the others would wait for it.
        exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --rdzv-id "$SLURM_JOB_ID" \
            --rdzv-backend c10d --rdzv-endpoint "$head:$port" "$@"
    elif [ "${NNODES:-1}" -gt 1 ]; then
        exec torchrun --nnodes "$NNODES" --node-rank "${NODE_RANK:?rank of this node, from 0}" \
            --master-addr "${MASTER_ADDR:?address of node 0}" --master-port "${MASTER_PORT:-29500}" "$@"
    else
        # A port that is free is found by torchrun itself.
        exec torchrun --standalone "$@"
    fi
}

# train EXPERIMENT STAGE NAME OVERRIDE...: each stage starts from the folder of the one before; started again, it goes on.
train() {
    experiment=$1 stage=$2 runs=checkpoints/${NAME:-$3}
    shift 3
    case $stage in
    pretrain) set -- "output=$runs/pretrain" "$@" ;;
    mqa) set -- "checkpoint=$runs/pretrain" "output=$runs/iftpwc" "$@" ;;
    1qa) set -- "checkpoint=$runs/iftpwc" "output=$runs/train" "$@" ;;
    esac
    launch train.py "experiment=$experiment" "stage=$stage" resume=auto "$@"
}

# evaluate PROGRAM EXPERIMENT FOLDER NAME OVERRIDE...: the checkpoint in one stage's folder, on one GPU.
evaluate() {
    program=$1 experiment=$2 runs=checkpoints/${NAME:-$4} folder=$3
    shift 4
    exec python "$program" "experiment=$experiment" "checkpoint=$runs/$folder" "output=$runs/$folder/${program%.py}" "$@"
}
