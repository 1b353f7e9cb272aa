"""What each method must compute, in plain numpy and float64, written from the papers' formulas.

An area is the set of elements that share statistics. Here every element carries the number of its
area in an array of labels, so that nothing of the library's grammar of axes is used.

Stored statistics are a dictionary of vectors, with the number of steps under ``"steps"``.
"""

import math

import numpy as np

BATCH_LIKE = ("batch", "ic", "batch_renorm", "variance", "l1_batch", "lp_batch", "mean_only_batch")
PER_SAMPLE = ("layer", "rms")
PER_MAP = ("instance", "filter_response")
IN_GHOSTS = ("ghost_batch", "batch_group")
EPS = {"rms": 2.0**-23, "filter_response": 1e-6}


def ghost_of_sample(samples, batch_size):
    """The sub-batch of each sample: ⌈N/size⌉ parts whose lengths differ by one at most."""
    parts = np.array_split(np.arange(samples), math.ceil(samples / batch_size))
    return np.concatenate([np.full(len(part), i) for i, part in enumerate(parts)])


def area_labels(name, shape, options):
    """The number of the area of each element of a tensor of shape (N, C, *positions)."""
    samples, channels, *positions = shape
    n = np.arange(samples)[:, None, None]
    c = np.arange(channels)[None, :, None]
    p = np.arange(math.prod(positions))[None, None, :]
    group = c // (channels // options["groups"]) if "groups" in options else c
    if name in BATCH_LIKE:
        label = c
    elif name == "position" or options.get("over") == "position":
        label = n * p.size + p
    elif name in PER_SAMPLE:
        label = n
    elif name in PER_MAP:
        label = n * channels + c
    elif name == "group":
        label = n * channels + group
    elif name in IN_GHOSTS:
        label = ghost_of_sample(samples, options["batch_size"])[:, None, None] * channels + group
    else:
        raise ValueError(name)
    return np.broadcast_to(label, (samples, channels, p.size)).reshape(shape)


def deviation_moment(name, values, options):
    """Centre, and what stands inside the root of the divisor before ε, for one area."""
    mean = values.mean()
    if name == "mean_only_batch":
        return mean, None
    if name in ("rms", "filter_response"):
        return 0.0, np.mean(values**2)
    if name == "variance":
        return 0.0, np.mean((values - mean) ** 2)
    if name == "l1_batch":
        return mean, np.mean(np.abs(values - mean))
    if name == "lp_batch":
        about = values - mean if options.get("about") == "mean" else values
        p = options.get("p", 1.0)
        return mean, np.abs(about).max() if p == "max" else np.mean(np.abs(about) ** p)
    return mean, np.mean((values - mean) ** 2)


def divisor(name, moment, options, eps):
    """What centred values are divided by."""
    if moment is None:
        return 1.0
    if name == "l1_batch":
        return math.sqrt(math.pi / 2) * (moment + eps)
    if name == "lp_batch":
        p = options.get("p", 1.0)
        return moment + eps if p == "max" else (moment + eps) ** (1 / p)
    return np.sqrt(moment + eps)


def epsilon(name, options, parameters):
    """ε in force, the learned part included."""
    eps = options.get("eps", EPS.get(name, 1e-5))
    return eps + abs(float(parameters["eps_learned"])) if options.get("learned_eps") else eps


def to_store(name, count, centre, moment, options, eps):
    """What the moving averages take in of one area."""
    if name == "mean_only_batch":
        return {"running_mean": centre}
    if name == "variance":
        return {"running_var": moment}
    if name == "batch_renorm":
        return {"running_mean": centre, "running_std": np.sqrt(moment + eps)}
    if name == "l1_batch":
        return {"running_mean": centre, "running_deviation": moment}
    if name == "lp_batch":
        return {
            "running_mean": centre,
            "running_deviation": divisor(name, moment, options, 0.0),
        }
    return {"running_mean": centre, "running_var": moment * count / (count - 1)}


def stores(name, options):
    """Whether the method keeps stored statistics."""
    tracked = name == "instance" and options.get("track_running_stats", False)
    return name in (*BATCH_LIKE, *IN_GHOSTS) or tracked


def from_store(name, stored, k, options, eps):
    """Centre and divisor in evaluation."""
    if name == "batch_renorm":
        return stored["running_mean"][k], stored["running_std"][k]
    if name == "mean_only_batch":
        return stored["running_mean"][k], 1.0
    if name == "variance":
        return 0.0, np.sqrt(stored["running_var"][k] + eps)
    if name in ("l1_batch", "lp_batch"):
        p = options.get("p", 1.0)
        deviation = stored["running_deviation"][k]
        moment = deviation if p == "max" else deviation**p
        return stored["running_mean"][k], divisor(name, moment, options, eps)
    return stored["running_mean"][k], np.sqrt(stored["running_var"][k] + eps)


def bound(schedule, step):
    """The bound on r or d at a step: a number, or (first, last, begin, end) rising linearly."""
    if isinstance(schedule, int | float):
        return schedule
    first, last, begin, end = schedule
    return first + (last - first) * min(max((step - begin) / (end - begin), 0.0), 1.0)


def method(name, options):
    """L2 about the mean is batch normalization, which stores the variance."""
    second = options.get("p") == 2 and options.get("about") == "mean"
    return "batch" if name == "lp_batch" and second else name


def normalize(name, x, options, parameters, stored, training, valid):
    """Return x̂ and the new stored statistics."""
    name = method(name, options)
    eps = epsilon(name, options, parameters)
    keeps = stores(name, options)
    groups = options["groups"] if name == "batch_group" else x.shape[1]
    rows = np.broadcast_to(
        (np.arange(x.shape[1]) // (x.shape[1] // groups)).reshape(-1, *[1] * (x.ndim - 2)), x.shape
    )
    xhat = np.zeros_like(x)
    if keeps and not training:
        for k in range(groups):
            centre, scale = from_store(name, stored, k, options, eps)
            xhat[rows == k] = (x[rows == k] - centre) / scale
        return xhat, stored
    labels = area_labels(name, x.shape, options)
    taken = {}
    for label in np.unique(labels):
        here = (labels == label) & valid
        if not here.any():
            continue
        centre, moment = deviation_moment(name, x[here], options)
        scaled = (x[here] - centre) / divisor(name, moment, options, eps)
        k = rows[here][0]
        if name == "batch_renorm":
            sigma = np.sqrt(moment + eps)
            rmax = bound(options["rmax"], stored["steps"])
            dmax = bound(options["dmax"], stored["steps"])
            old_mean, old_std = stored["running_mean"][k], stored["running_std"][k]
            r = np.clip(sigma / old_std, 1 / rmax, rmax)
            scaled = scaled * r + np.clip((centre - old_mean) / old_std, -dmax, dmax)
        xhat[here] = scaled
        if keeps:
            news = to_store(name, here.sum(), centre, moment, options, eps)
            for key, value in news.items():
                taken.setdefault(key, {}).setdefault(k, []).append(value)
    return xhat, moved(stored, taken, options, name) if keeps else stored


def moved(stored, taken, options, name):
    """Moving averages after a step, torch's convention: (1 − m)·old + m·(mean over areas)."""
    steps = stored["steps"] + 1
    momentum = options.get("momentum", 0.01 if name == "batch_renorm" else 0.1)
    momentum = 1 / steps if momentum is None else momentum
    new = {"steps": steps}
    for key, by_row in taken.items():
        new[key] = stored[key].copy()
        for k, values in by_row.items():
            new[key][k] = (1 - momentum) * stored[key][k] + momentum * np.mean(values)
    return {**stored, **new}


def initial(name, channels, options):
    """Stored statistics before the first step."""
    rows = options["groups"] if name == "batch_group" else channels
    zero, one = np.zeros(rows), np.ones(rows)
    return {
        "steps": 0, "running_mean": zero, "running_var": one,
        "running_std": one, "running_deviation": one,
    }  # fmt: skip


def forward(name, x, options, parameters, stored=None, training=True, mask=None):
    """Return y and the new stored statistics for x of shape (N, C, *positions)."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask[:, None], x.shape)
    if name == "none":
        return np.where(valid, x, 0), stored
    weight = parameters["weight"].reshape(shape) if "weight" in parameters else 1.0
    bias = parameters["bias"].reshape(shape) if "bias" in parameters else 0.0
    if name == "dyt":
        return np.where(valid, weight * np.tanh(parameters["alpha"] * x) + bias, 0), stored
    xhat, stored = normalize(name, x, options, parameters, stored, training, valid)
    y = weight * xhat + bias
    activation = options.get("activation", "tlu" if name == "filter_response" else None)
    if activation == "relu":
        y = np.maximum(y, 0)
    elif activation == "silu":
        y = y / (1 + np.exp(-y))
    elif activation == "tlu":
        y = np.maximum(y, parameters["threshold"].reshape(shape))
    return np.where(valid, y, 0), stored
