"""Every metric of the explanations on a case whose answer is known, and on one prototype that it has to find."""

import pytest
import torch

from evaluation import interpretability
from evaluation.interpretability import (
    Explanations,
    class_purity,
    deletion_curve,
    explaining_count,
    nearest_agreement,
    zero_connections,
)
from losses import diversity_loss
from tests.tiny import tiny_ppnet

FAR = 30.0
CLASS_OF = torch.tensor([0, 0, 1, 1, 2, 2])


def planted_model():
    """Six prototypes, two a class, with the last layer that a model starts with."""
    model = tiny_ppnet()
    with torch.no_grad():
        model.last_layer.weight.copy_(torch.where(torch.arange(3)[:, None] == model.prototype_class, 1.0, -0.5))
    return model


def planted_distances(seed=0):
    """(1, 6, 2, 12): prototype p is at distance 0 from the four cells 4 p .. 4 p + 3 and nowhere else near."""
    generator = torch.Generator().manual_seed(seed)
    distances = FAR + torch.rand(6, 24, generator=generator)
    for p in range(6):
        distances[p, 4 * p : 4 * p + 4] = torch.rand(4, generator=generator) * 1e-3
    return distances.view(1, 6, 2, 12)


def planted_cells():
    """(1, 2, 12): every cell has the class of the prototype that is near it."""
    return CLASS_OF.repeat_interleave(4).view(1, 2, 12)


def measured(model, distances, cells, noisy=None, images=6):
    explanations = Explanations(model)
    for index in range(images):
        explanations.update(index, distances, distances if noisy is None else noisy, cells)
    return explanations.summary()


def test_a_model_without_faults():
    found = measured(planted_model(), planted_distances(), planted_cells())
    assert found["prototypes"] == 6
    assert (found["used"], found["unused"]) == (1.0, [])
    assert (found["purity"], found["impure"]) == (1.0, [])
    assert found["duplicates"] == []
    assert found["zeros"] == 0
    assert found["stability"] == 1
    assert found["faithfulness"] > 0.1
    assert found["agreement"][0] == 1


def test_a_dead_prototype_is_found():
    distances = planted_distances()
    distances[:, 3] = 1e6
    found = measured(planted_model(), distances, planted_cells())
    assert found["unused"] == [3]
    assert found["used"] == pytest.approx(5 / 6)


def test_a_prototype_whose_weights_are_zero_is_never_a_reason():
    model = planted_model()
    with torch.no_grad():
        model.last_layer.weight[:, 4] = 0
    assert measured(model, planted_distances(), planted_cells())["unused"] == [4]


def test_a_duplicated_prototype_is_found():
    distances = planted_distances()
    distances[:, 5] = distances[:, 4]
    found = measured(planted_model(), distances, planted_cells())
    assert found["duplicates"] == [[4, 5]]
    assert found["similarity"] > measured(planted_model(), planted_distances(), planted_cells())["similarity"] + 0.2


def test_a_prototype_of_the_wrong_class_is_found():
    distances = planted_distances()
    distances[0, 2], distances[0, 0] = distances[0, 0].clone(), distances[0, 1]  # 2 now looks at class 0, as 1 does
    found = measured(planted_model(), distances, planted_cells())
    assert found["impure"] == [2]
    assert found["purity"] == pytest.approx(5 / 6)


def test_a_prototype_that_decides_everything_is_found():
    model = planted_model()
    with torch.no_grad():
        model.last_layer.weight.zero_()
        model.last_layer.weight[1, 2] = 2.0
    found = measured(model, planted_distances(), planted_cells())
    assert found["explaining"] == 1
    assert found["unused"] == [0, 1, 3, 4, 5]
    assert found["deletion"]["top"][1:] == pytest.approx([1 / 3, 1 / 3])  # without it all logits are 0
    assert found["deletion"]["random"][1] > 1 / 3
    assert found["zeros"] == 1


def test_similarity_is_the_diversity_loss_of_the_data_set():
    distances, cells = planted_distances(), planted_cells()
    found = measured(planted_model(), distances, cells, images=1)
    assert found["similarity"] == pytest.approx(float(diversity_loss(distances, cells, CLASS_OF).value), rel=1e-5)


def test_stability_counts_the_cells_whose_first_reason_changes():
    distances = planted_distances()
    noisy = distances.clone()
    noisy[..., 0, :4] = FAR  # cells 0..3 lose the prototype that was near
    noisy[0, 1, 0, :4] = 0
    assert measured(planted_model(), distances, planted_cells(), noisy)["stability"] == pytest.approx(20 / 24)


def test_ignored_cells_count_nowhere():
    distances, cells = planted_distances(), planted_cells()
    cells[..., 0, :2] = 255
    changed = distances.clone()
    changed[..., 0, :2] = torch.rand(6, 2)
    assert measured(planted_model(), distances, cells) == measured(planted_model(), changed, cells)


def test_the_size_of_the_chunks_changes_nothing(monkeypatch):
    whole = measured(planted_model(), planted_distances(), planted_cells())
    monkeypatch.setattr(interpretability, "CHUNK", 5)
    chunked = measured(planted_model(), planted_distances(), planted_cells())
    assert chunked.pop("deletion")["random"] == pytest.approx(whole.pop("deletion")["random"])
    for key in ("used", "purity", "similarity", "explaining", "stability", "faithfulness"):
        assert chunked[key] == pytest.approx(whole[key], abs=1e-6), key


def test_nothing_labelled_is_nothing_measured():
    assert measured(planted_model(), planted_distances(), torch.full((1, 2, 12), 255)) is None


def test_explaining_count():
    table = torch.tensor([[96.0, -2, 2, 0], [1, 1, 1, 1], [0, 0, 0, 0], [-90, 4, 3, 3]])
    assert explaining_count(table).tolist() == [1, 4, 0, 3]
    assert explaining_count(table, 0.5).tolist() == [1, 2, 0, 1]


def test_nearest_agreement():
    distances = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    shares = nearest_agreement(distances, CLASS_OF, torch.tensor([0, 1]), 4)
    torch.testing.assert_close(shares, torch.tensor([[1, 1, 2 / 3, 2 / 4], [0, 0, 1 / 3, 2 / 4]]))


def test_deletion_is_what_a_model_without_the_prototypes_says():
    model = tiny_ppnet()
    distances = torch.rand(1, 6, 1, 4) * 3
    activations, weight = model.activations(distances)[0].flatten(1).T, model.last_layer.weight
    classes = (activations @ weight.T).argmax(1)
    removed = [model.contributions_of(distances, torch.full((1, 1, 4), p))[0, :, 0].T for p in (3, 0)]
    curve = deletion_curve(activations @ weight.T, removed, classes)
    for step, kept in enumerate(([0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5], [1, 2, 4, 5])):
        probability = (activations[:, kept] @ weight[:, kept].T).softmax(1)
        torch.testing.assert_close(curve[:, step], probability.gather(1, classes[:, None])[:, 0])


def test_class_purity():
    labels = torch.tensor([[0, 0, 1, 255], [1, 1, 1, 1], [255, 255, 255, 255]])
    assert class_purity(labels, torch.tensor([0, 1, 2])).tolist() == pytest.approx([2 / 3, 1, 0])


def test_zero_connections():
    weight = torch.tensor([[0.0, 0.0, -0.5], [0.0, 1.0, 0.3]])
    assert zero_connections(weight, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


def test_what_speaks_against_a_class_is_no_reason_for_it():
    model = planted_model()
    with torch.no_grad():
        model.last_layer.weight.clamp_(max=0)
    assert measured(model, planted_distances(), planted_cells())["used"] == 0
