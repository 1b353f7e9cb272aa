// The record that the Python side fills in; kept in step with kernels/cpu/library.py.

#pragma once

#include <cstdint>

struct Call {
  std::int64_t n, c, p;                    // samples, channels, positions
  std::int64_t bn, bc;                     // samples and channels of an area
  std::int64_t xn, xc, xp, gn, gc, gp, yn, yc, yp; // strides of x, of dy, and of y or dx
  std::int64_t mn, mg, mp; // of statistics of single positions: of samples, groups, positions
  std::int64_t columns, act, shift, about_mean, scale, measure, from_batch;
  double eps, power, factor; // of deviations k (M + eps)^(1/p): eps, p and k
  const void *x, *dy, *gamma, *beta, *tau;
  void *mean, *moment, *y, *dx;
  double *dgamma, *dbeta, *dtau, *deps;
};
