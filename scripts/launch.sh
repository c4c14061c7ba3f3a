# Sourced by examples/*.sh: turns the caller's environment into one `accelerate launch` (or torchrun) line and runs it.
#
#   CONFIG             a YAML file, looked up in the caller's directory, then in the repository
#   NUM_PROCESSES      processes on all machines together (default 1)
#   NUM_MACHINES MACHINE_RANK MASTER_ADDR MASTER_PORT    start the same script once on each machine
#   ACCELERATE_CONFIG  a name in configs/accelerate/ (ddp, zero1, zero3, fsdp2, ...) or a path
#   DRY_RUN=1          print the line instead of running it
#
# The run's working directory is the repository root: relative paths in configs and in key=value arguments start there.

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

is_dry_run() { [[ ${DRY_RUN:-0} != 0 ]]; }

has_cuda() {
    [[ ${CUDA_VISIBLE_DEVICES-all} != "" && ${CUDA_VISIBLE_DEVICES-all} != -1 ]] || return 1
    nvidia-smi -L >/dev/null 2>&1 || compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/kfd ]]
}

# A path the caller may have meant from its own directory -> absolute; anything else (a hub id, a name) unchanged.
absolute_if_here() {
    case $1 in
    /*) printf '%s' "$1" ;;
    *) if [[ -e $1 ]]; then printf '%s' "$PWD/$1"; else printf '%s' "$1"; fi ;;
    esac
}

choose_config() { # ROLE -> CONFIG, an absolute path
    CONFIG=$(absolute_if_here "${CONFIG:-$ROOT/configs/tiny/$1.yaml}")
    [[ $CONFIG == /* ]] || CONFIG=$ROOT/$CONFIG
    [[ -f $CONFIG ]] || die "CONFIG=$CONFIG: no such file; give a path from here or from $ROOT"
}

is_embedded_default() { [[ $CONFIG == "$ROOT"/configs/tiny/* ]] && ! is_dry_run; }

# An environment made by scripts/test.sh or the quickstart, else the one on PATH, else a new one.
use_environment() {
    is_dry_run && return
    if [[ -z ${NO_VENV:-} && -x $ROOT/.venv/bin/accelerate ]]; then
        PATH="$ROOT/.venv/bin:$PATH"
    elif ! command -v accelerate >/dev/null; then
        [[ -z ${NO_VENV:-} ]] || die "NO_VENV is set but accelerate is not on PATH: pip install -e '$ROOT'"
        install_dirl
    fi
}

# The tiny configs start from a model that the embedded default makes for itself.
make_tiny_base() {
    [[ -e $ROOT/outputs/tiny/base ]] && return
    mkdir -p "$ROOT/outputs/tiny"
    (
        cd "$ROOT"
        rm -rf outputs/tiny/base.tmp
        python3 -m dirl.cli tiny-model outputs/tiny/base.tmp
        mv outputs/tiny/base.tmp outputs/tiny/base
    )
}

make_tiny_sft() {
    [[ -e $ROOT/outputs/tiny/sft/final ]] && return
    echo "outputs/tiny/sft/final is missing: running examples/sft.sh first"
    env -u CONFIG bash "$ROOT/examples/sft.sh"
}

# Whoever names a model needs no embedded default.
names_model() { # key=value ...
    local argument
    for argument in "$@"; do [[ $argument != model.path=* ]] || return 0; done
    return 1
}

check_number() { # NAME VALUE MINIMUM
    [[ $2 =~ ^[0-9]+$ ]] && (($2 >= $3)) || die "$1=$2: must be a whole number, at least $3"
}

check_topology() {
    check_number NUM_PROCESSES "${NUM_PROCESSES:-1}" 1
    check_number NUM_MACHINES "${NUM_MACHINES:-1}" 1
    check_number MACHINE_RANK "${MACHINE_RANK:-0}" 0
    ((${NUM_MACHINES:-1} > 1)) || return 0
    ((${MACHINE_RANK:-0} < NUM_MACHINES)) || die "MACHINE_RANK=$MACHINE_RANK: must be below NUM_MACHINES=$NUM_MACHINES"
    [[ -n ${MASTER_ADDR:-} ]] || die "NUM_MACHINES=$NUM_MACHINES needs MASTER_ADDR, the address of machine 0"
    [[ -n ${ACCELERATE_CONFIG:-} && -z ${NUM_PROCESSES:-} ]] || ((${NUM_PROCESSES:-1} % NUM_MACHINES == 0)) ||
        die "NUM_PROCESSES=${NUM_PROCESSES:-1}: counts the processes of all machines, so a multiple of NUM_MACHINES=$NUM_MACHINES"
}

# `accelerate launch --cpu --num_processes 2` and MULTI_CPU configs silently run ONE process; torchrun with this flag runs all.
launch_on_cpus() { # PROCESSES
    local machines=${NUM_MACHINES:-1}
    LAUNCHER=(env ACCELERATE_USE_CPU=true torchrun --nproc_per_node $(($1 / machines)))
    if ((machines > 1)); then
        LAUNCHER+=(--nnodes "$machines" --node_rank "${MACHINE_RANK:-0}" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    elif [[ -n ${MASTER_PORT:-} ]]; then
        LAUNCHER+=(--master_addr 127.0.0.1 --master_port "$MASTER_PORT")
    else
        LAUNCHER+=(--standalone)
    fi
}

launch_on_gpus() { # PROCESSES
    LAUNCHER=(accelerate launch --multi_gpu --num_processes "$1" --num_machines "${NUM_MACHINES:-1}" --mixed_precision no --dynamo_backend no)
    # Port 0: a free one, so that two runs can share a machine.
    LAUNCHER+=(--main_process_port "${MASTER_PORT:-$((${NUM_MACHINES:-1} > 1 ? 29500 : 0))}")
    ((${NUM_MACHINES:-1} == 1)) || LAUNCHER+=(--machine_rank "${MACHINE_RANK:-0}" --main_process_ip "$MASTER_ADDR")
}

# No launcher, which would leave the trainer behind when it is interrupted, and end an error of one line in its traceback.
launch_single() {
    LAUNCHER=(env ACCELERATE_MIXED_PRECISION=no ACCELERATE_DYNAMO_BACKEND=NO)
    has_cuda || LAUNCHER+=(ACCELERATE_USE_CPU=true)
    LAUNCHER+=(python3)
}

yaml_field() { sed -n "s/^$2:[[:space:]]*[\"']\{0,1\}\([A-Za-z0-9_]*\).*/\1/p" "$1"; } # FILE NAME

find_accelerate_config() {
    local named=$ROOT/configs/accelerate/$ACCELERATE_CONFIG.yaml names
    if [[ -f $named ]]; then
        printf '%s' "$named"
    elif [[ -f $ACCELERATE_CONFIG ]]; then
        absolute_if_here "$ACCELERATE_CONFIG"
    else
        names=$(cd "$ROOT/configs/accelerate" && printf '%s ' *.yaml)
        die "ACCELERATE_CONFIG=$ACCELERATE_CONFIG: neither a file nor one of: ${names//.yaml/}"
    fi
}

launch_from_file() { # FILE
    local file=$1 type
    type=$(yaml_field "$file" distributed_type)
    if [[ $type == MULTI_CPU ]] || { [[ $type == MULTI_GPU ]] && ! has_cuda; }; then
        local processes=${NUM_PROCESSES:-$(yaml_field "$file" num_processes)}
        launch_on_cpus "${processes:-1}"
        return
    fi
    LAUNCHER=(accelerate launch --config_file "$file")
    [[ -z ${NUM_PROCESSES:-} ]] || LAUNCHER+=(--num_processes "$NUM_PROCESSES")
    [[ -z ${NUM_MACHINES:-} ]] || LAUNCHER+=(--num_machines "$NUM_MACHINES")
    [[ -z ${MACHINE_RANK:-} ]] || LAUNCHER+=(--machine_rank "$MACHINE_RANK")
    [[ -z ${MASTER_ADDR:-} ]] || LAUNCHER+=(--main_process_ip "$MASTER_ADDR")
    # The files say 0, a free port; several machines must agree on one.
    ((${NUM_MACHINES:-1} == 1)) || local MASTER_PORT=${MASTER_PORT:-29500}
    [[ -z ${MASTER_PORT:-} ]] || LAUNCHER+=(--main_process_port "$MASTER_PORT")
    # This script is started on every machine; DeepSpeed's own default would ssh to them from machine 0.
    [[ $type != DEEPSPEED ]] || ((${NUM_MACHINES:-1} == 1)) || LAUNCHER+=(--deepspeed_multinode_launcher standard)
}

choose_launcher() { # -> LAUNCHER
    local file
    check_topology
    if [[ -n ${ACCELERATE_CONFIG:-} ]]; then
        file=$(find_accelerate_config)
        launch_from_file "$file"
    elif ((${NUM_PROCESSES:-1} == 1)); then
        launch_single
    elif has_cuda; then
        launch_on_gpus "$NUM_PROCESSES"
    else
        launch_on_cpus "$NUM_PROCESSES"
    fi
}

# Both launchers otherwise give each process one thread.
share_cores() {
    local cores processes=$((${NUM_PROCESSES:-1} / ${NUM_MACHINES:-1}))
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
}

launch() { # -m dirl.cli ROLE CONFIG key=value ...
    local line
    choose_launcher
    if is_dry_run; then
        printf -v line '%q ' "${LAUNCHER[@]}" "$@"
        echo "${line% }"
        return
    fi
    share_cores
    cd "$ROOT"
    # Schedulers send SIGUSR1 to every process: the launcher lives on while the ranks write their checkpoint.
    trap '' USR1
    [[ ${LAUNCHER[${#LAUNCHER[@]} - 1]} != python3 ]] || exec "${LAUNCHER[@]}" "$@"
    launch_ranks "$@"
}

# A launcher that is told to stop gives its ranks 30 s and ends in a traceback. So the ranks are told, as often and as long
# as they need for their checkpoint, and the launcher waits for them. A second Ctrl-C ends them at once.
launch_ranks() { # -m dirl.cli ROLE CONFIG key=value ...
    local launcher code is_signalled first=TERM
    (
        trap '' TERM INT
        export PET_SIGNALS_TO_HANDLE=SIGQUIT
        exec "${LAUNCHER[@]}" "$@"
    ) &
    launcher=$!
    trap 'is_signalled=1; signal_children TERM "$launcher"' TERM
    trap 'is_signalled=1; signal_children "$first" "$launcher"; first=KILL' INT
    while true; do
        is_signalled=0 code=0
        wait "$launcher" || code=$?
        ((is_signalled)) || break
    done
    [[ $first == TERM ]] || code=130
    exit "$code"
}

signal_children() { # SIGNAL PID
    local children
    children=$(cat /proc/"$2"/task/*/children 2>/dev/null || pgrep -P "$2" || true)
    if [[ -n $children ]]; then
        # shellcheck disable=SC2086 # several numbers
        kill -"$1" $children 2>/dev/null || true
    else
        kill -KILL "$2" 2>/dev/null || true # it has not begun
    fi
}
