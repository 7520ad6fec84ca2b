#!/usr/bin/env bash
# GCC 12: _mm512_add_ps(_mm512_mul_ps(a, b), c) becomes one fused multiply-add, its masked and scalar forms do not; -std=c++17 leaves it on.
#
# One would guess that an intrinsic is the instruction of its name. In GCC those that are plain operators on whole vectors (add, sub, mul) are expressions, and fused where
# the processor has the instruction, across statements and variables; masked and _ss forms, and those with a rounding mode, are what they say. So a loop of
# whole vectors with a masked or scalar rest rounds the same element in two ways, by its place in the array: results change with the length of a batch or the
# number of threads. a * d - b * c of equal products is not zero any more. Where contraction is known, one guesses that a strict -std turns it
# off: -std=c17 does, -std=c++17 does not (answers on the web say it does), and "#pragma STDC FP_CONTRACT OFF" is accepted and ignored in both. -ffp-contract=off helps.
#
# Seen: gcc 12.2.0-14+deb12u1, as below; clang 22.1.8 (ziglang 0.17.1) fuses none of these. Looks at assembly only: needs no processor with AVX-512. Needs Debian 12 (apt-get download, dpkg),
# x86-64, 150 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
version=12.2.0-14+deb12u1
apt-get -o APT::Sandbox::User=root download -qq "cpp-12=$version" "g++-12=$version" "libgcc-12-dev=$version" libisl23 libmpc3 libmpfr6 libgmp10 libzstd1 zlib1g > /dev/null
for package in ./*.deb; do dpkg -x "$package" root; done
lib=root/usr/lib/gcc/x86_64-linux-gnu/12
export LD_LIBRARY_PATH="$PWD/root/usr/lib/x86_64-linux-gnu:$PWD/root/lib/x86_64-linux-gnu"
cat > fuse.c <<'C'
#define _MM_MALLOC_H_INCLUDED  // the C library's headers are not needed
#include <immintrin.h>

#pragma STDC FP_CONTRACT OFF
#ifdef WHOLE
__m512 f(__m512 a, __m512 b, __m512 c) {
  __m512 product = _mm512_mul_ps(a, b);
  return _mm512_add_ps(product, c);
}
#elif defined(MASKED)
__m512 f(__m512 a, __m512 b, __m512 c, __mmask16 rest) {
  __m512 product = _mm512_maskz_mul_ps(rest, a, b);
  return _mm512_maskz_add_ps(rest, product, c);
}
#elif defined(ROUNDING)
__m512 f(__m512 a, __m512 b, __m512 c) {
  __m512 product = _mm512_mul_round_ps(a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_add_ps(product, c);
}
#elif defined(SCALAR)
__m128 f(__m128 a, __m128 b, __m128 c) { return _mm_add_ss(_mm_mul_ss(a, b), c); }
#elif defined(DETERMINANT)
__m256 f(__m256 a, __m256 b, __m256 c, __m256 d) { return _mm256_sub_ps(_mm256_mul_ps(a, d), _mm256_mul_ps(b, c)); }
#endif
C
# The arithmetic instructions of f under the compiler and the options given.
instructions() {
  "$@" -quiet -O2 -mavx512f -mfma -isystem "$lib/include" fuse.c -o fuse.s
  echo $(grep -oE 'v(mul|add|sub|fmadd|fnmadd)[0-9]*[ps]s' fuse.s)
}
for options in "cc1 -std=gnu17" "cc1 -std=c17" "cc1plus -std=gnu++17" "cc1plus -std=c++17" "cc1plus -std=c++17 -ffp-contract=off"; do
  echo "$options:"
  for form in WHOLE MASKED ROUNDING SCALAR DETERMINANT; do
    # shellcheck disable=SC2086
    echo "  ${form,,}: $(instructions "$lib"/$options -D$form)"
  done
done | tee seen
diff seen - <<'SEEN'
cc1 -std=gnu17:
  whole: vfmadd132ps
  masked: vmulps vaddps
  rounding: vmulps vaddps
  scalar: vmulss vaddss
  determinant: vmulps vfnmadd231ps
cc1 -std=c17:
  whole: vmulps vaddps
  masked: vmulps vaddps
  rounding: vmulps vaddps
  scalar: vmulss vaddss
  determinant: vmulps vmulps vsubps
cc1plus -std=gnu++17:
  whole: vfmadd132ps
  masked: vmulps vaddps
  rounding: vmulps vaddps
  scalar: vmulss vaddss
  determinant: vmulps vfnmadd231ps
cc1plus -std=c++17:
  whole: vfmadd132ps
  masked: vmulps vaddps
  rounding: vmulps vaddps
  scalar: vmulss vaddss
  determinant: vmulps vfnmadd231ps
cc1plus -std=c++17 -ffp-contract=off:
  whole: vmulps vaddps
  masked: vmulps vaddps
  rounding: vmulps vaddps
  scalar: vmulss vaddss
  determinant: vmulps vmulps vsubps
SEEN
echo "as seen before"
