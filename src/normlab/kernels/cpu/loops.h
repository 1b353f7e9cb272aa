// The innermost loops: runs of contiguous elements with one line for all of them, and matrices of
// contiguous channels, a line each, with a stride from row to row. All are
//   z = x - mu,  u = z a + b + r,  y = act(u),  g = dL/du,  dx = g p1 - (x - mub) k - h,  dr = g,
// with GATED z sigmoid(tau z) for z, and g its slope times dL/du;
// r only where the activation says so; then it lies as y does. Results may be stored past the caches
// (stream.h), but not dx along with dr.
// Sums are added to vectors of lanes in R; who calls keeps them short. Where a slope is dear, g is
// left in `kept`, unless that is null, for the pass that writes dx. Lines and sums of matrices stand
// where `place` has them, and rows that are stored past the caches begin a line of memory.

#pragma once

#include "dots.h"
#include "stream.h"

namespace {

// Coefficients, one each a channel.
template <class R> struct Lines {
  R *mu, *a, *b, *tau, *p1, *mub, *k, *h;
};

// Bytes ahead that are asked for: what is stored between reads hides from prefetchers where they go.
constexpr i64 AHEAD = 16 << 10;

// r at an element, or no r.
template <int A, class T> inline const T *along(const T *r, i64 i) { return added(A) ? r + i : r; }
template <int A, class T> inline T *along(T *dr, i64 i) { return added(A) && dr ? dr + i : nullptr; }

// --- runs: one line -----------------------------------------------------------------------------

// Whether dL/du is dL/dy.
template <int A> constexpr bool STRAIGHT = plain(A) == NONE && A != GATED;

template <int A, class T, class R>
inline void run_apply(const T *x, const T *r, T *y, i64 n, const Lines<R> &l, i64 c, Out &out) {
  const V<T> mu = all<T>(l.mu[c]), a = all<T>(l.a[c]), b = all<T>(l.b[c]), tau = all<T>(l.tau[c]);
  out.sweep_to<T>(y, n, [&](i64 i, auto at) {
    V<T> u = numerator<A>(at.read(x + i, mu) - mu, tau) * a + b;
    if (added(A)) u += at.read(r + i, V<T>{});
    at.write(y + i, activate<A>(u, tau));
  });
}

// Sums of dL/du, dL/du z, and of what goes to tau: dy where the threshold holds. With `dots` those of
// dL/du x for those of dL/du z.
template <int A, class T, class R>
inline void run_sums(const T *x, const T *dy, const T *r, R *kept, i64 n, const Lines<R> &l, i64 c,
                     R *sums, bool dots) {
  if constexpr (DOTTED<T> && STRAIGHT<A>)
    if (dots) return run_dots(x, dy, n, sums);
  const V<T> mu = all<T>(l.mu[c]), a = all<T>(l.a[c]), b = all<T>(l.b[c]), tau = all<T>(l.tau[c]);
  V<T> s[3] = {};
  sweep<T>(n, [&](i64 i, auto at) {
    V<T> z = at.read(x + i, mu) - mu, d = at.read(dy + i, V<T>{}), u = z * a + b;
    if (A == GATED) {
      const Gate<V<T>> gate = gate_slopes(z, tau, d);
      if (kept) at.write(kept + i, gate.slope);
      s[0] += d, s[1] += d * gate.open, s[2] += gate.tau;
      return;
    }
    if (added(A)) u += at.read(r + i, V<T>{});
    V<T> g = slope<A>(u, tau, d);
    if (dear(A) && kept) at.write(kept + i, g);
    s[0] += g, s[1] += g * z;
    if (plain(A) == TLU) s[2] += d - g;
  });
  for (int k = 0; k < (with_tau(A) ? 3 : 2); k++)
    put<R>(sums + k * LANES<R>, take<R>(sums + k * LANES<R>) + merged(s[k]));
}

template <int A, class T, class R>
inline void run_gradient(const T *x, const T *dy, const T *r, const R *kept, T *dx, T *dr, i64 n,
                         const Lines<R> &l, i64 c, Out &out) {
  const V<T> mu = all<T>(l.mu[c]), a = all<T>(l.a[c]), b = all<T>(l.b[c]), tau = all<T>(l.tau[c]);
  const V<T> p1 = all<T>(l.p1[c]), mub = all<T>(l.mub[c]), k = all<T>(l.k[c]), h = all<T>(l.h[c]);
  out.sweep_to<T>(dx, n, [&](i64 i, auto at) {
    V<T> v = at.read(x + i, mu), g;
    if (dear(A) && kept) {
      g = at.read(kept + i, V<T>{});
    } else if (A == GATED) {
      g = gate_slopes(v - mu, tau, at.read(dy + i, V<T>{})).slope;
    } else {
      V<T> u = (v - mu) * a + b;
      if (added(A)) u += at.read(r + i, V<T>{});
      g = slope<A>(u, tau, at.read(dy + i, V<T>{}));
    }
    if (added(A) && dr) at.write(dr + i, g);
    at.write(dx + i, less_through(g * p1 - h, v - mub, k));
  });
}

// --- matrices: a line each column ---------------------------------------------------------------

template <class T, class R>
inline void matrix_moments(const T *x, i64 xp, i64 rows, i64 c, const R *shift, R *s0, R *s1,
                           bool dots) { // which all shifts are 0 for
  if constexpr (DOTTED<T>)
    if (dots) return matrix_dots(x, xp, x, xp, rows, c, s0, s1);
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    sweep<T>(c, [&](i64 j, auto at) {
      V<T> k = take<T>(shift + j), s = take<T>(s0 + j), q = take<T>(s1 + j);
      for (int i = 0; i < count; i++) {
        soon(x + (r + i) * xp + j + AHEAD / i64(sizeof(T)));
        V<T> z = at.read(x + (r + i) * xp + j, k) - k;
        s += z, q += z * z;
      }
      put<T>(s0 + j, s), put<T>(s1 + j, q);
    });
  });
}

template <int A, class T, class R>
inline void matrix_apply(const T *x, i64 xp, const T *more, T *y, i64 yp, i64 rows, i64 c,
                         Lines<R> l, Out &out) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    out.sweep_to<T>(y + r * yp, c, [&](i64 j, auto at) {
      V<T> mu = take<T>(l.mu + j), a = take<T>(l.a + j), b = take<T>(l.b + j);
      V<T> tau = take<T>(l.tau + j);
      for (int i = 0; i < count; i++) {
        V<T> u = numerator<A>(at.read(x + (r + i) * xp + j, mu) - mu, tau) * a + b;
        if (added(A)) u += at.read(more + (r + i) * yp + j, V<T>{});
        at.write(y + (r + i) * yp + j, activate<A>(u, tau));
      }
    });
  });
}

template <int A, class T, class R>
inline void matrix_sums(const T *x, i64 xp, const T *dy, i64 gp, const T *more, i64 yp, R *kept,
                        i64 rows, i64 c, Lines<R> l, R *s0, R *s1, R *s2, bool dots) {
  if constexpr (DOTTED<T> && STRAIGHT<A>)
    if (dots) return matrix_dots(x, xp, dy, gp, rows, c, s0, s1);
  // Elsewhere loops wait for memory, which is read faster row by row.
  constexpr bool tiles = dear(A) || PAIRED<V<T>>;
  const auto sum = [&](i64 r, auto count) {
    sweep<T>(c, [&](i64 j, auto at) {
      V<T> mu = take<T>(l.mu + j), a = take<T>(l.a + j), b = take<T>(l.b + j);
      V<T> tau = take<T>(l.tau + j), sg = take<T>(s0 + j), sz = take<T>(s1 + j), st{};
      for (int i = 0; i < count; i++) {
        if (tiles) soon(x + (r + i + count) * xp + j), soon(dy + (r + i + count) * gp + j);
        V<T> z = at.read(x + (r + i) * xp + j, mu) - mu;
        V<T> d = at.read(dy + (r + i) * gp + j, V<T>{});
        if (A == GATED) {
          const Gate<V<T>> gate = gate_slopes(z, tau, d);
          if (kept) at.write(kept + (r + i) * c + j, gate.slope);
          sg += d, sz += d * gate.open, st += gate.tau;
          continue;
        }
        V<T> u = z * a + b;
        if (added(A)) u += at.read(more + (r + i) * yp + j, V<T>{});
        V<T> g = slope<A>(u, tau, d);
        if (dear(A) && kept) at.write(kept + (r + i) * c + j, g);
        sg += g, sz += g * z;
        if (plain(A) == TLU) st += d - g;
      }
      put<T>(s0 + j, sg), put<T>(s1 + j, sz);
      if (with_tau(A)) put<T>(s2 + j, take<T>(s2 + j) + st);
    });
  };
  if constexpr (tiles) tile_by_tile<T>(rows, c, sum);
  else row_by_row<T>(rows, c, sum);
}

template <int A, class T, class R>
inline void matrix_gradient(const T *x, i64 xp, const T *dy, i64 gp, const T *more, const R *kept,
                            T *dx, T *dr, i64 yp, i64 rows, i64 c, Lines<R> l, Out &out) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    out.sweep_to<T>(dx + r * yp, c, [&](i64 j, auto at) {
      V<T> mu = take<T>(l.mu + j), a = take<T>(l.a + j), b = take<T>(l.b + j);
      V<T> tau = take<T>(l.tau + j), p1 = take<T>(l.p1 + j), mub = take<T>(l.mub + j);
      V<T> k = take<T>(l.k + j), h = take<T>(l.h + j);
      for (int i = 0; i < count; i++) {
        V<T> v = at.read(x + (r + i) * xp + j, mu), g;
        if (dear(A) && kept) {
          g = at.read(kept + (r + i) * c + j, V<T>{});
        } else if (A == GATED) {
          g = gate_slopes(v - mu, tau, at.read(dy + (r + i) * gp + j, V<T>{})).slope;
        } else {
          V<T> u = (v - mu) * a + b;
          if (added(A)) u += at.read(more + (r + i) * yp + j, V<T>{});
          g = slope<A>(u, tau, at.read(dy + (r + i) * gp + j, V<T>{}));
        }
        if (added(A) && dr) at.write(dr + (r + i) * yp + j, g);
        at.write(dx + (r + i) * yp + j, less_through(g * p1 - h, v - mub, k));
      }
    });
  });
}

} // namespace
