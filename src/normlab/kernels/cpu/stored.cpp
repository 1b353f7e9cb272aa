// Stored statistics moved towards those of a batch, all of a layer in one call.

#include "common.h"

namespace {

// old + weight (new - old), as torch::lerp has it, bit for bit; f times what was measured is new, of
// several areas a number their mean.
template <class R>
int blend(i64 n, i64 areas, R weight, const R *const *measured, const double *factors,
          R *const *stored, int kinds) {
  // Products are rounded in memory, so that no compiler joins them with the differences below.
  std::vector<R> fresh(std::size_t(kinds * n));
  R poor = 0; // a difference of a number from itself is 0 only of finite ones
  for (int k = 0; k < kinds; k++) {
    const R f = R(factors[k]);
    const double each = 1.0 / double(areas);
    for (i64 i = 0; i < n; i++) {
      R value = measured[k][i];
      if (areas > 1) {
        double sum = 0;
        for (i64 j = 0; j < areas; j++) sum += double(measured[k][j * n + i]);
        value = R(sum * each);
      }
      value *= f;
      fresh[k * n + i] = value;
      poor += value - value;
    }
  }
  if (poor != R(0)) return 3;
  for (int k = 0; k < kinds; k++) {
    const R *value = fresh.data() + k * n;
    R *to = stored[k];
    for (i64 i = 0; i < n; i++) {
      R step = value[i] - to[i];
      to[i] = weight < R(0.5) ? to[i] + weight * step : value[i] + (weight - R(1)) * step;
    }
  }
  return 0;
}

} // namespace

// Two kinds of statistics, of which the second may be absent: measured numbers, their factor, and
// those stored; and the count of batches.
struct Blend {
  i64 n, areas; // stored numbers of each kind, and measured ones for each, n apart
  double weight;
  const void *m0;
  double f0;
  void *s0;
  const void *m1;
  double f1;
  void *s1;
  i64 *count;
};

// Returns 0; 3 where something is not finite, or 2 without memory: all is then as it was.
EXPORT int normlab_blend(const Blend *b, int dtype) noexcept {
  const double factors[] = {b->f0, b->f1};
  const int failed = typed(dtype, [&](auto element) {
    using R = typename Math<decltype(element)>::type;
    const R *measured[] = {static_cast<const R *>(b->m0), static_cast<const R *>(b->m1)};
    R *stored[] = {static_cast<R *>(b->s0), static_cast<R *>(b->s1)};
    return blend<R>(b->n, b->areas, R(b->weight), measured, factors, stored, b->m1 ? 2 : 1);
  });
  if (!failed) ++*b->count;
  return failed;
}
