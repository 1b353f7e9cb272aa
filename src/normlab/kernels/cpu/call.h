// The record that the Python side fills in, kept in step with kernels/cpu/library.py; and the
// kernels that it asks for.

#pragma once

#include "common.h"

struct Call {
  std::int64_t n, c, p;                    // samples, channels, positions
  std::int64_t bn, bc;                     // samples and channels of an area
  std::int64_t xn, xc, xp, gn, gc, gp, yn, yc, yp; // strides of x, of dy, and of y or dx
  std::int64_t mn, mg, mp; // of statistics of single positions: of samples, groups, positions
  std::int64_t columns, act, shift, about_mean, scale, from_batch;
  double power, factor, eps; // of deviations k (M + eps)^(1/p): p, k and eps
  // Of calls on tensors of one shape and order of memory, all above but eps is the same.
  std::int64_t flags;
  const void *x, *gamma, *beta, *tau;
  void *mean, *moment;
  const void *r; // what is added before the activation, or null; r and dr at the strides of y and dx
  void *y;
  const void *dy;
  void *dx, *dr; // dr is written along with dx
  void *dgamma, *dbeta, *dtau; // of the types of gamma, beta and tau
  double *deps;
  // Corrections towards other statistics, of areas that are channels: r = clip(D / std, 1 / rmax, rmax)
  // and d = clip((mu - mean) / std, -dmax, dmax), where gamma r stands for gamma and beta + gamma d for
  // beta. Written forward, where there are a mean and a std, and read backward.
  const void *old_mean, *old_std;
  void *corr_r, *corr_d;
  double rmax, dmax;
};

namespace {

// Whether to measure statistics; and which parameters, with their gradients, are bf16 where others
// are float, or double where elements are.
enum Flag { MEASURE = 1, GAMMA = 2, BETA = 4, TAU = 8 };

// Parameters, one R a channel, with what stands for those that there are not.
template <class R> class Affine {
  std::vector<R> room;
  const R *of(const Call &k, Flag which, const void *given, R none, i64 place) {
    if (given && !(k.flags & which)) return static_cast<const R *>(given);
    R *to = room.data() + place * k.c;
    for (i64 c = 0; c < k.c; c++) to[c] = given ? R(load(static_cast<const bf16 *>(given), c)) : none;
    return to;
  }

public:
  const R *gamma, *beta, *tau;
  explicit Affine(const Call &k)
      : room(std::size_t(3 * k.c)), gamma(of(k, GAMMA, k.gamma, R(1), 0)),
        beta(of(k, BETA, k.beta, R(0), 1)), tau(of(k, TAU, k.tau, R(0), 2)) {
    if (!k.corr_r || k.old_std) return;
    const R *r = static_cast<const R *>(k.corr_r), *d = static_cast<const R *>(k.corr_d);
    R *a = room.data(), *b = a + k.c;
    for (i64 c = 0; c < k.c; c++) {
      const R scale = gamma[c];
      a[c] = scale * r[c], b[c] = beta[c] + scale * d[c];
    }
    gamma = a, beta = b;
  }
  Affine(const Affine &) = delete;
};

// The gradient of a parameter, from one sum a channel.
template <class R> void give(const Call &k, Flag which, const double *sums, void *into) {
  if (into) written<R>(sums, k.c, k.flags & which, into);
}

// Where there is one position, both orders are one, and columns have the longer loops.
inline bool in_columns(const Call &k) {
  bool one = k.p == 1 && k.xc == 1 && (!k.dy || k.gc == 1) && ((!k.y && !k.dx) || k.yc == 1);
  return k.columns || one;
}

// f(activation, element), the activation as a type that has it as its value. Returns 0, or what
// `typed` does.
template <class F> int chosen(const Call &k, int dtype, F f) noexcept {
  return typed(dtype, [&](auto element) {
    switch (k.act | (k.r ? ADDED : 0)) {
    case RELU: f(std::integral_constant<int, RELU>{}, element); break;
    case SILU: f(std::integral_constant<int, SILU>{}, element); break;
    case TLU: f(std::integral_constant<int, TLU>{}, element); break;
    case ADDED: f(std::integral_constant<int, ADDED>{}, element); break;
    case ADDED | RELU: f(std::integral_constant<int, ADDED | RELU>{}, element); break;
    case ADDED | SILU: f(std::integral_constant<int, ADDED | SILU>{}, element); break;
    case ADDED | TLU: f(std::integral_constant<int, ADDED | TLU>{}, element); break;
    default: f(std::integral_constant<int, NONE>{}, element);
    }
    return 0;
  });
}

} // namespace
