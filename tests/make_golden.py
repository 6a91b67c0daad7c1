"""Reference values of the prototype head, the losses and the nearest-patch search, by loops over single numbers.

    python tests/make_golden.py        writes tests/data/golden.npz

Float64 numpy, written from the definitions, without the project's code: what the tests compare the project with.
"""

from pathlib import Path

import numpy as np

IGNORE = 255
IMAGES, CLASSES, PER_CLASS, DEPTH, SIDE = 2, 4, 3, 6, 6


def squared_distances(features, prototypes):
    """(B, D, h, w), (P, D) -> (B, P, h, w)."""
    images, depth, height, width = features.shape
    result = np.zeros((images, len(prototypes), height, width))
    for b, p, i, j in np.ndindex(result.shape):
        result[b, p, i, j] = sum((features[b, d, i, j] - prototypes[p, d]) ** 2 for d in range(depth))
    return result


def cell_logits(activations, last_layer):
    """(B, P, h, w), (C, P) -> (B, C, h, w)."""
    images, prototypes, height, width = activations.shape
    result = np.zeros((images, len(last_layer), height, width))
    for b, c, i, j in np.ndindex(result.shape):
        result[b, c, i, j] = sum(last_layer[c, p] * activations[b, p, i, j] for p in range(prototypes))
    return result


def cross_entropy(logits, labels):
    """Mean of -log softmax at the labelled cells; 0 without any."""
    terms = []
    for b, i, j in np.ndindex(labels.shape):
        if labels[b, i, j] != IGNORE:
            scores = logits[b, :, i, j]
            terms.append(np.log(sum(np.exp(s) for s in scores)) - scores[labels[b, i, j]])
    return float(np.mean(terms)) if terms else 0.0


def l1(last_layer, prototype_class):
    """Sum of |w| over the connections to other classes."""
    return float(
        sum(abs(last_layer[c, p]) for c, p in np.ndindex(last_layer.shape) if c != prototype_class[p]),
    )


def diversity(distances, labels, prototype_class):
    """Mean of exp(-Jeffreys divergence) over the pairs of prototypes of each class with 2 cells or more; or 0."""
    terms = []
    for b in range(len(labels)):
        for c in sorted(set(prototype_class.tolist())):
            cells = [(i, j) for i, j in np.ndindex(labels.shape[1:]) if labels[b, i, j] == c]
            members = [p for p in range(len(prototype_class)) if prototype_class[p] == c]
            if len(cells) < 2:
                continue
            shares = {p: _softmax([distances[b, p, i, j] for i, j in cells]) for p in members}
            for first, p in enumerate(members):
                for q in members[first + 1 :]:
                    jeffreys = 0.5 * _kl(shares[p], shares[q]) + 0.5 * _kl(shares[q], shares[p])
                    terms.append(np.exp(-jeffreys))
    return float(np.mean(terms)) if terms else 0.0


def purity(activations, labels, prototype_class):
    """Mean of log(1 + exp(3 (highest elsewhere - highest at its own class))) over the prototypes that have both, and
    how many those are."""
    terms = []
    for p, c in enumerate(prototype_class):
        places = list(np.ndindex(labels.shape))
        own = [activations[b, p, i, j] for b, i, j in places if labels[b, i, j] == c]
        other = [activations[b, p, i, j] for b, i, j in places if labels[b, i, j] not in (c, IGNORE)]
        if own and other:
            terms.append(np.log(1 + np.exp(3 * (max(other) - max(own)))))
    return float(np.mean(terms)) if terms else 0.0, len(terms)


def nearest(distances, labels, prototype_class):
    """For each prototype the (image, row, column) of its class's nearest cell, and the distance; or -1 and inf."""
    places = np.full((len(prototype_class), 3), -1)
    lowest = np.full(len(prototype_class), np.inf)
    for p in range(len(prototype_class)):
        for b, i, j in np.ndindex(labels.shape):
            if labels[b, i, j] == prototype_class[p] and distances[b, p, i, j] < lowest[p]:
                lowest[p], places[p] = distances[b, p, i, j], (b, i, j)
    return places, lowest


def _softmax(values):
    exponentials = [np.exp(v - max(values)) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def _kl(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))


def make() -> dict[str, np.ndarray]:
    """All arrays of golden.npz."""
    rng = np.random.default_rng(20)
    labels = rng.choice([0, 1, 2, 3, IGNORE], (IMAGES, SIDE, SIDE), p=(0.3, 0.25, 0.25, 0.1, 0.1))
    labels[0][labels[0] == 3] = 0  # class 3: absent from the first image, one cell in the second
    labels[1][labels[1] == 3] = 1
    labels[1, 2, 5] = 3
    raw = rng.normal(0, 1.5, (IMAGES, DEPTH, SIDE, SIDE))
    prototypes = rng.uniform(0, 1, (CLASSES * PER_CLASS, DEPTH))
    last_layer = rng.normal(0, 1, (CLASSES, CLASSES * PER_CLASS))
    prototype_class = np.repeat(np.arange(CLASSES), PER_CLASS)
    features = 1 / (1 + np.exp(-raw))
    distances = squared_distances(features, prototypes)
    activations = np.log((distances + 1) / (distances + 1e-4))
    logits = cell_logits(activations, last_layer)
    nearest_patch, nearest_distance = nearest(distances, labels, prototype_class)
    return {
        "raw": raw, "labels": labels, "prototypes": prototypes, "last_layer": last_layer,
        "prototype_class": prototype_class, "features": features, "distances": distances,
        "activations": activations, "logits": logits, "nearest_patch": nearest_patch,
        "nearest_distance": nearest_distance, "cross_entropy": np.array(cross_entropy(logits, labels)),
        "l1": np.array(l1(last_layer, prototype_class)),
        "diversity": np.array(diversity(distances, labels, prototype_class)),
    }  # fmt: skip


if __name__ == "__main__":
    target = Path(__file__).parent / "data" / "golden.npz"
    target.parent.mkdir(exist_ok=True)
    np.savez_compressed(target, **make())
    print(f"wrote {target} ({target.stat().st_size:,} bytes)")
