#!/usr/bin/env bash
# GCC 12: `#pragma GCC unroll N` takes a constexpr variable, but neither a macro nor a template parameter.
#
# One would guess the opposite of a pragma: that it sees what the preprocessor makes of its line, as `#pragma omp` does, so that -DN=4 sets the factor; and
# that in C++, where it takes any constant expression of the program's own, a template parameter is one. GCC hands the line to the parser with its macros
# unexpanded: N "was not declared in this scope", even in a file that is preprocessed first. A template parameter "requires an assignment-expression
# that evaluates to a non-negative integral constant". A constexpr variable of the same value is taken, and so is _Pragma("GCC unroll 4") out of a macro.
#
# Seen: gcc 12.2.0-14+deb12u1, C++; in C the macro is refused alike. Needs Debian 12 (apt-get download, dpkg), x86-64, 120 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
version=12.2.0-14+deb12u1
apt-get -o APT::Sandbox::User=root download -qq "g++-12=$version" libisl23 libmpc3 libmpfr6 libgmp10 libzstd1 zlib1g > /dev/null
for package in ./*.deb; do dpkg -x "$package" root; done
export LD_LIBRARY_PATH="$PWD/root/usr/lib/x86_64-linux-gnu:$PWD/root/lib/x86_64-linux-gnu"

# What the compiler says of a loop under the lines given, or "taken".
ask() {
  printf '%s\n' "$@" '  for (int i = 0; i < 64; ++i) x[i] *= y;' '}' 'template void scale<4>(float*, float);' > loop.cpp
  if root/usr/lib/gcc/x86_64-linux-gnu/12/cc1plus -quiet -O2 -fopenmp-simd loop.cpp -o loop.s 2> errors; then
    echo taken
  else
    grep -o -m 1 "was not declared in this scope\|requires an assignment-expression" errors
  fi
}
function='template <int n> void scale(float* x, float y) {'
macro=$(ask '#define N 4' "$function" '#pragma GCC unroll N')
operator=$(ask '#define UNROLL _Pragma("GCC unroll 4")' "$function" 'UNROLL')
constant=$(ask 'constexpr int N = 4;' "$function" '#pragma GCC unroll N')
parameter=$(ask "$function" '#pragma GCC unroll n')
openmp=$(ask '#define N 4' "$function" '#pragma omp simd safelen(N)')
echo "macro: $macro; _Pragma from a macro: $operator; constexpr: $constant; template parameter: $parameter; omp with the macro: $openmp"
[ "$macro" = "was not declared in this scope" ] && [ "$operator" = taken ] && [ "$constant" = taken ]
[ "$parameter" = "requires an assignment-expression" ] && [ "$openmp" = taken ]
