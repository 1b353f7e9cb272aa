// What all kernels share: activations with their slopes, threads, element types.
//
// No torch or Python headers. Everything is in an unnamed namespace, so that each source file has
// its own copy, compiled for its own instruction set.

#pragma once

#include <type_traits>

#include "vector.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
static int omp_get_num_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

namespace {

// An activation, and whether a residual r is added before it: y = act(u + r). GATED is none, but has
// z sigmoid(tau z) in the place of z = x - mu, and no residual.
enum Act { NONE = 0, RELU = 1, SILU = 2, TLU = 3, ADDED = 4, GATED = 8 };
constexpr int plain(int act) { return act & 3; }
constexpr bool added(int act) { return act & ADDED; }
constexpr bool dear(int act) { return plain(act) == SILU || act == GATED; } // its slope takes long
constexpr bool with_tau(int act) { return plain(act) == TLU || act == GATED; }

// 2^r for r from 0 to 1, by a polynomial. Relative errors are under 2e-7 in float with the fifth degree,
// 3e-6 with the fourth, and 8e-5 with the third, a 25th of what rounding to bf16 may change.
template <int DEGREE, class X> inline X fraction_of_power(X r) {
  if constexpr (DEGREE == 3) {
    X p = r * 7.802452e-2f + 2.2606716e-1f;
    p = p * r + 6.9583354e-1f;
    return p * r + 9.9992522e-1f;
  }
  if constexpr (DEGREE == 4) {
    X p = r * 1.353417e-2f + 5.201146e-2f;
    p = p * r + 2.4144276e-1f;
    p = p * r + 6.9300383e-1f;
    return p * r + 1.00000259f;
  }
  X p = r * 1.867130079e-3f + 9.017030296e-3f;
  p = p * r + 5.579991313e-2f;
  p = p * r + 2.401644501e-1f;
  p = p * r + 6.931513118e-1f;
  return p * r + 1.0f;
}
// 2^t by that of what is over the whole number below; 0 below -126, infinity from 128 on, NaN for NaN.
template <int DEGREE, class X, class Bits> inline X power_of_two(X exponent) {
  const X zero{};
  X t = exponent < zero - 126.0f ? zero - 126.0f : exponent;
  t = t > zero + 128.0f ? zero + 128.0f : t;
  // 1.5 * 2^23: the sum is rounded to a whole number, which stands in its last bits.
  X shifted = (t - 0.5f) + 12582912.0f;
  X p = fraction_of_power<DEGREE, X>(t - (shifted - 12582912.0f));
  p *= same_bits<X>((same_bits<Bits>(shifted) + 127u) << 23);
  return exponent < zero - 126.0f ? zero : p;
}
#if !defined(__GNUC__)
template <int DEGREE = 5> inline float exp2_(float t) {
  return power_of_two<DEGREE, float, std::uint32_t>(t);
}
template <int DEGREE = 5> inline float exp_(float x) { return exp2_<DEGREE>(x * 1.44269504f); }
template <int DEGREE = 5> inline double exp_(double x) { return std::exp(x); }
#else
template <int DEGREE = 5> inline floats exp2_(floats t) {
#if NORMLAB_MASKS
  __m512 v = same_bits<__m512>(t); // what is over the whole number below; and that number's power
  floats r = same_bits<floats>(_mm512_maskz_reduce_ps(0xffff, v, 0x09));
  __m512 p = same_bits<__m512>(fraction_of_power<DEGREE, floats>(r));
  return same_bits<floats>(_mm512_maskz_scalef_ps(0xffff, p, v));
#else
  return power_of_two<DEGREE, floats, words>(t);
#endif
}
// With what rounding the exponent costs: a relative error of |x| 2^-24.
template <int DEGREE = 5> inline floats exp_(floats x) { return exp2_<DEGREE>(x * 1.44269504f); }
template <int DEGREE = 5> inline doubles exp_(doubles x) {
  for (i64 i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
  return x;
}
#endif

// Degrees where a result is rounded to an element at once, and where it is added to others.
template <class E> constexpr int FEW = PAIRED<V<E>> ? 3 : 5;
template <class E> constexpr int MORE = PAIRED<V<E>> ? 4 : 5;

// 1 / sigmoid(u), infinite where exp(-u) is. Errors of sigmoid are 1e-7 with the fifth degree, less
// where it is small.
template <int DEGREE = 5, class X> inline X over_sigmoid(X u) { return 1.0f + exp_<DEGREE>(-u); }

// u, tau and g are numbers, or vectors. NaN goes through, as torch has it. Of vectors of bf16 a result
// that is rounded at once needs fewer digits than one that is added to others.
template <int A, int DEGREE = 5, class X> inline X activate(X u, X tau) {
  if constexpr (PAIRED<X>) {
    return apart([](auto u, auto tau) { return activate<A, FEW<bf16>>(u, tau); }, u, tau);
  } else {
    const X zero{};
    constexpr int act = plain(A);
    if (act == RELU) return u <= zero ? zero : u;
    if (act == SILU) return u / over_sigmoid<DEGREE>(u);
    if (act == TLU) return u > tau ? u : (u != u ? u : tau);
    return u;
  }
}
// dL/du from dL/dy.
template <int A, int DEGREE = 5, class X> inline X slope(X u, X tau, X g) {
  if constexpr (PAIRED<X>) {
    return apart([](auto u, auto tau, auto g) { return slope<A, MORE<bf16>>(u, tau, g); }, u, tau, g);
  } else {
    const X zero{};
    constexpr int act = plain(A);
    if (act == RELU) return u <= zero ? zero : g;
    if (act == SILU) {
      X s = 1.0f / over_sigmoid<DEGREE>(u);
      return g * s * (1.0f + u * (1.0f - s));
    }
    if (act == TLU) return u <= tau ? zero : g;
    return g;
  }
}

// z, or z sigmoid(tau z); and with g = dL/dy, dL/du times its slope, and what goes to tau, but for du.
template <class X> struct Gate {
  X open, slope, tau;
};
template <int A, int DEGREE = 5, class X> inline X numerator(X z, X tau) {
  if constexpr (A != GATED) return z;
  else if constexpr (PAIRED<X>)
    return apart([](auto z, auto tau) { return numerator<A, FEW<bf16>>(z, tau); }, z, tau);
  else return z / over_sigmoid<DEGREE>(tau * z);
}
template <int DEGREE = 5, class X> inline Gate<X> gate_slopes(X z, X tau, X g) {
  if constexpr (PAIRED<X>) {
    const auto even = gate_slopes<MORE<bf16>>(z.even, tau.even, g.even);
    const auto odd = gate_slopes<MORE<bf16>>(z.odd, tau.odd, g.odd);
    return {{even.open, odd.open}, {even.slope, odd.slope}, {even.tau, odd.tau}};
  } else {
    const X zero{};
    X u = tau * z, e = exp_<DEGREE>(-u), gate = 1.0f / (1.0f + e), open = z * gate;
    X inside = g * open * (u > zero ? e * gate : 1.0f - gate); // neither cancels, nor is inf times 0
    return {open, g * gate + inside * tau, inside * z};
  }
}

// from - z k; where k is 0, what z holds does not matter, be it NaN.
template <class X> inline X less_through(X from, X z, X k) {
  return apart(
      [](auto from, auto z, auto k) {
        const decltype(from) zero{};
        return k != zero ? from - z * k : from;
      },
      from, z, k);
}

// Whether a variance from sums of z and z^2 about some number is none: the mean lies more than 4
// deviations from it, so that digits cancel, or squares overflow R.
inline bool cancels(double sum, double squares, double count) {
  constexpr double most = std::numeric_limits<double>::max();
  const double square = sum * sum;
  return (square > 16.0 * (squares * count - square)) | ((squares > most) & (square <= most));
}

// One copy of the body, whether threads share it or not.
template <class F>
#if defined(__GNUC__)
__attribute__((noinline))
#endif
void range(i64 from, i64 to, const F &body) {
  body(from, to);
}

// body(from, to) for all under `count`, shared out among threads. One alone goes without OpenMP,
// which ends even that with a call of the system, for longer than a small layer takes.
template <class F> void share_ranges(i64 count, const F &body) {
  if (count <= 1 || omp_get_max_threads() == 1) return range(0, count, body);
#pragma omp parallel
  {
    const i64 threads = omp_get_num_threads(), me = omp_get_thread_num();
    range(count * me / threads, count * (me + 1) / threads, body);
  }
}

// body(i) for all under `count`, likewise.
template <class F> void share(i64 count, const F &body) {
  share_ranges(count, [&](i64 from, i64 to) {
    for (i64 i = from; i < to; i++) body(i);
  });
}

// f(row, count), four rows at a time where they have `most` bytes or fewer and share what is read of
// each channel. Four long ones would be four streams, which the prefetcher of a processor does not
// follow.
template <class T, class F> inline void row_by_row(i64 rows, i64 c, F f, i64 most = 128) {
  const bool narrow = c * i64(sizeof(T)) <= most;
  i64 r = 0;
  for (; r + 4 <= rows && narrow; r += 4) f(r, std::integral_constant<int, 4>{});
  for (; r < rows; r++) f(r, std::integral_constant<int, 1>{});
}

// f(row, count) for tiles of rows that are summed a vector of channels at a time, row after row, so
// that sums stay in registers. Rows of a tile are asked for one tile ahead, which a first-level cache
// holds along with the same of a second tensor.
template <class T, class F> inline void tile_by_tile(i64 rows, i64 c, F f) {
  constexpr i64 most = 16, bytes = 8 << 10;
  const i64 tile = std::max<i64>(1, std::min(most, bytes / std::max<i64>(1, c * i64(sizeof(T)))));
  for (i64 r = 0; r < rows; r += tile) f(r, std::min(tile, rows - r));
}

// Zeros, from the start of a line of memory on: vectors that cross lines take longer.
template <class R> class Zeros {
  std::vector<R> room;

public:
  explicit Zeros(i64 count) : room(std::size_t(count) + 64 / sizeof(R)) {}
  R *data() {
    return room.data() + (64 - reinterpret_cast<std::uintptr_t>(room.data()) % 64) % 64 / sizeof(R);
  }
};

// Writes numbers as R, or as bf16 where they are narrow.
template <class R> void written(const double *from, i64 n, bool narrow, void *to) {
  if (narrow)
    for (i64 i = 0; i < n; i++) store(static_cast<bf16 *>(to), i, float(from[i]));
  else
    std::copy(from, from + n, static_cast<R *>(to));
}

// f(an element) by number of its type: 0 float32, 1 float64, 2 bfloat16. Returns what f does, or 1
// for another type, 2 without memory.
template <class F> int typed(int dtype, F f) noexcept {
  try {
    if (dtype == 0) return f(float{});
    if (dtype == 1) return f(double{});
    if (dtype == 2) return f(bf16{});
    return 1;
  } catch (...) {
    return 2;
  }
}

} // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
