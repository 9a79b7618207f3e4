#!/usr/bin/env bash
# A real Triton server to compare with: the binary inside NVIDIA's nvidia-pytriton wheel from PyPI. CPU only, loopback only.
#   bench/peer_triton.sh install [FOLDER]              default folder: .cache/peer_triton, with a virtual environment of its own
#   bench/peer_triton.sh serve FOLDER REPOSITORY HTTP_PORT METRICS_PORT [tritonserver flags...]
# The wheel holds the Python backend only, so an ONNX model is served by a model.py that calls ONNX Runtime
# (bench/triton_python_model.py); NVIDIA's container has a C++ backend, which is faster: see bench/README.md.
set -euo pipefail

package_of() { "$1/venv/bin/python" -c 'import os, pytriton; print(os.path.dirname(pytriton.__file__))'; }

case "${1:-}" in
install)
  folder=$(realpath -m "${2:-.cache/peer_triton}")
  "${PYTHON:-python3}" -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet nvidia-pytriton==0.7.0 onnxruntime
  package=$(package_of "$folder")
  minor=$("$folder/venv/bin/python" -c 'import sys; print(f"3.{sys.version_info[1]}")')
  mkdir -p "$folder/backends"
  cp -r "$package/tritonserver/backends/python" "$folder/backends/"
  # One stub for each Python: the one that the virtual environment has.
  cp "$package/tritonserver/python_backend_stubs/$minor/triton_python_backend_stub" "$folder/backends/python/"
  chmod +x "$package/tritonserver/bin/tritonserver" "$folder/backends/python/triton_python_backend_stub"
  echo "$folder"
  ;;
serve)
  folder=$(realpath "$2") repository=$3 http_port=$4 metrics_port=$5
  shift 5
  package=$(package_of "$folder")
  LD_LIBRARY_PATH="$(dirname "$package")/nvidia_pytriton.libs"
  PATH="$folder/venv/bin:$PATH"
  export LD_LIBRARY_PATH PATH OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
  exec "$package/tritonserver/bin/tritonserver" --model-repository="$repository" --backend-directory="$folder/backends" \
    --http-address=127.0.0.1 --http-port="$http_port" --allow-grpc=false \
    --metrics-address=127.0.0.1 --metrics-port="$metrics_port" "$@"
  ;;
*)
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 2
  ;;
esac
