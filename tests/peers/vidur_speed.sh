#!/usr/bin/env bash
# Vidur beside the simulator on the same requests, and a record of both.
# usage: vidur_speed.sh CHECKOUT [ENVIRONMENT] [options of vidur_speed.py]
# CHECKOUT: a checkout of microsoft/vidur. ENVIRONMENT: folder for its packages, made when it is not there; default: beside the checkout.
# Runs Vidur from its sources as they are; PYTHON (default: python) is the interpreter that has modeltc_lab.
set -euo pipefail
[ $# -ge 1 ] && [ -f "$1/vidur/main.py" ] || { echo "usage: vidur_speed.sh CHECKOUT [ENVIRONMENT] [options]: CHECKOUT must hold vidur/main.py" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$1" && pwd); shift
environment="$checkout-env"
if [ $# -ge 1 ] && [ "${1#--}" = "$1" ]; then environment=$1; shift; fi
if [ ! -x "$environment/bin/python" ]; then
    "${PYTHON:-python}" -m venv "$environment"
    # pandas 3 reads text columns in a new type that this version of Vidur has not seen
    "$environment/bin/pip" install --quiet --disable-pip-version-check numpy 'pandas<3' scikit-learn wandb ddsketch plotly_express kaleido matplotlib seaborn fasteners
fi
exec "${PYTHON:-python}" "$here/vidur_speed.py" "$checkout" "$environment/bin/python" "$@"
