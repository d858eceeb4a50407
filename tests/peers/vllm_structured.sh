#!/usr/bin/env bash
# Our backend of structured outputs in vLLM's real manager and scheduler, on any machine: the environment of vllm_scheduler.sh, and check_vllm_structured.py in it. Exit code 0 when every check passes.
#
#   tests/peers/vllm_structured.sh [FOLDER] [--quick]
#
# Writes the record decoding/vllm_backend, unless --quick is given.
set -euo pipefail
MODELTC_CHECK=check_vllm_structured.py exec bash "$(dirname "${BASH_SOURCE[0]}")/vllm_scheduler.sh" "$@"
