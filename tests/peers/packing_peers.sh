#!/usr/bin/env bash
# Every packer of modeltc_lab.compare.balance on the same lengths in one run: TRL, LLaMA-Factory, torchtune, prtpy, binpacking, plain Python and this package. Writes the record balance/packing_peers.
#
#   tests/peers/packing_peers.sh [FOLDER] [--full] [options of `modeltc-lab run`]
#
# FOLDER: an environment for the peers, made when it is not there (default: .venv-packing in the checkout). It sees the packages of PYTHON (default: .venv/bin/python of the checkout, with modeltc_lab[peers]) and adds the peers
# without their dependencies, which ask for other versions of torch and transformers than this project has; what their packing code imports is added by name.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$root/.venv-packing
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then folder=$1; shift; fi
base=${PYTHON:-$root/.venv/bin/python}
"$base" -c 'import modeltc_lab.balance.packing, trl, datasets' || { echo "PYTHON=$base: need a Python with modeltc_lab[peers] installed; run make test first, or set PYTHON" >&2; exit 1; }

python=$folder/bin/python
if [ ! -x "$python" ]; then "$base" -m venv "$folder"; fi
purelib='import sysconfig; print(sysconfig.get_paths()["purelib"])'
"$base" -c "$purelib" > "$("$python" -c "$purelib")/base.pth"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps llamafactory==0.9.5 torchtune==0.6.1 torchao==0.14.1 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 sentencepiece tiktoken prtpy==0.8.3 mip binpacking==2.0.1

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m modeltc_lab run balance/packing_peers "$@"
