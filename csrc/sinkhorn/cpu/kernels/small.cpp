// Sinkhorn over many small matrices, one per SIMD lane: loads and transposes packs of them, iterates, writes; threads take packs.
#include "../small.h"

#include <new>

#include "common/cpu/parallel.h"
#include "common/cpu/scratch.h"
#include "small_linear.h"
#include "small_logs.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

constexpr double kLn2 = 0.693147180559945309417;

// Scores of one matrix within so many bits of each other, and marginals within another so many, keep every product of the linear
// iterations a normal number, for any number of iterations: scalings stay within 2^(bits of both) of their mean.
template <typename T>
constexpr T kScoreBits = sizeof(T) == 4 ? 48 : 400;
template <typename T>
constexpr T kMarginalRatio = sizeof(T) == 4 ? 0x1p20 : 0x1p200;

template <typename L>
struct Scratch {
  L *e, *bits, *g, *softmax;             // [n, K]
  L *a, *b, *x, *w, *da, *db;            // [second], [first]
  L *alpha, *beta;                       // [kGathered, second], [kGathered, first]
  L *xs, *ws, *us, *vs;                  // [num_iters + 1, second], [num_iters + 1, first]

  void carve(Carver& carver, const comp_kernels_sinkhorn_small_params& p, bool backward) {
    const int64_t entries = p.num_rows * p.num_cols, sides = std::max(p.num_rows, p.num_cols);
    const int64_t histories = backward ? (p.num_iters + 1) * sides : 0;
    for (L** piece : {&e, &bits}) carver.take(*piece, entries);
    for (L** piece : {&a, &b, &x, &w, &da, &db}) carver.take(*piece, sides);
    for (L** piece : {&us, &vs}) carver.take(*piece, std::max(histories, sides));
    for (L** piece : {&g, &softmax}) carver.take(*piece, backward ? entries : 0);
    for (L** piece : {&alpha, &beta}) carver.take(*piece, backward ? kGathered * sides : 0);
    for (L** piece : {&xs, &ws}) carver.take(*piece, histories);
  }
};

// One worker's pack of kParts * kLanes<T> matrices.
template <typename S, int kParts, int kSide>
class Pack {
 public:
  using T = Compute<S>;
  using L = Lanes<T, kParts>;
  static constexpr int kMatrices = kParts * kLanes<T>;

  Pack(const comp_kernels_sinkhorn_small_params& p, Scratch<L>& scratch)
      : p_(p),
        s_(scratch),
        first_(static_cast<int>(p.rows_first ? p.num_rows : p.num_cols)),
        second_(static_cast<int>(p.rows_first ? p.num_cols : p.num_rows)),
        count_(first_ * second_) {
    for (int i = 0; i < p.num_rows; ++i) {
      for (int k = 0; k < p.num_cols; ++k) {
        slot_[i * p.num_cols + k] = static_cast<uint16_t>(p.rows_first ? k * p.num_rows + i : i * p.num_cols + k);
      }
    }
    for (int i = 0; i < kSmallSide; ++i) in_order_[i] = static_cast<uint16_t>(i);
  }

  void forward(int64_t pack) {
    pack_ = pack;
    const auto safe = load_problem();
    iterate(nullptr, nullptr);
    const L unit = L::all(static_cast<T>(kLn2));  // potentials leave as natural logarithms
    for (int s = 0; s < second_; ++s) s_.da[s] = log2(s_.x[s]) * unit;
    for (int f = 0; f < first_; ++f) s_.db[f] = (log2(s_.w[f]) - shift_) * unit;
    for (int s = 0; s < second_; ++s) {
      for (int f = 0; f < first_; ++f) s_.e[s * first_ + f] = s_.x[s] * s_.e[s * first_ + f] * s_.w[f];
    }
    if (!safe.all()) {
      const auto logs = iterate_logs(/*keep=*/false);
      for (int s = 0; s < second_; ++s) s_.da[s] = select(safe, s_.da[s], logs.u()[s] * unit);
      for (int f = 0; f < first_; ++f) s_.db[f] = select(safe, s_.db[f], logs.v()[f] * unit);
      logs.write_plan(s_.e, safe);
    }
    put(static_cast<T*>(p_.plan), s_.e, count_, slot_);
    put(static_cast<T*>(p_.rows_first ? p_.v : p_.u), s_.da, second_, in_order_);
    put(static_cast<T*>(p_.rows_first ? p_.u : p_.v), s_.db, first_, in_order_);
  }

  void backward(int64_t pack) {
    pack_ = pack;
    const auto safe = load_problem();
    const auto linear = iterate(s_.xs, s_.ws);
    load_gradients();
    LinearGradient<T, kParts, kSide>{linear, s_.g, s_.da, s_.db, s_.alpha, s_.beta, s_.softmax}.run();
    const L scale = L::all(static_cast<T>(p_.factor * kLn2));  // 1 / epsilon
    for (int i = 0; i < count_; ++i) s_.e[i] = s_.g[i] * scale;
    if (!safe.all()) {
      const auto logs = iterate_logs(/*keep=*/true);
      load_gradients();
      logs.gradient(s_.g, s_.da, s_.db);
      for (int i = 0; i < count_; ++i) s_.e[i] = select(safe, s_.e[i], s_.g[i] * scale);
    }
    put(static_cast<S*>(p_.grad_scores), s_.e, count_, slot_);
  }

 private:
  Problems at(int p, int64_t stride) const { return {pack_ * kMatrices + p * kLanes<T>, p_.num_items - 1, stride}; }

  template <typename X>
  void get(L* to, const X* from, int64_t stride, int count, const uint16_t* slot) const {
    for (int p = 0; p < kParts; ++p) load_lanes(to, p, from, at(p, stride), count, slot);
  }
  template <typename X>
  void put(X* to, const L* from, int count, const uint16_t* slot) const {
    for (int p = 0; p < kParts && at(p, 0).lanes(1) > 0; ++p) store_lanes(from, p, to, at(p, count), count, slot);
  }

  // Entries e = 2^(score - shift) and marginals; which lanes the linear iterations serve.
  LaneMask<T, kParts> load_problem() {
    const L factor = L::all(static_cast<T>(p_.factor));
    get(s_.bits, static_cast<const S*>(p_.scores), p_.item_stride, count_, slot_);
    L top = s_.bits[0], bottom = top;
    if (p_.eps > 0) {  // a softmax over each entry of the first side, with its own maximum
      L tops[kSmallSide];
      shift_ = L::all(0);
      std::copy_n(s_.bits, first_, tops);
      for (int s = 1; s < second_; ++s) {
        for (int f = 0; f < first_; ++f) tops[f] = max(s_.bits[s * first_ + f], tops[f]);
      }
      for (int s = 0; s < second_; ++s) {
        for (int f = 0; f < first_; ++f) s_.e[s * first_ + f] = exp2((s_.bits[s * first_ + f] - tops[f]) * factor);
      }
    } else {
      for (int i = 1; i < count_; ++i) {
        top = max(s_.bits[i], top);
        bottom = min(s_.bits[i], bottom);
      }
      shift_ = top * factor;
      for (int i = 0; i < count_; ++i) s_.e[i] = exp2((s_.bits[i] - top) * factor);
    }
    get_marginals(p_.row_marginals, p_.row_marginals_stride, static_cast<int>(p_.num_rows), p_.rows_first ? s_.b : s_.a);
    get_marginals(p_.col_marginals, p_.col_marginals_stride, static_cast<int>(p_.num_cols), p_.rows_first ? s_.a : s_.b);
    if (p_.eps > 0) return L::all(0) == L::all(0);
    return ((top - bottom) * factor <= L::all(kScoreBits<T>)) & even(s_.a, second_) & even(s_.b, first_);
  }

  void get_marginals(const void* from, int64_t stride, int count, L* to) const {
    const T* marginals = static_cast<const T*>(from);
    if (stride != 0) return get(to, marginals, stride, count, in_order_);
    for (int i = 0; i < count; ++i) to[i] = L::all(marginals[i]);
  }

  // Whether the positive ones among the marginals, of which there must be some, lie close enough together.
  static LaneMask<T, kParts> even(const L* marginals, int count) {
    const L infinity = L::all(-kMinusInfinity<T>);
    L most = L::all(0), least = infinity, sum = L::all(0);
    for (int i = 0; i < count; ++i) {
      most = max(marginals[i], most);
      least = min(select(marginals[i] == L::all(0), infinity, marginals[i]), least);
      sum = sum + marginals[i];  // NaN, which no maximum sees
    }
    return (most <= least * L::all(kMarginalRatio<T>)) & (sum <= L::all(std::numeric_limits<T>::max())) &
           (least <= L::all(std::numeric_limits<T>::max()));
  }

  LinearProblems<T, kParts, kSide> iterate(L* xs, L* ws) {
    const LinearProblems<T, kParts, kSide> linear{
        first_, second_, static_cast<int>(p_.num_iters), static_cast<T>(p_.eps), s_.e, s_.a, s_.b, s_.x, s_.w, xs, ws,
        s_.us,  s_.vs};  // with eps, no logarithms follow that need these
    if (p_.eps > 0) linear.prepare_eps(xs != nullptr ? s_.softmax : nullptr);
    linear.run();
    return linear;
  }

  LogProblems<T, kParts> iterate_logs(bool keep) {
    for (int i = 0; i < count_; ++i) s_.bits[i] = s_.bits[i] * L::all(static_cast<T>(p_.factor));
    const LogProblems<T, kParts> logs{first_, second_, static_cast<int>(p_.num_iters), s_.bits, s_.a, s_.b, s_.us, s_.vs, keep};
    logs.run();
    return logs;
  }

  void load_gradients() {
    get_gradient(p_.grad_plan, count_, slot_, s_.g);
    get_gradient(p_.grad_u, static_cast<int>(p_.num_rows), in_order_, p_.rows_first ? s_.db : s_.da);
    get_gradient(p_.grad_v, static_cast<int>(p_.num_cols), in_order_, p_.rows_first ? s_.da : s_.db);
  }

  void get_gradient(const void* from, int count, const uint16_t* slot, L* to) const {
    if (from != nullptr) return get(to, static_cast<const T*>(from), count, count, slot);
    for (int i = 0; i < count; ++i) to[i] = L::all(0);
  }

  const comp_kernels_sinkhorn_small_params& p_;
  Scratch<L>& s_;
  const int first_, second_, count_;
  uint16_t slot_[kSmallSide * kSmallSide], in_order_[kSmallSide];
  L shift_;  // in bits, from the entries of E
  int64_t pack_ = 0;
};

template <typename S, int kParts, int kSide>
void run_packs(const comp_kernels_sinkhorn_small_params& p, bool backward) {
  using Work = Pack<S, kParts, kSide>;
  const int64_t packs = (p.num_items + Work::kMatrices - 1) / Work::kMatrices, workers = std::min(num_workers(), packs);
  PerWorker<Scratch<typename Work::L>> scratch(workers, p, backward);
  if (!scratch.allocated()) throw std::bad_alloc();
  // A few draws per worker balance them, and one thread's results lie together.
  const int64_t chunk = std::max<int64_t>(1, packs / (workers * 8)), chunks = (packs + chunk - 1) / chunk;
  parallel_draws(workers, chunks, /*together=*/1, [&](int64_t worker, auto draw) {
    Work work(p, scratch[worker]);
    for (int64_t drawn; (drawn = draw()) >= 0;) {
      for (int64_t pack = drawn * chunk; pack < std::min(packs, (drawn + 1) * chunk); ++pack) {
        if (backward) {
          work.backward(pack);
        } else {
          work.forward(pack);
        }
      }
    }
  });
}

const char* run(const comp_kernels_sinkhorn_small_params& p, bool backward) {
  if (p.num_rows < 1 || p.num_cols < 1 || std::max(p.num_rows, p.num_cols) > kSmallSide) return "sides must be 1 to 32";
  return for_dtype(p.dtype, [&](auto storage) {
    using S = decltype(storage);
    if constexpr (sizeof(Compute<S>) == 4) {
      if (p.num_rows == 4 && p.num_cols == 4) return run_packs<S, 2, 4>(p, backward);
      if (p.num_rows == 8 && p.num_cols == 8) return run_packs<S, 1, 8>(p, backward);
      if (p.num_rows == 16 && p.num_cols == 16) return run_packs<S, 1, 16>(p, backward);
    }
    run_packs<S, 1, 0>(p, backward);
  });
}

}  // namespace

const char* sinkhorn_small(const comp_kernels_sinkhorn_small_params& params) { return run(params, false); }

const char* sinkhorn_small_backward(const comp_kernels_sinkhorn_small_params& params) { return run(params, true); }

}  // namespace comp_kernels::COMP_KERNELS_ISA
