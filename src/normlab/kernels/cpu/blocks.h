// Areas that are blocks of samples and channels with all their positions: their shape, statistics,
// and the coefficients that the innermost loops take.

#pragma once

#include "loops.h"

namespace {

struct Shape {
  i64 n, c, p;       // samples, channels, positions
  i64 bn, bc;        // samples and channels of an area
  i64 groups() const { return c / bc; }
  i64 area(i64 in, i64 ic) const { return in / bn * groups() + ic / bc; }
  i64 members() const { return bn * bc * p; }
};

// Elements from one sample, channel and position to the next.
struct Strides {
  i64 n, c, p;
  i64 row(i64 in, i64 ic) const { return in * n + ic * c; }
  i64 column(i64 in, i64 ip) const { return in * n + ip * p; }
};

struct Op {
  bool shift;      // whether the mean is subtracted
  bool about_mean; // whether squares are about the mean
  bool scale;      // whether there is a deviation at all
  bool from_batch; // whether statistics are those of x, so that gradients flow through them
  bool gated;      // whether sums for tau still want the factor of dL/du
  double eps;
  bool uses_mean() const { return shift || (scale && about_mean); }
};

// Corrections of areas that are channels, if there is a std; see call.h.
template <class R> struct Corrections {
  const R *mean, *std;
  R *r, *d;
  double rmax, dmax;
  static double clip(double x, double least, double most) {
    return x < least ? least : x > most ? most : x; // NaN stays
  }
};

template <class T, class R> struct Job {
  Shape s;
  Strides xs, gs, ys;           // of x, of dy, and of y or dx
  Op op;
  const T *x;
  R *mean, *moment;             // one each an area
  const R *gamma, *beta, *tau;  // one each a channel
  double *deps;                 // one each an area, or null
  const T *r;                   // a residual, or null
  T *dr;                        // its gradient, or null
  Corrections<R> corrections;
};

constexpr i64 TASKS = 32;       // that threads share out
constexpr i64 CHUNK = 8192;     // elements summed in R before the sum goes to double
constexpr i64 BLOCK = 4 << 20;  // bytes that stay in a shared cache between two passes
constexpr i64 RUN = 32 << 10;   // bytes of a run that a prefetcher can follow
// Bytes read before they are written: no more, so that reading and writing memory overlap.
constexpr i64 NEAR = 4096;
constexpr i64 KEPT = 1 << 16;   // slopes of a block that are kept between two passes

// Channels taken together, so that a block stays in cache between two passes.
template <class T> i64 block_channels(const Shape &s) {
  i64 row = std::max<i64>(1, s.p * i64(sizeof(T)));
  i64 wanted = NEAR / row;
  if (s.bn > 1) {
    wanted = std::max(BLOCK / (s.bn * row), std::max<i64>(1, RUN / row));
    wanted = std::min(wanted, std::max<i64>(1, s.c / std::max(1, omp_get_max_threads())));
  }
  return std::min(std::max(wanted / s.bc, i64(1)) * s.bc, s.c);
}

// Working memory for a block of channels.
template <class R> struct Room {
  i64 padded;         // channels, as many as fill vectors of any elements: those of bf16 are longest
  Lines<R> l;         // coefficients of each channel
  R *shift, *origin;  // of each channel and of each area, about which moments are taken
  R *lanes;           // sums in R
  double *s[3];       // sums of each run or channel, one kind after the other
  double *mean, *moment, *inverse; // of each area
  std::vector<char> dots; // whether second sums of the gradient are of g x, and not yet of g (x - mu)
  R *kept = nullptr;               // slopes of each element, if there is room for any

  // Of sums, so many for each channel and so many beside.
  Room(i64 channels, i64 kinds, i64 more, i64 slopes = 0)
      : padded(in_vectors<bf16>(channels)), dots(std::size_t(channels)) {
    constexpr i64 line = 64 / i64(sizeof(R));
    const i64 sums = (kinds * padded + more + line - 1) / line * line;
    short_ = Zeros<R>(10 * padded + sums + slopes);
    long_.resize(8 * channels);
    R *next = short_.data();
    for (R **p : {&l.mu, &l.a, &l.b, &l.tau, &l.p1, &l.mub, &l.k, &l.h, &shift, &origin, &lanes})
      *p = next, next += padded;
    if (slopes) kept = lanes + sums;
    double *from = long_.data();
    for (double **p : {&s[0], &s[1], &s[2], &mean, &moment, &inverse, &weighted[0], &weighted[1]})
      *p = from, from += channels;
  }
  double *weighted[2]; // sums of each area, with the weights of its channels

private:
  Zeros<R> short_{0};
  std::vector<double> long_;
};

// f(channel, area) for the channels of areas, so that loops are long.
template <class F> inline void each_channel(i64 areas, i64 bc, F f) {
  if (bc == 1) {
#pragma omp simd
    for (i64 g = 0; g < areas; g++) f(g, g);
    return;
  }
  for (i64 g = 0; g < areas; g++)
#pragma omp simd
    for (i64 j = 0; j < bc; j++) f(g * bc + j, g);
}

// Where sums of g x serve for those of g (x - mu): where means are within 4 deviations, so that few
// digits cancel, and these no tiny numbers; of areas together, where all are so.
template <class T, class R>
inline void choose_sums(const Job<T, R> &job, i64 areas, bool together, Room<R> &room) {
  if (!DOTTED<T>) return;
  bool all = true;
  for (i64 g = 0; g < areas; g++) {
    const double mean = job.op.shift ? room.mean[g] : 0.0, square = mean * mean;
    const double about_zero = job.op.about_mean ? 0.0 : square;
    const bool near = room.moment[g] - about_zero >= std::max(square / 16, 0x1p-100);
    room.dots[g] = near && job.op.scale;
    all &= room.dots[g] != 0;
  }
  if (together) std::fill(room.dots.begin(), room.dots.begin() + areas, all);
}

template <class R> inline void invert(const Op &op, i64 areas, Room<R> &room) {
  double *inverse = room.inverse;
  const double *moment = room.moment, eps = op.eps;
  if (!op.scale) return std::fill(inverse, inverse + areas, 1.0);
#pragma omp simd
  for (i64 g = 0; g < areas; g++) inverse[g] = 1.0 / std::sqrt(moment[g] + eps);
}

// Statistics of areas from sums about `origin`, of `each` runs or channels an area; kept from
// `first` on. True where digits cancel: then `origin` is nearer, and sums are wanted again.
template <class T, class R>
bool settle(const Job<T, R> &job, i64 first, i64 areas, i64 each, bool second, Room<R> &room) {
  const Op &op = job.op;
  if (each > 1)
    for (int k = 0; k < 2; k++)
      for (i64 g = 0; g < areas; g++) {
        double sum = 0;
        for (i64 j = 0; j < each; j++) sum += room.s[k][g * each + j];
        room.s[k][g] = sum;
      }
  const double count = double(job.s.members());
  const bool centred = op.uses_mean();
  const double about_zero = op.about_mean || !centred ? 0.0 : 1.0;
  double *mean = room.mean, *moment = room.moment;
  const double *s0 = room.s[0], *s1 = room.s[1];
  R *origin = room.origin;
  if (centred) {
    int poor = 0;
#pragma omp simd reduction(+ : poor)
    for (i64 g = 0; g < areas; g++) {
      double delta = s0[g] / count, square = s1[g] - delta * s0[g];
      mean[g] = double(origin[g]) + delta;
      poor += cancels(s0[g], s1[g], count) | lost<T>(s0[g], s1[g], count);
      square = square < 0.0 ? 0.0 : square;
      moment[g] = square / count + about_zero * mean[g] * mean[g];
    }
    if (poor && !second) {
      for (i64 g = 0; g < areas; g++)
        if (lost<T>(s0[g], s1[g], count)) origin[g] = next_origin<R>(mean[g]);
        else if (cancels(s0[g], s1[g], count)) origin[g] = R(mean[g]);
      return true;
    }
  } else {
    bool again = false;
    for (i64 g = 0; g < areas && !second; g++)
      if (lost<T>(s0[g], s1[g], count)) again = true, origin[g] = next_origin<R>(0);
    if (again) return true;
#pragma omp simd
    for (i64 g = 0; g < areas; g++) mean[g] = 0.0, moment[g] = s1[g] / count;
  }
  invert(op, areas, room);
  if (centred)
    for (i64 g = 0; g < areas; g++) job.mean[first + g] = R(mean[g]);
  if (op.scale)
    for (i64 g = 0; g < areas; g++) job.moment[first + g] = R(moment[g]);
  return false;
}

// Statistics of areas as they were kept.
template <class T, class R>
void given(const Job<T, R> &job, i64 first, i64 areas, Room<R> &room) {
  const bool centred = job.op.uses_mean(), scale = job.op.scale;
  for (i64 g = 0; g < areas; g++) {
    room.mean[g] = centred ? double(job.mean[first + g]) : 0.0;
    room.moment[g] = scale ? double(job.moment[first + g]) : 1.0;
  }
  invert(job.op, areas, room);
}

// u = (x - mu) a + b for each channel
template <class T, class R> void lines(const Job<T, R> &job, i64 c0, i64 areas, Room<R> &room) {
  const Lines<R> l = room.l;
  const R *gamma = job.gamma + c0, *beta = job.beta + c0, *tau = job.tau + c0;
  const double *mean = room.mean, *inverse = room.inverse;
  const bool moves = job.op.shift;
  const Corrections<R> &to = job.corrections;
  if (to.std) { // areas are channels
    for (i64 c = 0; c < areas; c++) {
      const double std = double(to.std[c0 + c]), off = mean[c] - double(to.mean[c0 + c]);
      const R r = R(to.clip(1.0 / inverse[c] / std, 1.0 / to.rmax, to.rmax));
      const R d = R(to.clip(off / std, -to.dmax, to.dmax));
      to.r[c0 + c] = r, to.d[c0 + c] = d;
      l.p1[c] = gamma[c] * r, l.h[c] = beta[c] + gamma[c] * d; // whose place is free forward
    }
    gamma = l.p1, beta = l.h;
  }
  each_channel(areas, job.s.bc, [&](i64 c, i64 g) {
    R mu = moves ? R(mean[g]) : R(0), a = R(double(gamma[c]) * inverse[g]);
    double rest = moves ? mean[g] - double(mu) : 0.0;
    l.mu[c] = mu, l.a[c] = a, l.tau[c] = tau[c];
    l.b[c] = R(double(beta[c]) - (rest != 0 ? rest * double(a) : 0.0)); // a may be infinite
  });
}

// What the gradient needs beside the lines, from the sums of g and g (x - mu) of each channel: see
// the formulas in closed_form.py. The second sum becomes that of g times the normalized x.
template <class T, class R>
void slopes(const Job<T, R> &job, i64 c0, i64 areas, i64 first, Room<R> &room) {
  const Op &op = job.op;
  const Lines<R> l = room.l;
  const i64 bc = job.s.bc;
  const double m = double(job.s.members()), eps = op.eps;
  const R *gamma = job.gamma + c0;
  double *s0 = room.s[0], *s1 = room.s[1], *h0 = room.weighted[0], *h1 = room.weighted[1];
  const double *mean = room.mean, *moment = room.moment, *inverse = room.inverse;
  if (DOTTED<T> && op.shift)
    each_channel(areas, bc, [&](i64 c, i64 g) { s1[c] -= room.dots[g] ? mean[g] * s0[c] : 0.0; });
  each_channel(areas, bc, [&](i64 c, i64 g) { s1[c] *= inverse[g]; });
  double *s2 = room.s[2];
  if (op.gated) each_channel(areas, bc, [&](i64 c, i64 g) { s2[c] *= double(gamma[c]) * inverse[g]; });
  for (i64 g = 0; g < areas; g++) {
    double sum0 = 0, sum1 = 0;
    for (i64 c = g * bc; c < (g + 1) * bc; c++) {
      sum0 += double(gamma[c]) * s0[c];
      sum1 += double(gamma[c]) * s1[c];
    }
    h0[g] = sum0, h1[g] = sum1;
  }
  if (job.deps)
    for (i64 g = 0; g < areas; g++) job.deps[first + g] = -h1[g] / (2 * (moment[g] + eps));
  // A member alone: 1 - x^2 / (M + eps) would cancel.
  const bool alone = op.from_batch && op.scale && m == 1 && !op.shift && !op.about_mean;
  const bool through = op.from_batch && op.scale && !alone, centred = op.from_batch && op.shift;
  const bool about_mean = op.about_mean;
  each_channel(areas, bc, [&](i64 c, i64 g) {
    double inside = moment[g] + eps, p1 = double(gamma[c]) * inverse[g];
    l.p1[c] = R(alone ? p1 * (eps / inside) : p1);
    l.mub[c] = about_mean ? R(mean[g]) : R(0);
    l.k[c] = through ? R(h1[g] / (m * inside)) : R(0);
    l.h[c] = centred ? R(h0[g] * inverse[g] / m) : R(0);
  });
}

// Sums for gamma, beta and tau, apart for bundles of samples, whose number the shape gives.
struct Totals {
  i64 bundles, c;
  std::vector<double> part;
  Totals(i64 count, i64 channels) : bundles(count), c(channels), part(3 * count * channels) {}
  void add(i64 bundle, i64 c0, i64 width, double *const *sums) {
    for (int k = 0; k < 3; k++) {
      double *to = part.data() + (k * bundles + bundle) * c + c0;
      const double *from = sums[k];
#pragma omp simd
      for (i64 j = 0; j < width; j++) to[j] += from[j];
    }
  }
  const double *sum(int k) {
    double *all = part.data() + k * bundles * c;
    for (i64 b = 1; b < bundles; b++) {
#pragma omp simd
      for (i64 j = 0; j < c; j++) all[j] += all[b * c + j];
    }
    return all;
  }
};

} // namespace
