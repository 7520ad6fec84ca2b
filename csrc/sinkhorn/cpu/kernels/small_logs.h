// Iterations of small Sinkhorn problems, one per SIMD lane, and the gradient through them, in logarithms: for scores so far
// apart, or marginals so uneven, that a float does not hold the scalings of small_linear.h. Every half step takes its
// exponentials.
//
//     v_f = log b_f - log sum_s 2^(l_sf + u_s)        u_s = log a_s - log sum_f 2^(l_sf + v_f)        all in bits
#pragma once

#include "lanes.h"

namespace comp_kernels::COMP_KERNELS_ISA {

template <typename T, int kParts>
struct LogProblems {
  using L = Lanes<T, kParts>;

  int first, second, num_iters;
  const L* l;        // [second, first]: entries in bits
  const L *a, *b;    // [second], [first]: marginals
  L *us, *vs;        // histories, as those of LinearProblems: [num_iters + 1, second], [num_iters + 1, first]
  bool keep;         // false: one row of each, for the last iteration

  static CK_INLINE L potential(L marginal, L log_sum) {
    return select(marginal == L::all(0), L::all(kMinusInfinity<T>), log2(marginal) - log_sum);
  }

  // log2 of the sum of 2^entry(i)
  template <typename Entry>
  static CK_INLINE L log_sum(int count, Entry&& entry) {
    L peak = entry(0);
    for (int i = 1; i < count; ++i) peak = max(entry(i), peak);
    const L shift = select(peak == L::all(kMinusInfinity<T>), L::all(0), peak);
    L sum = L::all(0);
    for (int i = 0; i < count; ++i) sum = sum + exp2(entry(i) - shift);
    return log2(sum) + shift;
  }

  [[gnu::noinline]] void run() const {
    for (int s = 0; s < second; ++s) us[s] = select(a[s] == L::all(0), L::all(kMinusInfinity<T>), L::all(0));
    for (int t = 1; t <= num_iters; ++t) {
      const L* before = us + row(t - 1) * second;
      L *u = us + row(t) * second, *v = vs + row(t) * first;
      for (int f = 0; f < first; ++f) {
        v[f] = potential(b[f], log_sum(second, [&](int s) { return l[s * first + f] + before[s]; }));
      }
      for (int s = 0; s < second; ++s) {
        u[s] = potential(a[s], log_sum(first, [&](int f) { return l[s * first + f] + v[f]; }));
      }
    }
  }

  int row(int t) const { return keep ? t : 0; }
  const L* u() const { return us + row(num_iters) * second; }
  const L* v() const { return vs + row(num_iters) * first; }

  // Calls take(index, entry of the plan) for all: a share of the marginal, in which u, rounded at hundreds of bits, has no part.
  template <typename Take>
  CK_INLINE void plan(Take&& take) const {
    for (int s = 0; s < second; ++s) {
      const auto entry = [&](int f) { return l[s * first + f] + v()[f]; };
      L peak = entry(0), sum = L::all(0);
      for (int f = 1; f < first; ++f) peak = max(entry(f), peak);
      for (int f = 0; f < first; ++f) sum = sum + exp2(entry(f) - peak);
      const auto none = a[s] == L::all(0);
      const L rate = quotient(a[s], sum);
      for (int f = 0; f < first; ++f) take(s * first + f, select(none, L::all(0), rate * exp2(entry(f) - peak)));
    }
  }

  // to = select(keep, to, plan)
  [[gnu::noinline]] void write_plan(L* to, const LaneMask<T, kParts>& keep) const {
    plan([&](int i, const L& entry) { to[i] = select(keep, to[i], entry); });
  }

  // After `run`. g [second, first]: gradient of the plan, becomes that of the entries' natural logarithms; du [second], dv
  // [first]: gradients of the potentials, used up.
  [[gnu::noinline]] void gradient(L* g, L* du, L* dv) const {
    plan([&](int i, const L& entry) {
      g[i] = g[i] * entry;
      du[i / first] = du[i / first] + g[i];
      dv[i % first] = dv[i % first] + g[i];
    });
    for (int t = num_iters; t >= 1; --t) {
      through(g, vs + t * first, a, du, dv, second, first, first, 1);
      for (int s = 0; s < second; ++s) du[s] = L::all(0);
      through(g, us + (t - 1) * second, b, dv, du, first, second, 1, first);
      for (int f = 0; f < first; ++f) dv[f] = L::all(0);
    }
  }

  // Through one half step, from the gradient `down` of the potentials that it made out of the `other` ones: minus a softmax,
  // taken anew, for the rounding of potentials of hundreds of bits would keep it from summing to one.
  [[gnu::noinline]] void through(L* g, const L* other, const L* marginal, const L* down, L* dother, int owns, int others,
                                 int own_stride, int other_stride) const {
    for (int i = 0; i < owns; ++i) {
      const auto entry = [&](int j) { return l[i * own_stride + j * other_stride] + other[j]; };
      L peak = entry(0), sum = L::all(0);
      for (int j = 1; j < others; ++j) peak = max(entry(j), peak);
      for (int j = 0; j < others; ++j) sum = sum + exp2(entry(j) - peak);
      const auto none = marginal[i] == L::all(0);
      const L rate = quotient(down[i], sum);
      for (int j = 0; j < others; ++j) {
        const L share = select(none, L::all(0), rate * exp2(entry(j) - peak));
        g[i * own_stride + j * other_stride] = g[i * own_stride + j * other_stride] - share;
        dother[j] = dother[j] - share;
      }
    }
  }
};

}  // namespace comp_kernels::COMP_KERNELS_ISA
