// What all kernels share: element types, activations with their slopes, pooled moments.
//
// No torch or Python headers. Everything is in an unnamed namespace, so that each source file has
// its own copy, compiled for its own instruction set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

namespace {

using i64 = std::int64_t;

struct bf16 {
  std::uint16_t bits;
};

template <class T> struct Math { using type = float; };
template <> struct Math<double> { using type = double; };

inline float load(const float *p, i64 i) { return p[i]; }
inline double load(const double *p, i64 i) { return p[i]; }
inline float load(const bf16 *p, i64 i) {
  std::uint32_t wide = std::uint32_t(p[i].bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}
inline void store(float *p, i64 i, float v) { p[i] = v; }
inline void store(double *p, i64 i, double v) { p[i] = v; }
inline void store(bf16 *p, i64 i, float v) {
  std::uint32_t w;
  std::memcpy(&w, &v, 4);
  // Nearest, ties to even. A NaN stays one: its payload comes from bfloat16 or is the default, so
  // that the addition cannot carry into the sign.
  p[i].bits = std::uint16_t((w + 0x7fffu + ((w >> 16) & 1u)) >> 16);
}

enum Act { NONE = 0, RELU = 1, SILU = 2, TLU = 3 };

// exp by 2^n * polynomial, so that loops vectorize without a vector library; relative error
// under 2 ulp in float, where -87 < x < 88.3; exp(-87) below, infinity from there or 88.7 on, NaN
// for NaN.
inline float exp_(float x) {
  x = std::min(std::max(x, -87.0f), 88.7f);
  // 1.5 * 2^23: the sum is rounded to a whole number, which stands in its last bits.
  float shifted = x * 1.44269504088896341f + 12582912.0f;
  float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}
inline double exp_(double x) { return std::exp(x); }

template <int A, class R> inline R activate(R u, R tau) {
  if (A == RELU) return u > R(0) || u != u ? u : R(0);
  if (A == SILU) return u / (R(1) + exp_(-u));
  if (A == TLU) return u > tau || u != u ? u : tau;
  return u;
}
// dL/du from dL/dy.
template <int A, class R> inline R slope(R u, R tau, R g) {
  if (A == RELU) return u <= R(0) ? R(0) : g; // NaN lets through, as torch has it
  if (A == SILU) {
    R s = R(1) / (R(1) + exp_(-u));
    return g * s * (R(1) + u * (R(1) - s));
  }
  if (A == TLU) return u <= tau ? R(0) : g;
  return g;
}

struct Moment {
  double count = 0, mean = 0, m2 = 0;
  void add(double k, double mu, double sq) {
    if (k == 0) return;
    double total = count + k, delta = mu - mean;
    mean += delta * k / total;
    m2 += sq + delta * delta * count * k / total;
    count = total;
  }
};

} // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
