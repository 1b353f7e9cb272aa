// The innermost loops: runs of contiguous elements with one line for all of them, and matrices of
// contiguous channels, a line each, with a stride from row to row. All are
//   z = x - mu,  u = z a + b + r,  y = act(u),  g = dL/du,  dx = g p1 - (x - mub) k - h,  dr = g,
// with GATED z sigmoid(tau z) for z, and g its slope times dL/du;
// r only where the activation says so; then it lies as y does. Results may be stored past the caches
// (stream.h), but not dx along with dr.
// Sums are added to vectors of lanes in R; who calls keeps them short. Where a slope is dear, g is
// left in `kept`, unless that is null, for the pass that writes dx.

#pragma once

#include "stream.h"

namespace {

// Coefficients, one each a channel.
template <class R> struct Lines {
  R *mu, *a, *b, *tau, *p1, *mub, *k, *h;
};

// r at an element, or no r.
template <int A, class T> inline const T *along(const T *r, i64 i) { return added(A) ? r + i : r; }
template <int A, class T> inline T *along(T *dr, i64 i) { return added(A) && dr ? dr + i : nullptr; }

// --- runs: one line -----------------------------------------------------------------------------

// Sums of z and z^2, z = x - shift.
template <class T, class R> inline void run_moments(const T *x, i64 n, R shift, R *sums) {
  const V<R> k = all<R>(shift);
  V<R> s0 = take<R>(sums), q0 = take<R>(sums + LANES<R>), s1{}, q1{};
  i64 i = 0;
  for (; i + 2 * LANES<R> <= n; i += 2 * LANES<R>) {
    V<R> z = take<R>(x + i) - k, w = take<R>(x + i + LANES<R>) - k;
    s0 += z, q0 += z * z;
    s1 += w, q1 += w * w;
  }
  sweep<R>(n - i, [&](i64 j, auto at) {
    V<R> z = at.read(x + i + j, k) - k;
    s0 += z, q0 += z * z;
  });
  put<R>(sums, s0 + s1), put<R>(sums + LANES<R>, q0 + q1);
}

template <int A, class T, class R>
inline void run_apply(const T *x, const T *r, T *y, i64 n, const Lines<R> &l, i64 c, Out &out) {
  const V<R> mu = all<R>(l.mu[c]), a = all<R>(l.a[c]), b = all<R>(l.b[c]), tau = all<R>(l.tau[c]);
  out.sweep_to<R>(y, n, [&](i64 i, auto at) {
    V<R> u = numerator<A, V<R>>(at.read(x + i, mu) - mu, tau) * a + b;
    if (added(A)) u += at.read(r + i, V<R>{});
    at.write(y + i, activate<A, V<R>>(u, tau));
  });
}

// Sums of dL/du, dL/du z, and of what goes to tau: dy where the threshold holds.
template <int A, class T, class R>
inline void run_sums(const T *x, const T *dy, const T *r, R *kept, i64 n, const Lines<R> &l, i64 c,
                     R *sums) {
  const V<R> mu = all<R>(l.mu[c]), a = all<R>(l.a[c]), b = all<R>(l.b[c]), tau = all<R>(l.tau[c]);
  V<R> s0 = take<R>(sums), s1 = take<R>(sums + LANES<R>), s2 = take<R>(sums + 2 * LANES<R>);
  sweep<R>(n, [&](i64 i, auto at) {
    V<R> z = at.read(x + i, mu) - mu, d = at.read(dy + i, V<R>{}), u = z * a + b;
    if (A == GATED) {
      const Gate<V<R>> gate = gate_slopes<V<R>>(z, tau, d);
      if (kept) at.write(kept + i, gate.slope);
      s0 += d, s1 += d * gate.open, s2 += gate.tau;
      return;
    }
    if (added(A)) u += at.read(r + i, V<R>{});
    V<R> g = slope<A, V<R>>(u, tau, d);
    if (dear(A) && kept) at.write(kept + i, g);
    s0 += g, s1 += g * z;
    if (plain(A) == TLU) s2 += d - g;
  });
  put<R>(sums, s0), put<R>(sums + LANES<R>, s1), put<R>(sums + 2 * LANES<R>, s2);
}

template <int A, class T, class R>
inline void run_gradient(const T *x, const T *dy, const T *r, const R *kept, T *dx, T *dr, i64 n,
                         const Lines<R> &l, i64 c, Out &out) {
  const V<R> mu = all<R>(l.mu[c]), a = all<R>(l.a[c]), b = all<R>(l.b[c]), tau = all<R>(l.tau[c]);
  const V<R> p1 = all<R>(l.p1[c]), mub = all<R>(l.mub[c]), k = all<R>(l.k[c]), h = all<R>(l.h[c]);
  out.sweep_to<R>(dx, n, [&](i64 i, auto at) {
    V<R> v = at.read(x + i, mu), g;
    if (dear(A) && kept) {
      g = at.read(kept + i, V<R>{});
    } else if (A == GATED) {
      g = gate_slopes<V<R>>(v - mu, tau, at.read(dy + i, V<R>{})).slope;
    } else {
      V<R> u = (v - mu) * a + b;
      if (added(A)) u += at.read(r + i, V<R>{});
      g = slope<A, V<R>>(u, tau, at.read(dy + i, V<R>{}));
    }
    if (added(A) && dr) at.write(dr + i, g);
    // Where nothing flows through M, what x holds does not matter, be it NaN.
    at.write(dx + i, g * p1 - (k != V<R>{} ? (v - mub) * k : V<R>{}) - h);
  });
}

// --- matrices: a line each column ---------------------------------------------------------------

// Bytes ahead that are asked for: what is stored between reads hides from prefetchers where they go.
constexpr i64 AHEAD = 16 << 10;

template <class T, class R>
inline void matrix_moments(const T *x, i64 xp, i64 rows, i64 c, const R *shift, R *s0, R *s1) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    sweep<R>(c, [&](i64 j, auto at) {
      V<R> k = take<R>(shift + j), s = take<R>(s0 + j), q = take<R>(s1 + j);
      for (int i = 0; i < count; i++) {
        soon(x + (r + i) * xp + j + AHEAD / i64(sizeof(T)));
        V<R> z = at.read(x + (r + i) * xp + j, k) - k;
        s += z, q += z * z;
      }
      put<R>(s0 + j, s), put<R>(s1 + j, q);
    });
  });
}

template <int A, class T, class R>
inline void matrix_apply(const T *x, i64 xp, const T *more, T *y, i64 yp, i64 rows, i64 c,
                         Lines<R> l, Out &out) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    out.sweep_to<R>(y + r * yp, c, [&](i64 j, auto at) {
      V<R> mu = take<R>(l.mu + j), a = take<R>(l.a + j), b = take<R>(l.b + j);
      V<R> tau = take<R>(l.tau + j);
      for (int i = 0; i < count; i++) {
        V<R> u = numerator<A, V<R>>(at.read(x + (r + i) * xp + j, mu) - mu, tau) * a + b;
        if (added(A)) u += at.read(more + (r + i) * yp + j, V<R>{});
        at.write(y + (r + i) * yp + j, activate<A, V<R>>(u, tau));
      }
    });
  });
}

template <int A, class T, class R>
inline void matrix_sums(const T *x, i64 xp, const T *dy, i64 gp, const T *more, i64 yp, R *kept,
                        i64 rows, i64 c, Lines<R> l, R *s0, R *s1, R *s2) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    sweep<R>(c, [&](i64 j, auto at) {
      V<R> mu = take<R>(l.mu + j), a = take<R>(l.a + j), b = take<R>(l.b + j);
      V<R> tau = take<R>(l.tau + j), sg = take<R>(s0 + j), sz = take<R>(s1 + j), st{};
      for (int i = 0; i < count; i++) {
        V<R> z = at.read(x + (r + i) * xp + j, mu) - mu;
        V<R> d = at.read(dy + (r + i) * gp + j, V<R>{});
        if (A == GATED) {
          const Gate<V<R>> gate = gate_slopes<V<R>>(z, tau, d);
          if (kept) at.write(kept + (r + i) * c + j, gate.slope);
          sg += d, sz += d * gate.open, st += gate.tau;
          continue;
        }
        V<R> u = z * a + b;
        if (added(A)) u += at.read(more + (r + i) * yp + j, V<R>{});
        V<R> g = slope<A, V<R>>(u, tau, d);
        if (dear(A) && kept) at.write(kept + (r + i) * c + j, g);
        sg += g, sz += g * z;
        if (plain(A) == TLU) st += d - g;
      }
      put<R>(s0 + j, sg), put<R>(s1 + j, sz);
      if (with_tau(A)) put<R>(s2 + j, take<R>(s2 + j) + st);
    });
  });
}

template <int A, class T, class R>
inline void matrix_gradient(const T *x, i64 xp, const T *dy, i64 gp, const T *more, const R *kept,
                            T *dx, T *dr, i64 yp, i64 rows, i64 c, Lines<R> l, Out &out) {
  row_by_row<T>(rows, c, [&](i64 r, auto count) {
    out.sweep_to<R>(dx + r * yp, c, [&](i64 j, auto at) {
      V<R> mu = take<R>(l.mu + j), a = take<R>(l.a + j), b = take<R>(l.b + j);
      V<R> tau = take<R>(l.tau + j), p1 = take<R>(l.p1 + j), mub = take<R>(l.mub + j);
      V<R> k = take<R>(l.k + j), h = take<R>(l.h + j);
      for (int i = 0; i < count; i++) {
        V<R> v = at.read(x + (r + i) * xp + j, mu), g;
        if (dear(A) && kept) {
          g = at.read(kept + (r + i) * c + j, V<R>{});
        } else if (A == GATED) {
          g = gate_slopes<V<R>>(v - mu, tau, at.read(dy + (r + i) * gp + j, V<R>{})).slope;
        } else {
          V<R> u = (v - mu) * a + b;
          if (added(A)) u += at.read(more + (r + i) * yp + j, V<R>{});
          g = slope<A, V<R>>(u, tau, at.read(dy + (r + i) * gp + j, V<R>{}));
        }
        if (added(A) && dr) at.write(dr + (r + i) * yp + j, g);
        V<R> dv = g * p1 - (k != V<R>{} ? (v - mub) * k : V<R>{}) - h;
        at.write(dx + (r + i) * yp + j, dv);
      }
    });
  });
}

} // namespace
