// Cross-entropy of target and prediction over one tile of prototypes, and its gradient, in one pass over the two score tiles.
#include "../alignment_loss.h"

#include "common/cpu/parallel.h"
#include "common/cpu/score_tile.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

template <typename T>
class Tile {
 public:
  explicit Tile(const comp_kernels_alignment_loss_params& p) : p_(p), padded_(round_up(p.num_cols, kLanes<T>)) {
    // Padded copies, so that every row is whole vectors but for its last loads and stores.
    scale_.assign(padded_, T(0));
    target_shift_.assign(padded_, kMinusInfinity<T>);
    for (int64_t k = 0; k < p.num_cols; ++k) {
      scale_[k] = p.col_scale ? static_cast<const T*>(p.col_scale)[k] : T(1);
      target_shift_[k] = p.v2 ? static_cast<const T*>(p.v2)[k] : T(0);
    }
  }

  void run() {
    parallel_items(num_workers(), p_.num_rows, [&](int64_t, int64_t i) { row(i); });
  }

 private:
  // Sums - target log2 prediction over the row, and turns its vision scores into the gradient.
  void row(int64_t i) const {
    const T weight = static_cast<const T*>(p_.row_weight)[i];
    T* vision = static_cast<T*>(p_.vision) + i * p_.vision_stride;
    const T* text = static_cast<const T*>(p_.text) + i * p_.text_stride;
    if (weight == 0) {
      if (p_.gradient) std::fill_n(vision, p_.num_cols, T(0));
      return;
    }
    const T target_weight = static_cast<const T*>(p_.target_weight)[i], sum_i = static_cast<const T*>(p_.sums)[i];
    const Vec<T> u = broadcast(static_cast<const T*>(p_.u2)[i]), peak = broadcast(static_cast<const T*>(p_.peaks2)[i]);
    const Vec<T> log_sum = broadcast(std::log2(sum_i));
    const T grad_factor = static_cast<T>(p_.grad_factor) * weight;
    const Vec<T> prediction_factor = broadcast(grad_factor / sum_i), target_factor = broadcast(grad_factor * target_weight);
    const Vec<T> text_factor = broadcast(static_cast<T>(p_.text_factor));
    const Vec<T> vision_factor = broadcast(static_cast<T>(p_.vision_factor));
    const T *scales = scale_.data(), *shifts = target_shift_.data();
    double loss = 0;
    constexpr int64_t kSegment = 64 * kLanes<T>;  // summed in T, the segments in double
    const int64_t whole = p_.num_cols / kLanes<T> * kLanes<T>;
    auto entry = [&](int64_t k, Vec<T> text_score, Vec<T> vision_score, Vec<T>& sum) {
      const Vec<T> scale = load(scales + k);
      // At most 0 but for what rounding leaves of huge scores; min keeps NaN.
      const Vec<T> zero = broadcast(T(0));
      const Vec<T> target = exp2(min<T>(zero, text_score * (scale * text_factor) + (load(shifts + k) + u)));
      const Vec<T> below_peak = min<T>(zero, vision_score * (scale * vision_factor) - peak);
      sum += target * (log_sum - below_peak);
      return (exp2(below_peak) * prediction_factor - target * target_factor) * scale;
    };
    for (int64_t begin = 0; begin < whole; begin += kSegment) {
      const int64_t end = std::min(begin + kSegment, whole);
      Vec<T> sum{};
      if (p_.gradient) {
        for (int64_t k = begin; k < end; k += kLanes<T>) store(vision + k, entry(k, load(text + k), load(vision + k), sum));
      } else {
        for (int64_t k = begin; k < end; k += kLanes<T>) entry(k, load(text + k), load(vision + k), sum);
      }
      loss += reduce_sum<T>(sum);
    }
    if (whole < p_.num_cols) {
      Vec<T> text_score{}, vision_score{}, sum{};
      for (int64_t k = whole; k < p_.num_cols; ++k) {
        text_score[k - whole] = text[k];
        vision_score[k - whole] = vision[k];
      }
      const Vec<T> gradient = entry(whole, text_score, vision_score, sum);
      for (int64_t k = whole; p_.gradient && k < p_.num_cols; ++k) vision[k] = gradient[k - whole];
      loss += reduce_sum<T>(sum);
    }
    static_cast<double*>(p_.row_loss2)[i] += loss * target_weight;
  }

  const comp_kernels_alignment_loss_params& p_;
  int64_t padded_;
  std::vector<T> scale_, target_shift_;
};

}  // namespace

const char* alignment_loss_tile(const comp_kernels_alignment_loss_params& p) {
  return for_dtype(p.dtype, [&](auto type) { Tile<Compute<decltype(type)>>(p).run(); });
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
