"""The losses against loops in float64, and where their gradients go."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import Mean, cross_entropy, diversity_loss, l1_loss, purity_loss
from tests import make_golden

GOLDEN = dict(np.load(Path(__file__).parent / "data" / "golden.npz"))
IGNORE = 255


def tensor(name, dtype=torch.float32):
    return torch.from_numpy(GOLDEN[name]).to(dtype)


def random_case(seed, prototype_class, classes=3, ignored=0.2, shape=(2, 4, 5), scale=1.0):
    """distances that ask for a gradient, labels, prototype_class."""
    rng = np.random.default_rng(seed)
    shares = [(1 - ignored) / classes] * classes + [ignored]
    labels = torch.from_numpy(rng.choice([*range(classes), IGNORE], shape, p=shares))
    distances = torch.from_numpy(rng.uniform(0, scale, (shape[0], len(prototype_class), *shape[1:])))
    return distances.requires_grad_(), labels, torch.tensor(prototype_class)


def assert_diversity_is_that_of_the_loops(distances, labels, prototype_class):
    expected = make_golden.diversity(distances.detach().numpy(), labels.numpy(), prototype_class.numpy())
    loss = diversity_loss(distances, labels, prototype_class).value
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-10, atol=1e-300)
    return loss


def test_a_mean_of_nothing_is_zero_with_zero_gradient():
    total = torch.zeros((), requires_grad=True)
    value = Mean(total * 0, torch.tensor(0)).value
    value.backward()
    assert value == 0 and total.grad == 0
    assert Mean(torch.tensor(3.0), torch.tensor(4)).value == 0.75


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)])
def test_totals_and_counts_of_two_images_add_up_to_those_of_both(weights):
    """What makes the mean over several processes right: each has images of its own, with other numbers of cells."""
    distances, labels, classes = random_case(5, [0, 0, 1, 1, 1, 2, 2])
    labels[1, :3] = IGNORE
    logits = distances[:, :3]
    for loss in (
        lambda i: cross_entropy(logits[i], labels[i], weights),
        lambda i: diversity_loss(distances[i], labels[i], classes),
    ):
        both, (first, second) = loss(slice(2)), (loss(slice(i, i + 1)) for i in range(2))
        assert first.count + second.count == both.count and first.count != second.count
        torch.testing.assert_close(first.total + second.total, both.total)
        assert both.total.ndim == both.count.ndim == 0


def test_the_golden_file_is_what_its_script_makes():
    made = make_golden.make()
    assert made.keys() == GOLDEN.keys()
    for name, values in made.items():
        np.testing.assert_allclose(values, GOLDEN[name], rtol=1e-12, err_msg=name)


def test_golden_cross_entropy():
    loss = cross_entropy(tensor("logits"), tensor("labels", torch.int64)).value
    np.testing.assert_allclose(loss.item(), GOLDEN["cross_entropy"], rtol=1e-5)


def test_class_weights_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 3, 5), generator=generator)
    labels[0, 0] = IGNORE
    weights = torch.tensor([0.5, 2.0, 0.0, 7.0], dtype=torch.float64)
    ours = cross_entropy(logits, labels, weights).value
    theirs = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
    assert cross_entropy(logits, torch.full_like(labels, IGNORE), weights).value == 0
    assert cross_entropy(logits, labels, weights).count == sum(float(weights[i]) for i in labels[labels != IGNORE])


def test_golden_l1():
    loss = l1_loss(tensor("last_layer"), tensor("prototype_class", torch.int64)).value
    np.testing.assert_allclose(loss.item(), GOLDEN["l1"], rtol=1e-5)


def test_golden_diversity():
    labels, prototype_class = (tensor(name, torch.int64) for name in ("labels", "prototype_class"))
    loss = diversity_loss(tensor("distances"), labels, prototype_class).value
    np.testing.assert_allclose(loss.item(), GOLDEN["diversity"], rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_diversity_equals_the_loops(seed):
    assert_diversity_is_that_of_the_loops(*random_case(seed, [0, 0, 0, 1, 1, 1, 2, 2, 2]))


@pytest.mark.parametrize(
    "prototype_class", [[0, 0, 0, 1, 2, 2], [0, 1, 2], [1, 1], [0, 0, 2, 2, 2], [2, 0, 1, 0, 2, 0]]
)
def test_diversity_of_a_pruned_set_equals_the_loops(prototype_class):
    for seed in range(3):
        assert_diversity_is_that_of_the_loops(*random_case(seed, prototype_class))


def test_diversity_at_large_distances_equals_the_loops():
    assert_diversity_is_that_of_the_loops(*random_case(0, [0, 0, 1, 1, 2, 2], scale=64.0))


def test_diversity_of_one_class_alone_equals_the_loops():
    assert_diversity_is_that_of_the_loops(*random_case(0, [0, 0, 0], classes=1))


def test_diversity_gradient_equals_finite_differences():
    distances, labels, prototype_class = random_case(1, [0, 0, 1, 1, 1, 2], shape=(2, 3, 3), scale=3.0)
    assert torch.autograd.gradcheck(lambda d: diversity_loss(d, labels, prototype_class).value, distances)


@pytest.mark.parametrize("prototype_class", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2], [0, 0, 2, 2]])
def test_diversity_gradient_is_exactly_zero_at_cells_of_other_classes_and_at_ignored_ones(prototype_class):
    distances, labels, prototype_class = random_case(2, prototype_class)
    diversity_loss(distances, labels, prototype_class).value.backward()
    is_own = labels[:, None] == prototype_class[:, None, None]
    assert (distances.grad[~is_own] == 0).all()
    of_class_0 = is_own & (prototype_class == 0)[:, None, None]
    assert (distances.grad[of_class_0] != 0).all()


def test_diversity_of_a_planted_class_moves_that_class_alone():
    labels = torch.full((1, 4, 4), IGNORE)
    labels[0, 0, :] = 1
    distances = torch.rand(1, 6, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    diversity_loss(distances, labels, torch.tensor([0, 0, 1, 1, 2, 2])).value.backward()
    assert {tuple(place) for place in distances.grad.nonzero()[:, 1:3].tolist()} == {(2, 0), (3, 0)}


def test_diversity_does_not_see_what_ignored_cells_hold():
    distances, labels, prototype_class = random_case(4, [0, 0, 1, 1, 2, 2])
    for value in (0.0, 1e4):
        changed = torch.where((labels == IGNORE)[:, None], value, distances)
        ours, theirs = (diversity_loss(values, labels, prototype_class) for values in (changed, distances))
        assert ours == theirs


def test_equal_prototypes_have_diversity_one_and_opposite_ones_zero():
    labels = torch.zeros(1, 1, 4, dtype=torch.int64)
    same = torch.tensor([1.0, 5.0, 2.0, 0.0]).expand(1, 2, 4).reshape(1, 2, 1, 4)
    assert diversity_loss(same, labels, torch.tensor([0, 0])).value.item() == pytest.approx(1.0)
    opposite = torch.tensor([[60.0, 60, 0, 0], [0, 0, 60, 60]]).reshape(1, 2, 1, 4)
    assert diversity_loss(opposite, labels, torch.tensor([0, 0])).value.item() < 1e-12


def test_diversity_does_not_depend_on_the_order_of_a_pair():
    distances, labels, prototype_class = random_case(3, [0, 0, 1, 1, 2, 2])
    swapped = distances[:, [1, 0, 3, 2, 5, 4]]
    assert diversity_loss(distances, labels, prototype_class).value.item() == pytest.approx(
        diversity_loss(swapped, labels, prototype_class).value.item(), rel=1e-12
    )


@pytest.mark.parametrize(
    "labels",
    [
        torch.full((1, 3, 3), IGNORE),
        torch.tensor([[[0, IGNORE, IGNORE]] + [[IGNORE] * 3] * 2]),  # one cell of one class
        torch.full((1, 3, 3), 2),  # only a class with a single prototype
        torch.full((1, 3, 3), 3),  # only a class without prototypes
        torch.full((1, 3, 3), 7),  # and one beyond all that have any
    ],
    ids=["all ignored", "one cell", "one prototype", "no prototype", "no prototype, last"],
)
def test_diversity_without_a_pair_is_zero_with_zero_gradient(labels):
    distances = torch.rand(1, 7, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = diversity_loss(distances, labels, torch.tensor([0, 0, 1, 1, 2, 4, 4])).value
    loss.backward()
    assert loss.item() == 0 and (distances.grad == 0).all()


def test_diversity_of_one_prototype_a_class_is_zero():
    assert_diversity_is_that_of_the_loops(*random_case(0, [0, 1, 2]))


@pytest.mark.parametrize("prototype_class", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 2, 1], [5, 1], [5]])
def test_purity_loss_equals_the_loops(prototype_class):
    for seed in range(3):
        activations, labels, classes = random_case(seed, prototype_class, scale=4.0)
        labels[0][labels[0] == 2] = 1  # class 2 is in the second image alone: the batch is searched, not an image
        expected, count = make_golden.purity(activations.detach().numpy(), labels.numpy(), classes.numpy())
        loss = purity_loss(activations, labels, classes)
        assert loss.value.item() == pytest.approx(expected, rel=1e-12)
        assert loss.count == count == sum(c != 5 for c in prototype_class)


def test_purity_loss_of_planted_cells():
    labels = torch.tensor([[[0, 1, IGNORE]], [[0, 1, 1]]])
    activations = torch.tensor([[[[1.0, 2.0, 99.0]]], [[[4.0, 3.0, 0.0]]]])  # highest: 4 at its own class, 3 elsewhere
    assert purity_loss(activations, labels, torch.tensor([0])).value.item() == pytest.approx(np.log1p(np.exp(-3)))
    assert purity_loss(activations, labels, torch.tensor([1])).value.item() == pytest.approx(np.log1p(np.exp(3)))
    alike = torch.ones(2, 2, 1, 3)
    assert purity_loss(alike, labels, torch.tensor([0, 1])).value.item() == pytest.approx(np.log(2))


def test_purity_loss_gradient_equals_finite_differences_and_moves_two_cells_a_prototype():
    activations, labels, prototype_class = random_case(1, [0, 0, 1, 2, 5])
    assert torch.autograd.gradcheck(lambda a: purity_loss(a, labels, prototype_class).value, activations)
    purity_loss(activations, labels, prototype_class).value.backward()
    gradient = activations.grad.transpose(0, 1).flatten(1)
    is_own = labels.flatten() == prototype_class[:, None]
    assert (gradient[:4][is_own[:4]] <= 0).all() and (gradient[:4][~is_own[:4]] >= 0).all()
    assert (gradient != 0).sum(1).tolist() == [2, 2, 2, 2, 0] and (gradient[:, labels.flatten() == IGNORE] == 0).all()


@pytest.mark.parametrize("label", [IGNORE, 0, 7], ids=["all ignored", "one class", "a class without prototypes"])
def test_purity_loss_without_two_classes_is_zero_with_zero_gradient(label):
    activations = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = purity_loss(activations, torch.full((1, 3, 3), label), torch.tensor([0, 1])).value
    loss.backward()
    assert loss.item() == 0 and (activations.grad == 0).all()


def test_cross_entropy_counts_labelled_cells_alone():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = random_case(0, [0])[1][:, :4, :4]
    expected = make_golden.cross_entropy(logits.numpy(), labels.numpy())
    assert cross_entropy(logits, labels).value.item() == pytest.approx(expected, rel=1e-12)
    assert cross_entropy(logits, labels).value.item() == pytest.approx(
        F.cross_entropy(logits, labels, ignore_index=IGNORE).item(), rel=1e-12
    )
    changed = logits + 1000 * (labels == IGNORE)[:, None] * torch.arange(3)[:, None, None]
    assert torch.equal(cross_entropy(changed, labels).value, cross_entropy(logits, labels).value)


def test_an_all_ignored_batch_has_no_cross_entropy_and_no_gradient():
    logits = torch.randn(2, 3, 4, 4).requires_grad_()
    loss = cross_entropy(logits, torch.full((2, 4, 4), IGNORE)).value
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_cross_entropy_gradient_is_zero_at_ignored_cells():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = random_case(0, [0])[1]
    cross_entropy(logits, labels).value.backward()
    is_ignored = (labels == IGNORE)[:, None].expand_as(logits)
    assert (logits.grad[is_ignored] == 0).all() and (logits.grad[~is_ignored] != 0).all()


def test_l1_leaves_own_connections_alone():
    weight = torch.tensor([[2.0, -3.0, 0.5], [-1.0, 4.0, 0.25]]).requires_grad_()
    loss = l1_loss(weight, torch.tensor([0, 1, 1])).value
    loss.backward()
    assert loss.item() == 3.0 + 0.5 + 1.0
    assert weight.grad.tolist() == [[0, -1, 1], [-1, 0, 0]]
