#!/usr/bin/env bash
# vLLM's real scheduler under our policies, on any machine: makes an environment and runs check_vllm.py in it. Exit code 0 when every check passes.
#
#   tests/peers/vllm_scheduler.sh [FOLDER] [--quick]
#
# FOLDER (default: .venv-vllm in the checkout) keeps the environment; a second run uses it again. It stands on the packages of the Python that has modeltc_lab
# (PYTHON, default .venv/bin/python), torch above all. vLLM itself comes without its dependencies, a third of a gigabyte from the package registry; of those only
# what its scheduler imports is installed, in the versions vLLM asks for. No CUDA, no GPU, no model weights. MODELTC_VLLM says which vLLM, as pip spells it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$root/.venv-vllm
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then folder=$1; shift; fi
base=${PYTHON:-$root/.venv/bin/python}
vllm=${MODELTC_VLLM:-vllm==0.33.0}
"$base" -c 'import modeltc_lab.serving.policies' || { echo "PYTHON=$base: need a Python with modeltc_lab installed; run make test first, or set PYTHON" >&2; exit 1; }

python=$folder/bin/python
if [ ! -x "$python" ]; then "$base" -m venv "$folder"; fi
"$base" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
pip=("$python" -m pip install --quiet --disable-pip-version-check)
"$python" -c 'import importlib.metadata as m; m.version("vllm")' 2> /dev/null || "${pip[@]}" --no-deps "$vllm"

# What vLLM's scheduler, configuration and request modules import, with vLLM's own bounds.
"$python" - << 'PY' > "$folder/needs.txt"
import re
from importlib.metadata import requires
NEEDED = """aiohttp apache-tvm-ffi blake3 cachetools cbor2 cloudpickle einops fastapi ijson llguidance msgspec openai oss-harmony partial-json-parser pillow prometheus-client psutil
            py-cpuinfo pybase64 pyyaml pyzmq regex requests setproctitle starlette tokenizers transformers xgrammar""".split()
for line in requires("vllm"):
    spec, _, marker = line.partition(";")
    name = re.match(r"[\w.-]+", spec)[0].replace("_", "-").lower()
    if name in NEEDED and "extra" not in marker and "s390x" not in marker.partition("==")[2].partition("or")[0]: print(re.sub(r"\[.*?\]", "", spec).strip())
print("huggingface-hub<2\nuvloop\nsniffio")
PY
echo "what pip now calls missing or incompatible is what vLLM needs for everything else"
"${pip[@]}" -r "$folder/needs.txt"

export OMP_NUM_THREADS=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/tests/peers/${MODELTC_CHECK:-check_vllm.py}" "$@"
