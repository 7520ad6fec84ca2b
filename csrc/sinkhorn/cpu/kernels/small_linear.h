// Iterations of small Sinkhorn problems, one per SIMD lane, and the gradient through them, as scalings of one matrix.
//
// One side is scaled first, the other second; which are the rows is the caller's matter. With E_sf for entry f of the first side
// and s of the second,
//     w_f = b_f / sum_s x_s E_sf      x_s = a_s / sum_f E_sf w_f      plan = x_s E_sf w_f
// from x = 1: E is taken once, and no exponential follows. With eps (Megatron's and Liger's iteration)
//     E = softmax_s + eps, w = b      x = x a / (x sum_f E w + eps)   w = w b / (w sum_s x E + eps)
//
// Both half steps are done in one sweep over E: a few rows s are summed, scaled, and at once weighed into the sums over s that
// the next half step needs. The gradient runs the same sweep backwards; its derivation is in
// comp_kernels/ops/sinkhorn/README.md.
#pragma once

#include "lanes.h"

namespace comp_kernels::COMP_KERNELS_ISA {

constexpr int kSmallSide = 32;

// Calls f(integral_constant<count>) for a count of 1 .. kMost.
template <int kMost, typename F>
CK_INLINE void for_count(int count, F&& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return for_count<kMost - 1>(count, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// Calls f(begin, integral_constant<rows>) for equal pieces of at most kMost rows that cover 0 .. count - 1.
template <int kMost, int kCount, typename F>
CK_INLINE void in_blocks(int count, F&& f) {
  if constexpr (kCount > 0 && kCount <= kMost) {
    f(0, std::integral_constant<int, kCount>{});
  } else {
    const int blocks = (count + kMost - 1) / kMost;
    for (int block = 0; block < blocks; ++block) {
      const int begin = block * count / blocks, end = (block + 1) * count / blocks;
      for_count<kMost>(end - begin, [&](auto rows) { f(begin, rows); });
    }
  }
}

// The problems of one pack, entries as Lanes. kSide: both sides have that many entries; 0: `first` and `second`, up to
// kSmallSide. History: per iteration t the scalings after it, x at t * second and w at t * first, with what they start from at
// t = 0.
template <typename T, int kParts, int kSide>
struct LinearProblems {
  using L = Lanes<T, kParts>;
  static constexpr int kMost = kSide ? kSide : kSmallSide;

  int first_, second_, num_iters;
  T eps;
  L* e;              // [second, first]: exponentials; with eps, once prepared, softmax + eps
  const L *a, *b;    // [second], [first]: marginals
  L *x, *w;          // [second], [first]: written, the last scalings
  L *xs, *ws;        // histories; null: not kept

  CK_INLINE int first() const { return kSide ? kSide : first_; }
  CK_INLINE int second() const { return kSide ? kSide : second_; }

  // For every s: sum_f E_sf w_f goes through x_s = scale(s, sum); sums_f = sum_s x_s E_sf.
  template <typename Scale>
  CK_INLINE void sweep(const L* e, const L* w, L* sums, Scale&& scale) const {
    in_blocks<8, kSide>(second(), [&](int begin, auto block) {
      constexpr int kRows = decltype(block)::value;
      L row[kRows];
      for (int j = 0; j < kRows; ++j) row[j] = e[(begin + j) * first()] * w[0];
      for (int f = 1; f < first(); ++f) {
        for (int j = 0; j < kRows; ++j) row[j] = row[j] + e[(begin + j) * first() + f] * w[f];
      }
      for (int j = 0; j < kRows; ++j) row[j] = scale(begin + j, row[j]);
      weigh_rows<kRows>(e, begin, row, sums);
    });
  }

  // sums_f = sum_s weight(s) E_sf
  template <typename Weight>
  CK_INLINE void weigh(const L* e, L* sums, Weight&& weight) const {
    in_blocks<8, kSide>(second(), [&](int begin, auto block) {
      constexpr int kRows = decltype(block)::value;
      L row[kRows];
      for (int j = 0; j < kRows; ++j) row[j] = weight(begin + j);
      weigh_rows<kRows>(e, begin, row, sums);
    });
  }

  template <int kRows>
  CK_INLINE void weigh_rows(const L* e, int begin, const L (&row)[kRows], L* sums) const {
    for (int f = 0; f < first(); ++f) {
      L sum = begin > 0 ? sums[f] + row[0] * e[begin * first() + f] : row[0] * e[f];
      for (int j = 1; j < kRows; ++j) sum = sum + row[j] * e[(begin + j) * first() + f];
      sums[f] = sum;
    }
  }

  // With eps: E becomes softmax + eps; the softmax alone also goes to `softmax` where that is not null.
  [[gnu::noinline]] void prepare_eps(L* softmax) const {
    L sums[kMost];
    weigh(e, sums, [](int) { return L::all(1); });
    for (int f = 0; f < first(); ++f) sums[f] = quotient(L::all(1), sums[f]);
    for (int s = 0; s < second(); ++s) {
      for (int f = 0; f < first(); ++f) {
        const int i = s * first() + f;
        const L share = e[i] * sums[f];
        if (softmax != nullptr) softmax[i] = share;
        e[i] = share + L::all(eps);
      }
    }
  }

  CK_INLINE static L start(L marginal) { return select(marginal == L::all(0), L::all(0), L::all(1)); }

  template <bool kEps, bool kKeep>
  void iterate() const {
    L kept[kSide * kSide + 1], xt[kMost], wt[kMost], sums[kMost];
    for (int i = 0; i < kSide * kSide; ++i) kept[i] = e[i];  // in registers where they suffice
    const L* from = kSide ? kept : e;
    for (int s = 0; s < second(); ++s) xt[s] = start(a[s]);
    if (kKeep) std::copy_n(xt, second(), xs);
    if (!kEps) weigh(from, sums, [&](int s) { return xt[s]; });
    for (int t = 1; t <= num_iters; ++t) {
      for (int f = 0; f < first(); ++f) {
        if (!kEps) wt[f] = quotient(b[f], sums[f]);
        if (kEps) wt[f] = t == 1 ? b[f] : quotient(wt[f] * b[f], wt[f] * sums[f] + L::all(eps));
      }
      sweep(from, wt, sums, [&](int s, L row) {
        xt[s] = kEps ? quotient(xt[s] * a[s], xt[s] * row + L::all(eps)) : quotient(a[s], row);
        return xt[s];
      });
      if (kKeep) std::copy_n(xt, second(), xs + t * second());
      if (kKeep) std::copy_n(wt, first(), ws + t * first());
    }
    std::copy_n(xt, second(), x);
    std::copy_n(wt, first(), w);
  }

  [[gnu::noinline]] void run() const {
    const bool keep = xs != nullptr;
    if (eps > 0) return keep ? iterate<true, true>() : iterate<true, false>();
    return keep ? iterate<false, true>() : iterate<false, false>();
  }
};

// The gradient, after `run` with histories. g [second, first]: gradient of the plan; becomes that of log E (with eps, of the
// first softmax's logits). da, db: gradients of log x and log w. alpha, beta: memory as large as the histories.
template <typename T, int kParts, int kSide>
struct LinearGradient {
  using L = Lanes<T, kParts>;
  using Forward = LinearProblems<T, kParts, kSide>;
  const Forward& forward;
  L *g, *dx, *dw, *alpha, *beta;
  const L* softmax;  // [second, first] with eps

  CK_INLINE int first() const { return forward.first(); }
  CK_INLINE int second() const { return forward.second(); }
  static CK_INLINE L inverse(L marginal) { return select(marginal == L::all(0), L::all(0), quotient(L::all(1), marginal)); }
  // What a scaling passes on to the one before it, with eps; nothing where it is zero.
  CK_INLINE L passed_on(L share, L before) const {
    return select(before == L::all(0), L::all(0), quotient(L::all(forward.eps) * share, before));
  }

  [[gnu::noinline]] void run() const {
    through_plan();
    if (forward.eps > 0) {
      through_iterations<true>();
    } else {
      through_iterations<false>();
    }
    collect();
    if (forward.eps > 0) through_softmax();
  }

  // The plan's entries as products: their gradients go to both scalings. g becomes the gradient of E, this part of it.
  CK_INLINE void through_plan() const {
    for (int s = 0; s < second(); ++s) {
      for (int f = 0; f < first(); ++f) {
        L& at = g[s * first() + f];
        at = at * forward.x[s] * forward.w[f];
        const L entry = at * forward.e[s * first() + f];
        dx[s] = dx[s] + entry;
        dw[f] = dw[f] + entry;
      }
    }
  }

  // From the last iteration to the first: alpha = -(gradient of the sums over f), beta = -(that of the sums over s).
  template <bool kEps>
  void through_iterations() const {
    constexpr int kMost = Forward::kMost;
    L kept[kSide * kSide + 1], sums[kMost], inverse_a[kMost], inverse_b[kMost], carried[kMost], gradient[kMost], weights[kMost];
    for (int i = 0; i < kSide * kSide; ++i) kept[i] = forward.e[i];
    const L* e = kSide ? kept : forward.e;
    for (int s = 0; s < second(); ++s) inverse_a[s] = inverse(forward.a[s]);
    for (int f = 0; f < first(); ++f) inverse_b[f] = inverse(forward.b[f]), gradient[f] = dw[f];

    const auto share = [&](int t, int s, L dx) {  // alpha of iteration t
      const L result = dx * forward.xs[t * second() + s] * inverse_a[s];
      alpha[t * second() + s] = result;
      if (kEps && t > 0) carried[s] = passed_on(result, forward.xs[(t - 1) * second() + s]);
      return result;
    };
    weigh_last(e, sums, share);
    for (int t = forward.num_iters; t >= 1; --t) {
      const bool last = kEps && t == 1;  // before it is the softmax, and w = b
      for (int f = 0; f < first(); ++f) {
        const L w = forward.ws[t * first() + f];
        weights[f] = last ? L::all(0) : (gradient[f] - w * sums[f]) * w * inverse_b[f];
        beta[t * first() + f] = weights[f];
        if (kEps && !last) gradient[f] = passed_on(weights[f], forward.ws[(t - 1) * first() + f]);
        if (!kEps) gradient[f] = L::all(0);
      }
      if (t == 1) break;
      forward.sweep(e, weights, sums, [&](int s, L row) {
        const L through = forward.xs[(t - 1) * second() + s] * row;
        return share(t - 1, s, kEps ? carried[s] - through : L::all(0) - through);
      });
    }
  }

  template <typename Share>
  CK_INLINE void weigh_last(const L* e, L* sums, Share&& share) const {
    forward.weigh(e, sums, [&](int s) { return share(forward.num_iters, s, dx[s]); });
  }

  // g -= sum_t alpha_s w_f + beta_f x_s (x of the iteration before), block by block in registers.
  CK_INLINE void collect() const {
    in_blocks<4, kSide>(
        second(), [&](int s, auto rows) { in_blocks<2, 0>(first(), [&](int f, auto cols) { collect_block<rows, cols>(s, f); }); });
  }

  template <int kRows, int kCols>
  CK_INLINE void collect_block(int s, int f) const {
    L sum[kRows][kCols];
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kCols; ++j) sum[i][j] = g[(s + i) * first() + f + j];
    }
    for (int t = 1; t <= forward.num_iters; ++t) {
      const L *alphas = alpha + t * second() + s, *x = forward.xs + (t - 1) * second() + s;
      const L *betas = beta + t * first() + f, *w = forward.ws + t * first() + f;
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kCols; ++j) sum[i][j] = sum[i][j] - alphas[i] * w[j] - betas[j] * x[i];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kCols; ++j) {
        const int at = (s + i) * first() + f + j;
        g[at] = forward.eps > 0 ? sum[i][j] : sum[i][j] * forward.e[at];
      }
    }
  }

  CK_INLINE void through_softmax() const {
    for (int f = 0; f < first(); ++f) {
      L mean = L::all(0);
      for (int i = f; i < second() * first(); i += first()) mean = mean + softmax[i] * g[i];
      for (int i = f; i < second() * first(); i += first()) g[i] = softmax[i] * (g[i] - mean);
    }
  }
};

}  // namespace comp_kernels::COMP_KERNELS_ISA
