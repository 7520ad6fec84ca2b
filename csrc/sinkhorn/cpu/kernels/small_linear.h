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
constexpr int kGathered = 8;  // iterations whose outer products are added to the gradient together

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
    const int blocks = (count + kMost - 1) / kMost, least = count / blocks, longer = count % blocks;
    for (int block = 0, begin = 0; block < blocks; ++block) {
      const int length = least + (block < longer);
      for_count<kMost>(length, [&](auto rows) { f(begin, rows); });
      begin += length;
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
  static constexpr int kKept = kSide <= 8 ? kSide * kSide : 0;  // entries of which the iterations make a copy of their own

  int first_, second_, num_iters;
  T eps;
  L* e;              // [second, first]: exponentials; with eps, once prepared, softmax + eps
  const L *a, *b;    // [second], [first]: marginals
  L *x, *w;          // [second], [first]: written, the last scalings
  L *xs, *ws;        // histories; null: not kept
  L *x_rates, *w_rates;  // histories, written with eps and those of x and w

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

  // With eps: E becomes softmax + eps; the softmax alone also goes to `softmax` where that is not null. Of an entry without mass
  // the scores may be anything, -inf all of them, so its softmax is not a number: zeros take its place, and w = 0 its share.
  [[gnu::noinline]] void prepare_eps(L* softmax) const {
    L sums[kMost];
    weigh(e, sums, [](int) { return L::all(1); });
    for (int f = 0; f < first(); ++f) sums[f] = quotient(L::all(1), sums[f]);
    for (int s = 0; s < second(); ++s) {
      for (int f = 0; f < first(); ++f) {
        const int i = s * first() + f;
        const L share = select(b[f] == L::all(0), L::all(0), e[i] * sums[f]);
        if (softmax != nullptr) softmax[i] = share;
        e[i] = share + L::all(eps);
      }
    }
  }

  CK_INLINE static L start(L marginal) { return select(marginal == L::all(0), L::all(0), L::all(1)); }

  template <bool kEps, bool kKeep>
  void iterate() const {
    L kept[kKept + 1], xt[kMost], wt[kMost], sums[kMost];
    for (int i = 0; i < kKept; ++i) kept[i] = e[i];  // in registers where they suffice
    const L* from = kKept ? kept : e;
    for (int s = 0; s < second(); ++s) xt[s] = start(a[s]);
    if (kKeep) std::copy_n(xt, second(), xs);
    if (kEps) std::fill_n(sums, first(), L::all(0));  // nobody reads them, which GCC cannot see
    if (!kEps) weigh(from, sums, [&](int s) { return xt[s]; });
    for (int t = 1; t <= num_iters; ++t) {
      for (int f = 0; f < first(); ++f) {
        const int i = t * first() + f;
        if (!kEps) wt[f] = quotient(b[f], sums[f]);
        if (kEps) wt[f] = t == 1 ? b[f] : rescaled<kKeep>(wt[f], b[f], sums[f], kKeep ? w_rates + i : nullptr);
        if (kKeep) ws[i] = wt[f];
      }
      sweep(from, wt, sums, [&](int s, L row) {
        const int i = t * second() + s;
        xt[s] = kEps ? rescaled<kKeep>(xt[s], a[s], row, kKeep ? x_rates + i : nullptr) : quotient(a[s], row);
        if (kKeep) xs[i] = xt[s];
        return xt[s];
      });
    }
    std::copy_n(xt, second(), x);
    std::copy_n(wt, first(), w);
  }

  // With eps: before * marginal / (before * sum + eps). The rate is 1 / (before * sum + eps), where it is kept: the gradient
  // takes it instead of quotients of its own.
  template <bool kKeep>
  CK_INLINE L rescaled(const L& before, const L& marginal, const L& sum, L* rate) const {
    const L divisor = before * sum + L::all(eps);
    if (!kKeep) return quotient(before * marginal, divisor);
    return before * marginal * (*rate = quotient(L::all(1), divisor));
  }

  [[gnu::noinline]] void run() const {
    const bool keep = xs != nullptr;
    if (eps > 0) return keep ? iterate<true, true>() : iterate<true, false>();
    return keep ? iterate<false, true>() : iterate<false, false>();
  }
};

// The gradient, after `run` with histories. g [second, first]: gradient of the plan; becomes that of log E (with eps, of the
// first softmax's logits). dx, dw: gradients of log x and log w. alpha, beta: kGathered rows, [second] and [first] each.
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

  [[gnu::noinline]] void run() const {
    through_plan();
    if (forward.eps > 0) {
      through_iterations<true>();
      through_softmax();
    } else {
      through_iterations<false>();
      for (int i = 0; i < second() * first(); ++i) g[i] = g[i] * forward.e[i];
    }
  }

  // The plan's entries as products: their gradients go to both scalings. g becomes the gradient of E, this part of it.
  CK_INLINE void through_plan() const {
    for (int s = 0; s < second(); ++s) {
      L sum = dx[s];
      for (int f = 0; f < first(); ++f) {
        L& at = g[s * first() + f];
        at = at * forward.x[s] * forward.w[f];
        const L entry = at * forward.e[s * first() + f];
        sum = sum + entry;
        dw[f] = dw[f] + entry;
      }
      dx[s] = sum;
    }
  }

  // From the last iteration to the first: alpha = -(gradient of the sums over f), beta = -(that of the sums over s).
  template <bool kEps>
  void through_iterations() const {
    constexpr int kMost = Forward::kMost;
    constexpr int kKept = Forward::kKept;
    L kept[kKept + 1], sums[kMost], inverse_a[kMost], inverse_b[kMost], carried[kMost], gradient[kMost], weights[kMost];
    for (int i = 0; i < kKept; ++i) kept[i] = forward.e[i];
    const L* e = kKept ? kept : forward.e;
    for (int s = 0; s < second(); ++s) inverse_a[s] = inverse(forward.a[s]);
    for (int f = 0; f < first(); ++f) inverse_b[f] = inverse(forward.b[f]), gradient[f] = dw[f];

    const auto share = [&](int t, int s, L dx) {  // alpha of iteration t
      const L rate = kEps ? forward.x_rates[t * second() + s] : inverse_a[s];
      const L result = dx * rate * forward.xs[(kEps ? t - 1 : t) * second() + s];
      if (kEps) carried[s] = L::all(forward.eps) * dx * rate;  // to the scaling before it
      return alpha[row(t) * second() + s] = result;
    };
    forward.weigh(e, sums, [&](int s) { return share(forward.num_iters, s, dx[s]); });
    for (int t = forward.num_iters; t >= 1; --t) {
      for (int f = 0; f < first(); ++f) {
        const L w = forward.ws[t * first() + f];
        const L through = gradient[f] - w * sums[f];
        if (!kEps) {
          weights[f] = through * w * inverse_b[f];
          gradient[f] = L::all(0);
        } else if (t > 1) {
          const L rate = forward.w_rates[t * first() + f];
          weights[f] = through * rate * forward.ws[(t - 1) * first() + f];
          gradient[f] = L::all(forward.eps) * through * rate;
        } else {
          weights[f] = L::all(0);  // w = b
        }
        beta[row(t) * first() + f] = weights[f];
      }
      if (row(t) == 0) gather(t);
      if (t == 1) break;
      forward.sweep(e, weights, sums, [&](int s, L row) {
        const L through = forward.xs[(t - 1) * second() + s] * row;
        return share(t - 1, s, kEps ? carried[s] - through : L::all(0) - through);
      });
    }
  }

  // g -= sum_t alpha_s w_f + beta_f x_s (x of the iteration before), a few iterations at a time: their rows stay in the first
  // level cache, where histories of all iterations do not, and blocks of g in registers.
  static CK_INLINE int row(int t) { return (t - 1) % kGathered; }

  CK_INLINE void gather(int t) const {
    const int rows = std::min(kGathered, forward.num_iters - t + 1);
    for (int p = 0; p < kParts; ++p) {
      in_blocks<4, kSide>(second(), [&](int s, auto height) {
        in_blocks<2, 0>(first(), [&](int f, auto width) { gather_block<height, width>(t, rows, s, f, p); });
      });
    }
  }

  template <int kRows, int kCols>
  CK_INLINE void gather_block(int t, int rows, int s, int f, int p) const {
    L* block = g + s * first() + f;
    Vec<T> sum[kRows][kCols];
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kCols; ++j) sum[i][j] = block[i * first() + j].part[p];
    }
    for (int r = 0; r < rows; ++r) {
      const L *alphas = alpha + r * second() + s, *x = forward.xs + (t + r - 1) * second() + s;
      const L *betas = beta + r * first() + f, *w = forward.ws + (t + r) * first() + f;
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kCols; ++j) {
          sum[i][j] = sum[i][j] - alphas[i].part[p] * w[j].part[p] - betas[j].part[p] * x[i].part[p];
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kCols; ++j) block[i * first() + j].part[p] = sum[i][j];
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
