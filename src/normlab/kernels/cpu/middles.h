// What lies between the moments of maps and the coefficients of their curves: areas that several
// maps share, made of the maps' moments, and the way back from the gradient of the coefficients.
//
// In double; R stands for the type of statistics. Numbers of maps lie sample by sample.

#pragma once

#include "common.h"

namespace {

// Kept in step with kernels/cpu/maps.py.
struct Middle {
  i64 order;      // of a mixture: parts in the order of their logits, a digit to the base of 4 each,
                  // the first lowest: 1 maps, 2 samples, 3 channels
  i64 narrow;     // whether parameters and their gradients are bf16
  double eps;
  double correction; // of the variance of a map where it stands for itself
  const void *mean, *variance;               // of maps
  const void *stored_mean, *stored_variance; // of channels in the place of the batch's, or null
  const void *gamma, *beta, *v;              // of channels, or null
  const void *mean_logits, *variance_logits; // of the parts of a mixture
  void *batch_mean, *batch_variance;         // of channels over the batch, or null if not wanted
  void *dgamma, *dbeta, *dv, *dmean_logits, *dvariance_logits; // null if not wanted
};

using Reals = std::vector<double>;

template <class R> Reals parameter(const void *from, i64 n, bool narrow, double none) {
  Reals to(std::size_t(n), none);
  if (from && narrow)
    for (i64 i = 0; i < n; i++) to[i] = double(load(static_cast<const bf16 *>(from), i));
  else if (from)
    for (i64 i = 0; i < n; i++) to[i] = double(static_cast<const R *>(from)[i]);
  return to;
}
template <class R> void returned(const Reals &from, bool narrow, void *to) {
  if (to) written<R>(from.data(), i64(from.size()), narrow, to);
}

// Moments of areas, and what has reached them from the coefficients.
struct Areas {
  Reals mean, variance, dmean, dvariance;
  explicit Areas(i64 n) : mean(n), variance(n), dmean(n), dvariance(n) {}
};

// Of N x C maps.
template <class R> struct Moments {
  i64 n, c;
  const R *mean, *variance;

  void over_samples(Areas &of) const {
    for (i64 i = 0; i < n; i++)
#pragma omp simd
      for (i64 j = 0; j < c; j++) of.mean[j] += double(mean[i * c + j]);
    for (double &m : of.mean) m /= double(n);
    for (i64 i = 0; i < n; i++)
#pragma omp simd
      for (i64 j = 0; j < c; j++) {
        double off = double(mean[i * c + j]) - of.mean[j];
        of.variance[j] += double(variance[i * c + j]) + off * off;
      }
    for (double &v : of.variance) v /= double(n);
  }
  void over_channels(Areas &of) const {
    for (i64 i = 0; i < n; i++) {
      const R *m = mean + i * c, *v = variance + i * c;
      double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 j = 0; j < c; j++) sum += double(m[j]);
      const double middle = sum / double(c);
#pragma omp simd reduction(+ : squares)
      for (i64 j = 0; j < c; j++) {
        double off = double(m[j]) - middle;
        squares += double(v[j]) + off * off;
      }
      of.mean[i] = middle, of.variance[i] = squares / double(c);
    }
  }
};

// Where the batch's part is stored, it is a constant; what is wanted of the batch is left all the same.
template <class R> struct Batch : Areas {
  bool fixed;
  Batch(const Middle &m, const Moments<R> &maps, bool used) : Areas(maps.c), fixed(m.stored_variance) {
    if (m.batch_variance || (used && !fixed)) maps.over_samples(*this);
    returned<R>(mean, false, m.batch_mean), returned<R>(variance, false, m.batch_variance);
    if (fixed)
      mean = parameter<R>(m.stored_mean, maps.c, false, 0),
      variance = parameter<R>(m.stored_variance, maps.c, false, 0);
    else if (!used)
      mean.assign(maps.c, 0), variance.assign(maps.c, 0);
  }
};

// y = gamma (x - sum_k w_k mu_k) / sqrt(sum_k v_k var_k + eps) + beta, w and v softmax weights; so that
// a = gamma s, b = a t + beta, s = 1 / sqrt(...), t = sum_k w_k (mu - mu_k).
template <class R> class Mixture {
  const Middle &m;
  const Moments<R> maps;
  double w[4] = {}, v[4] = {}; // of maps, samples and channels, from 1 on
  Areas samples;
  Batch<R> batch;
  const Reals gamma, beta;

  const bool has_own;

  int part(i64 k) const { return int(m.order >> (2 * k)) & 3; }
  i64 parts() const { return (part(0) != 0) + (part(1) != 0) + (part(2) != 0); }
  bool has(int which) const { return part(0) == which || part(1) == which || part(2) == which; }
  // Of channel j of sample i: its mean less those of sample and batch, what t is, its variance, and
  // what stands under the root. What has no part is not there, even if it is NaN.
  struct Point {
    double off2, off3, t, own, inside;
  };
  Point point(i64 i, i64 j) const {
    const i64 map = i * maps.c + j;
    const double mu = double(maps.mean[map]), own = has_own ? double(maps.variance[map]) : 0.0;
    const double off2 = mu - samples.mean[i], off3 = mu - batch.mean[j];
    const double mixed = v[1] * own + v[2] * samples.variance[i] + v[3] * batch.variance[j];
    return {off2, off3, w[2] * off2 + w[3] * off3, own, mixed + m.eps};
  }
  void share(const void *logits, double *to) const {
    const Reals of = parameter<R>(logits, parts(), m.narrow, 0);
    double most = of[0], sum = 0;
    for (double l : of) most = l > most ? l : most;
    for (double l : of) sum += std::exp(l - most);
    for (i64 k = 0; k < parts(); k++) to[part(k)] = std::exp(of[k] - most) / sum;
  }
  // To logits, from what has reached the shares.
  void unshare(const double *shares, const double *slopes, void *to) const {
    double mean = 0;
    for (int k = 1; k < 4; k++) mean += shares[k] * slopes[k];
    Reals found(std::size_t(parts()), 0.0);
    for (i64 k = 0; k < parts(); k++) found[k] = shares[part(k)] * (slopes[part(k)] - mean);
    returned<R>(found, m.narrow, to);
  }

public:
  static constexpr i64 coefficients = 2;
  Mixture(const Middle &given, i64 n, i64 c)
      : m(given), maps{n, c, static_cast<const R *>(m.mean), static_cast<const R *>(m.variance)},
        samples(n), batch(m, maps, has(3)),
        gamma(parameter<R>(m.gamma, c, m.narrow, 1)),
        beta(parameter<R>(m.beta, c, m.narrow, 0)), has_own(has(1)) {
    share(m.mean_logits, w), share(m.variance_logits, v);
    if (has(2)) maps.over_channels(samples);
  }

  // Fills a and b, one number a map, one after the other.
  void fill(R *to) const {
    R *a = to, *b = to + maps.n * maps.c;
    for (i64 i = 0; i < maps.n; i++)
#pragma omp simd
      for (i64 j = 0; j < maps.c; j++) {
        const Point at = point(i, j);
        const double scale = gamma[j] / std::sqrt(at.inside);
        a[i * maps.c + j] = R(scale), b[i * maps.c + j] = R(scale * at.t + beta[j]);
      }
  }

  // From sums of the gradients of a and b on each map, the gradients of its mean, over m, and of its
  // variance, times 2 / m: h and k of maps.cpp, of a line about the map's mean. And of parameters.
  void pull(const R *sums, const R *of, i64 members, R *k, R *h) {
    const i64 n = maps.n, c = maps.c;
    Reals dt(std::size_t(n * c)), dinside(std::size_t(n * c)), dgamma(std::size_t(c), 0.0);
    Reals dbeta = dgamma;
    double dw[4] = {}, dv[4] = {};
    for (i64 i = 0; i < n; i++) {
      double to_mean = 0, to_variance = 0, dw2 = 0, dw3 = 0, dv1 = 0, dv3 = 0;
#pragma omp simd reduction(+ : to_mean, to_variance, dw2, dw3, dv1, dv3)
      for (i64 j = 0; j < c; j++) {
        const i64 map = i * c + j;
        const double da = double(sums[map]), db = double(sums[n * c + map]);
        const Point at = point(i, j);
        const double s = 1.0 / std::sqrt(at.inside), ds = da + db * at.t;
        const double step = gamma[j] * s * db, slope = -0.5 * gamma[j] * ds * s * s * s;
        dgamma[j] += s * ds, dbeta[j] += db;
        dt[map] = step, dinside[map] = slope;
        to_mean += step, to_variance += slope;
        dw2 += step * at.off2, dw3 += step * at.off3;
        dv1 += slope * at.own, dv3 += slope * batch.variance[j];
        batch.dmean[j] += step, batch.dvariance[j] += slope;
      }
      samples.dmean[i] = to_mean, samples.dvariance[i] = to_variance;
      dw[2] += dw2, dw[3] += dw3, dv[1] += dv1, dv[3] += dv3;
      dv[2] += to_variance * samples.variance[i];
    }
    // 0 even where what was summed is NaN
    if (!has(2)) samples.dmean.assign(n, 0), samples.dvariance.assign(n, 0);
    if (!has(3) || batch.fixed) batch.dmean.assign(c, 0), batch.dvariance.assign(c, 0);
    const double s2 = v[2] / double(c), s3 = v[3] / double(n), all = double(members);
    const double m2 = w[2] / double(c), m3 = w[3] / double(n);
    for (i64 i = 0; i < n; i++) {
      const double from_mean = samples.dmean[i], from = samples.dvariance[i];
#pragma omp simd
      for (i64 j = 0; j < c; j++) {
        const i64 map = i * c + j;
        const double g2 = s2 * from, g3 = s3 * batch.dvariance[j];
        const Point at = point(i, j);
        double dmean = (w[2] + w[3]) * dt[map] - m2 * from_mean - m3 * batch.dmean[j];
        // where nothing flows, it does not matter that a mean is NaN
        dmean += g2 != 0.0 ? 2.0 * g2 * at.off2 : 0.0;
        dmean += g3 != 0.0 ? 2.0 * g3 * at.off3 : 0.0;
        const double dvariance = (has_own ? v[1] * dinside[map] : 0.0) + g2 + g3;
        h[map] = R((dmean - double(of[map]) * double(sums[n * c + map])) / all);
        k[map] = R(dvariance * 2.0 / all);
      }
    }
    returned<R>(dgamma, m.narrow, m.dgamma);
    returned<R>(dbeta, m.narrow, m.dbeta);
    if (m.dmean_logits) unshare(w, dw, m.dmean_logits);
    if (m.dvariance_logits) unshare(v, dv, m.dvariance_logits);
  }
};

// y = gamma x / max(d, v x + s) + beta, d the batch's deviation of a channel, s that of the map.
template <class R> class Wider {
  const Middle &m;
  const Moments<R> maps;
  Batch<R> batch;
  const Reals gamma, beta, v;

  double own(i64 map) const {
    return std::sqrt(m.correction * double(maps.variance[map]) + m.eps);
  }
  double shared(i64 j) const { return std::sqrt(batch.variance[j] + m.eps); }

public:
  static constexpr i64 coefficients = 5;
  Wider(const Middle &given, i64 n, i64 c)
      : m(given), maps{n, c, static_cast<const R *>(m.mean), static_cast<const R *>(m.variance)},
        batch(m, maps, true), gamma(parameter<R>(m.gamma, c, m.narrow, 1)),
        beta(parameter<R>(m.beta, c, m.narrow, 0)),
        v(parameter<R>(m.v, c, m.narrow, 0)) {}

  void fill(R *to) const {
    const i64 all = maps.n * maps.c;
    R *a = to, *b = a + all, *slope = b + all, *d = slope + all, *s = d + all;
    Reals deviation(std::size_t(maps.c), 0.0);
    for (i64 j = 0; j < maps.c; j++) deviation[j] = shared(j);
    for (i64 i = 0; i < maps.n; i++)
#pragma omp simd
      for (i64 j = 0; j < maps.c; j++) {
        const i64 map = i * maps.c + j;
        a[map] = R(gamma[j]), b[map] = R(beta[j]), slope[map] = R(v[j]), d[map] = R(deviation[j]);
        s[map] = R(own(map));
      }
  }

  void pull(const R *sums, const R *, i64 members, R *k, R *h) {
    const i64 n = maps.n, c = maps.c, all = n * c;
    Reals dgamma(std::size_t(c), 0.0), dbeta = dgamma, dv = dgamma;
    for (i64 i = 0; i < n; i++)
#pragma omp simd
      for (i64 j = 0; j < c; j++) {
        const R *sum = sums + i * c + j;
        dgamma[j] += double(sum[0]), dbeta[j] += double(sum[all]), dv[j] += double(sum[2 * all]);
        batch.dvariance[j] += double(sum[3 * all]);
      }
    // d sqrt(c x + eps) / dx = c / (2 sqrt(c x + eps)), of samples and, over these, of the batch
    for (i64 j = 0; j < c; j++) {
      double &rate = batch.dvariance[j];
      rate = batch.fixed ? 0.0 : rate / shared(j) * (0.5 / double(n));
    }
    for (i64 i = 0; i < n; i++)
#pragma omp simd
      for (i64 j = 0; j < c; j++) {
        const i64 map = i * c + j;
        const double slope = double(sums[4 * all + map]) / own(map) * (0.5 * m.correction);
        const double off = double(maps.mean[map]) - batch.mean[j], rate = batch.dvariance[j];
        h[map] = R(batch.fixed ? 0.0 : 2.0 * rate * off / double(members));
        k[map] = R((slope + rate) * 2.0 / double(members));
      }
    returned<R>(dgamma, m.narrow, m.dgamma);
    returned<R>(dbeta, m.narrow, m.dbeta);
    returned<R>(dv, m.narrow, m.dv);
  }
};

} // namespace
