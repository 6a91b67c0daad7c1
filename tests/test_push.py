"""The push against brute force: the search, the projection, merged duplicates, what never occurs, the neighbours."""

from pathlib import Path

import numpy as np
import pytest
import torch

from explanation.prototype_pictures import patch_box
from grid import Grid
from inference import Inference
from push import Neighbours, find_neighbours, nearest_patches, push_prototypes
from tests import make_golden
from tests.tiny import EveryEighthPixel, RandomImages, tiny_ppnet

GOLDEN = dict(np.load(Path(__file__).parent / "data" / "golden.npz"))
CPU = torch.device("cpu")


def on_cpu(model):
    return Inference(model, CPU)


def nearest(model, dataset, **how):
    """The one nearest own-class patch of each prototype, without the axis of neighbours."""
    return Neighbours(*(values[:, 0] for values in find_neighbours(on_cpu(model), dataset, 1, own_class=True, **how)))


IGNORE = 255


def random_search(seed, images=5, classes=3, prototypes=6):
    """distances (B, P, 4, 5), labels (B, 4, 5), prototype_class (P,)."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(classes), IGNORE], (images, 4, 5))
    distances = rng.uniform(0, 5, (images, prototypes, 4, 5)).astype(np.float32)
    return torch.from_numpy(distances), torch.from_numpy(labels), torch.arange(prototypes) % classes


@torch.no_grad()
def every_cell(model, dataset):
    """Brute force's view of a data set: (image, row, column, class, features, distances) of each cell, one by one."""
    prototypes = model.prototype_vectors.flatten(1).double().numpy()
    for b in range(len(dataset)):
        image, label = dataset[b]
        features = model.conv_features(Grid().pad(image[None], 0.0))[0].double().numpy()
        for i, j in np.ndindex(features.shape[1:]):
            inside = 8 * i < label.shape[0] and 8 * j < label.shape[1]
            class_index = int(label[8 * i, 8 * j]) if inside else IGNORE
            yield b, i, j, class_index, features[:, i, j], ((prototypes - features[:, i, j]) ** 2).sum(1)


def nearest_by_brute_force(model, dataset):
    """For each prototype (distance, image, row, column, features) of the nearest cell of its class, or None."""
    best = [None] * len(model.prototype_class)
    for b, i, j, class_index, features, distances in every_cell(model, dataset):
        for p, own in enumerate(model.prototype_class.tolist()):
            if class_index == own and (best[p] is None or distances[p] < best[p][0]):
                best[p] = (distances[p], b, i, j, features)
    return best


# --- the search ------------------------------------------------------------------------------------------------


def test_golden_nearest_patches():
    distances, labels = torch.from_numpy(GOLDEN["distances"]).float(), torch.from_numpy(GOLDEN["labels"])
    distance, index = nearest_patches(distances, labels, torch.from_numpy(GOLDEN["prototype_class"]))
    assert np.stack(np.unravel_index(index.numpy(), labels.shape), 1).tolist() == GOLDEN["nearest_patch"].tolist()
    np.testing.assert_allclose(distance, GOLDEN["nearest_distance"], rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_any_chunking_finds_what_brute_force_finds(seed, chunk):
    distances, labels, prototype_class = random_search(seed)
    places, lowest = make_golden.nearest(distances.numpy(), labels.numpy(), prototype_class.numpy())
    best, found = np.full(6, np.inf), np.full((6, 3), -1)
    for start in range(0, 5, chunk):
        part = slice(start, start + chunk)
        distance, index = nearest_patches(distances[part], labels[part], prototype_class)
        place = np.stack(np.unravel_index(index.numpy(), labels[part].shape), 1) + [start, 0, 0]
        closer = distance.numpy() < best
        best, found = np.where(closer, distance, best), np.where(closer[:, None], place, found)
    assert found.tolist() == places.tolist() and best.tolist() == lowest.tolist()


def test_a_prototype_without_a_cell_of_its_class_has_infinite_distance():
    distances, labels, prototype_class = random_search(0)
    distance, _ = nearest_patches(distances, labels.masked_fill(labels == 1, IGNORE), prototype_class)
    assert distance.isinf().tolist() == (prototype_class == 1).tolist()


def test_ignored_cells_are_never_found():
    distances, labels, prototype_class = random_search(1)
    nearer = distances - 10 * (labels == IGNORE)[:, None]
    for a, b in zip(
        nearest_patches(nearer, labels, prototype_class),
        nearest_patches(distances, labels, prototype_class),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_find_nearest_equals_brute_force(seed):
    model, dataset = tiny_ppnet(seed=seed), RandomImages(seed=seed)
    found = nearest(model, dataset)
    for p, (distance, b, i, j, features) in enumerate(nearest_by_brute_force(model, dataset)):
        assert (found.image[p], found.cell[p].tolist()) == (b, [i, j])
        assert found.distance[p].item() == pytest.approx(distance, rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(found.vector[p], features, rtol=1e-6)


def test_workers_change_nothing():
    model, dataset = tiny_ppnet(), RandomImages()
    for alone, helped in zip(nearest(model, dataset), nearest(model, dataset, num_workers=2), strict=True):
        assert torch.equal(alone, helped)


@pytest.mark.parametrize("seed", range(3))
def test_find_neighbours_equals_brute_force(seed):
    model, dataset, k = tiny_ppnet(seed=seed), RandomImages(5, seed=seed), 3
    found = find_neighbours(on_cpu(model), dataset, k)
    for p in range(6):
        best = {}  # the nearest labelled cell of any class in each image
        for b, i, j, class_index, _, distances in every_cell(model, dataset):
            if class_index != IGNORE and (b not in best or distances[p] < best[b][0]):
                best[b] = (distances[p], [i, j], class_index)
        ranked = sorted((distance, b, cell, label) for b, (distance, cell, label) in best.items())[:k]
        assert found.image[p].tolist() == [b for _, b, _, _ in ranked]
        assert found.cell[p].tolist() == [cell for _, _, cell, _ in ranked]
        assert found.label[p].tolist() == [label for _, _, _, label in ranked]
        np.testing.assert_allclose(found.distance[p], [d for d, _, _, _ in ranked], rtol=1e-4, atol=1e-6)


def test_neighbours_that_are_not_there_are_marked():
    found = find_neighbours(on_cpu(tiny_ppnet()), RandomImages(2), 4)
    assert found.image[:, 2:].eq(-1).all() and found.label[:, 2:].eq(IGNORE).all()
    assert found.distance[:, 2:].isinf().all() and found.distance[:, :2].isfinite().all()


# --- the projection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_every_prototype_becomes_a_real_patch_of_its_class_and_says_which(seed):
    model, dataset = tiny_ppnet(prototypes=3, seed=seed), RandomImages(seed=seed)
    expected = nearest_by_brute_force(model, dataset)
    report = push_prototypes(on_cpu(model), dataset)
    assert [r["prototype"] for r in report.records] == [r["class"] for r in report.records] == [0, 1, 2]
    for record, (distance, b, i, j, features) in zip(report.records, expected, strict=True):
        assert (record["image_index"], record["cell"], record["pixel"]) == (b, [i, j], [8 * j, 8 * i])
        assert (record["image"], record["split"]) == (f"image {b}", "train")
        assert record["class_name"] == f"class {record['class']}" and record["merged"] == [record["prototype"]]
        assert record["distance"] == pytest.approx(distance, rel=1e-4, abs=1e-6)
        label = dataset[b][1]
        assert label[record["pixel"][1], record["pixel"][0]] == record["class"]
        np.testing.assert_allclose(model.prototype_vectors[record["prototype"]].detach().flatten(), features, rtol=1e-6)
    assert report.moved == pytest.approx(np.mean([e[0] for e in expected]), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_second_push_moves_nothing(seed):
    model, dataset = tiny_ppnet(12, seed=seed), RandomImages(seed=seed)
    first = push_prototypes(on_cpu(model), dataset)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    second = push_prototypes(on_cpu(model), dataset)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    where = [[(r["image"], r["cell"], r["class"]) for r in report.records] for report in (first, second)]
    assert where[0] == where[1] and second.merged == 0 and second.moved < 1e-6


def with_twins(seed=0):
    """A model in which prototypes 0, 1 and 2, and 9 and 11, are about to become the same patch."""
    model = tiny_ppnet(12, seed=seed)
    with torch.no_grad():
        model.prototype_vectors[[1, 2]] = model.prototype_vectors[0] + 1e-6
        model.prototype_vectors[11] = model.prototype_vectors[9]
    return model


def test_duplicates_are_merged_and_no_logit_changes():
    model, whole, dataset = with_twins(), with_twins(), RandomImages(12)
    whole.project_prototypes(nearest(whole, dataset).vector)
    report = push_prototypes(on_cpu(model), dataset)
    groups = [r["merged"] for r in report.records]
    assert any({0, 1, 2} <= set(group) for group in groups) and any({9, 11} <= set(group) for group in groups)
    assert sorted(sum(groups, [])) == list(range(12)) and report.merged == 12 - len(groups) >= 3
    assert len(model.prototype_class) == len(model.prototype_vectors) == model.last_layer.weight.shape[1] == len(groups)
    for record in report.records:
        assert {p // 4 for p in record["merged"]} == {record["class"]}
        assert model.prototype_class[record["prototype"]] == record["class"]
    image = dataset[0][0][None]
    torch.testing.assert_close(model.predict(image), whole.predict(image), rtol=1e-4, atol=1e-4)


def test_the_same_patch_for_two_classes_cannot_be():
    report = push_prototypes(on_cpu(with_twins()), RandomImages(12))
    places = [(r["image"], *r["cell"]) for r in report.records]
    assert len(set(places)) == len(places)


def test_a_class_that_never_occurs_is_reported_and_its_prototypes_kept():
    model, dataset = tiny_ppnet(6), RandomImages(absent=1)
    before = model.prototype_vectors.clone()
    report = push_prototypes(on_cpu(model), dataset)
    lost = [r for r in report.records if r["class"] == 1]
    assert report.not_found == [r["prototype"] for r in lost] and len(lost) == 2
    for record, original in zip(lost, (2, 3), strict=True):
        assert torch.equal(model.prototype_vectors[record["prototype"]], before[original])
        assert record["merged"] == [original] and record["class_name"] == "class 1"
        assert [record[key] for key in ("image", "image_index", "split", "cell", "pixel", "distance")] == [None] * 6
    assert np.isfinite(report.moved)


def test_data_without_any_label_move_nothing():
    model, dataset = tiny_ppnet(), RandomImages()
    dataset.items = [(image, torch.full_like(label, IGNORE)) for image, label in dataset.items]
    before = model.prototype_vectors.clone()
    report = push_prototypes(on_cpu(model), dataset)
    assert torch.equal(model.prototype_vectors, before) and report.not_found == list(range(6)) and report.moved == 0.0


def test_the_push_searches_in_evaluation_mode():
    class Watching(EveryEighthPixel):
        modes = []

        def forward(self, images):
            self.modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(images)

    model = tiny_ppnet()
    model.features = Watching()
    push_prototypes(on_cpu(model.train()), RandomImages(2))
    assert set(model.features.modes) == {(False, False)}


# --- the box of a patch ----------------------------------------------------------------------------------------


def test_the_box_frames_the_region_of_high_activation_around_the_cell():
    activation = torch.zeros(20, 20)
    activation[4:8, 10:14] = 1.0  # around the cell
    activation[15:17, 2:4] = 2.0  # higher, and somewhere else
    assert patch_box(activation, [5, 10], (160, 160), Grid()) == [10 * 8 - 4, 4 * 8 - 4, 13 * 8 + 4, 7 * 8 + 4]


@pytest.mark.parametrize("cell", [(0, 0), (0, 4), (3, 0), (3, 4), (1, 2)])
def test_the_box_holds_the_cells_pixel_and_stays_inside_the_image(cell):
    generator = torch.Generator().manual_seed(0)
    width, height = 33, 25
    for _ in range(10):
        x0, y0, x1, y1 = patch_box(torch.rand(4, 5, generator=generator), list(cell), (width, height), Grid())
        assert 0 <= x0 <= 8 * cell[1] < x1 <= width and 0 <= y0 <= 8 * cell[0] < y1 <= height


def test_labels_of_brute_force_and_of_the_search_agree():
    dataset = RandomImages(1)
    image, label = dataset[0]
    grid = tiny_ppnet().conv_features(Grid().pad(image[None], 0.0)).shape[2:]
    cells = Grid().labels(label[None], grid)[0]
    expected = {(i, j): c for _, i, j, c, _, _ in every_cell(tiny_ppnet(), dataset)}
    assert {(i, j): int(cells[i, j]) for i, j in np.ndindex(cells.shape)} == expected


def test_reports_are_plain_data():
    report = push_prototypes(on_cpu(tiny_ppnet()), RandomImages(absent=0))
    for value in (v for record in report.records for v in record.values()):
        assert value is None or type(value) in (int, float, str, list)
    assert type(report.moved) is float and type(report.merged) is int
