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
  std::int64_t measure;
  const void *x, *gamma, *beta, *tau;
  void *mean, *moment;
  const void *r; // what is added before the activation, or null; r and dr at the strides of y and dx
  void *y;
  const void *dy;
  void *dx, *dr; // dr is written along with dx
  void *dgamma, *dbeta, *dtau; // float, or double where elements are
  double *deps;
};

namespace {

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
