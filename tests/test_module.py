"""What each phase trains and what it leaves alone, the training step, validation, and the state of a resume."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import module
from config import Config, config_to_dict
from inference import load_weights, open_model
from losses import cross_entropy, diversity_loss, l1_loss, purity_loss
from model import PPNet, construct_PPNet, outputs_at_scales
from module import NotFiniteError, TrainingModule, freeze_and_group, group_of_each, lr_factor
from runtime.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from runtime.device import choose_device
from runtime.errors import ConfigError, UserError
from tests.test_distributed import finish, start
from tests.tiny import CONFIG, ROOT, EveryEighthPixel, RandomImages, tiny_config, tiny_ppnet

CPU = torch.device("cpu")
IGNORE = 255
PHASES = {0: "warmup", 1: "joint", 2: "finetune"}
TRAINED = {
    0: {"add_on", "prototypes", "last_layer"},
    1: {"backbone", "add_on", "prototypes", "last_layer"},
    2: {"last_layer"},
}


def make(phase, *overrides) -> TrainingModule:
    """A TrainingModule of tiny.yaml with a bottleneck, so that the add-on layers have weights, at a phase's start."""
    torch.manual_seed(0)
    config = tiny_config("model.add_on_layers_type=bottleneck", *overrides)
    trainer = TrainingModule(config, construct_PPNet(config.model), CPU)
    trainer.begin_phase(phase)
    return trainer


def batch(seed=0, size=33):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (2, 6, 6), generator=generator)
    labels = labels.masked_fill(labels == 6, IGNORE).repeat_interleave(6, 1).repeat_interleave(6, 2)
    return torch.randn(2, 3, size, size, generator=generator), labels[:, :size, :size]


def train(trainer, steps=3):
    for seed in range(steps):
        trainer.training_step(*batch(seed))
    return trainer


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- what is trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_bn", [True, False])
@pytest.mark.parametrize("phase", PHASES, ids=PHASES.get)
def test_each_phase_moves_exactly_its_groups_and_all_else_stays_bit_equal(workdir, phase, frozen_bn):
    trainer = make(phase, f"model.freeze_bn={str(frozen_bn).lower()}")
    before = copied(trainer.model)
    train(trainer)
    assert trainer.model.training
    bn = {n for n, m in trainer.model.named_modules() if isinstance(m, _BatchNorm)}
    groups = group_of_each(trainer.model)
    for name, value in trainer.model.state_dict().items():
        in_bn = name.rpartition(".")[0] in bn  # whose statistics move with the backbone
        moves = (
            groups.get(name, "backbone") in TRAINED[phase] and not (in_bn and frozen_bn) and name != "prototype_class"
        )
        assert torch.equal(value, before[name]) != moves, name


def test_frozen_statistics_survive_train_and_validation(workdir):
    trainer = make(1, "model.freeze_bn=true")
    before = copied(trainer.model)
    train(trainer, 1)
    trainer.inference.validate(RandomImages(2, 6))
    assert not trainer.model.training
    train(trainer, 1)
    assert trainer.model.training
    statistics = [name for name in before if "running" in name or "num_batches" in name]
    assert statistics and all(torch.equal(trainer.model.state_dict()[n], before[n]) for n in statistics)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("features.backbone.conv1.weight", "backbone"),
        ("features.backbone.layer4.0.bn1.bias", "backbone"),
        ("features.aspp.branches.0.weight", "add_on"),
        ("add_on_layers.0.weight", "add_on"),
        ("prototype_vectors", "prototypes"),
        ("last_layer.weight", "last_layer"),
    ],
)
def test_every_parameter_has_its_group(workdir, name, group):
    assert group_of_each(make(0).model)[name] == group


class Declared(EveryEighthPixel):
    """Features that say which groups their parameters are in."""

    groups: dict

    def parameter_groups(self):
        parameters = dict(self.named_parameters())
        return {group: [(name, parameters[name]) for name in names] for group, names in self.groups.items()}


def declared(**groups):
    model = tiny_ppnet()
    model.features.__class__ = Declared
    model.features.groups = groups
    return model


def test_features_say_which_groups_they_have_and_are_the_backbone_if_they_do_not():
    groups = group_of_each(declared(add_on=["project.bias"], backbone=["project.weight"]))
    assert (groups["features.project.bias"], groups["features.project.weight"]) == ("add_on", "backbone")
    assert list(groups) == [name for name, _ in tiny_ppnet().named_parameters()]
    assert group_of_each(tiny_ppnet())["features.project.bias"] == "backbone"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"backbone": ["project.weight"]}, "features.project.bias is in no group: "),
        (
            {"backbone": ["project.weight", "project.bias"], "add_on": ["project.bias"]},
            "bias is in add_on and backbone: ",
        ),
        ({"backbone": ["project.weight"], "neck": ["project.bias"]}, "bias is in neck: .* one of backbone, add_on, "),
    ],
)
def test_a_parameter_that_is_not_in_one_group_ends_the_run_by_name(workdir, groups, message):
    trainer = TrainingModule(tiny_config(), declared(**groups), CPU)
    with pytest.raises(UserError, match=message) as caught:
        trainer.begin_phase(2)
    assert caught.value.exit_code == 2


def test_a_parameter_of_a_new_part_of_the_model_is_in_no_group(workdir):
    model = tiny_ppnet()
    model.scale_head = nn.Linear(2, 2)
    with pytest.raises(UserError, match="the parameter scale_head.weight is in no group"):
        TrainingModule(tiny_config(), model, CPU).begin_phase(0)


def test_weight_decay_is_for_backbone_and_add_on_alone(workdir):
    groups = {group["name"]: group for group in make(1).phase.optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "backbone": 5e-4, "add_on": 5e-4, "prototypes": 0.0, "last_layer": 0.0,
    }  # fmt: skip


def test_the_published_learning_rates_reach_the_optimizer():
    model = tiny_ppnet()
    for phase in Config().training.phases:
        groups = freeze_and_group(model, phase, 5e-4, True)
        assert {group["name"]: group["lr"] for group in groups} == {
            name: rate for name, rate in phase.lr.trained.items() if name != "add_on"
        }
        group_of = group_of_each(model)
        assert all(p.requires_grad == (group_of[n] in phase.lr.trained) for n, p in model.named_parameters())


def test_thawing_is_undone_by_the_next_phase(workdir):
    trainer = make(1)
    trainer.begin_phase(2)
    assert [name for name, p in trainer.model.named_parameters() if p.requires_grad] == ["last_layer.weight"]
    trainer.begin_phase(1)
    assert all(p.requires_grad for p in trainer.model.parameters())


# --- what is differentiated ------------------------------------------------------------------------------------


def graph_of(trainer):
    """Which modules' outputs require grad in one step, and how many bytes autograd keeps for it."""
    with_grad, kept, hooks = set(), {}, []
    for name, layer in trainer.model.named_modules():
        if not list(layer.children()):
            hooks.append(layer.register_forward_hook(lambda m, i, out, n=name: note(n, out)))

    def note(name, output):
        if output.requires_grad:
            with_grad.add(name)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.training_step(*batch())
    for hook in hooks:
        hook.remove()
    return with_grad, sum(kept.values())


def test_warmup_builds_no_graph_for_the_backbone(workdir):
    with_grad, kept = graph_of(make(0))
    assert with_grad and not [name for name in with_grad if name.startswith("features.backbone")]
    assert any(name.startswith("features.aspp") for name in with_grad)
    assert kept < graph_of(make(1))[1] / 1.5


def test_finetuning_builds_a_graph_for_the_last_layer_alone(workdir):
    trainer = make(2)
    with_grad, kept = graph_of(trainer)
    assert with_grad == set()  # the last layer is applied as a matrix, after all modules
    output = trainer.model(batch()[0])
    assert output.logits.requires_grad and not output.distances.requires_grad
    assert kept < graph_of(make(0))[1] / 2


def test_the_joint_phase_differentiates_everything(workdir):
    with_grad, _ = graph_of(make(1))
    assert {"features.backbone.conv1", "features.backbone.layer4.0.bn2", "features.aspp.branches.3"} <= with_grad


def test_nothing_frozen_gets_a_gradient(workdir):
    for phase, groups in TRAINED.items():
        trainer = make(phase, "model.freeze_bn=true", "training.iter_size=100")
        train(trainer, 1)
        group_of = group_of_each(trainer.model)
        with_gradient = {group_of[n] for n, p in trainer.model.named_parameters() if p.grad is not None}
        assert with_gradient == groups


# --- the step --------------------------------------------------------------------------------------------------


def terms_of(trainer, images, labels):
    return trainer.loss_terms(trainer._inputs(images, labels))


def test_the_losses_of_a_step_are_those_of_the_functions(workdir):
    trainer = make(1, "model.freeze_bn=true", "training.loss_weights.purity=0.5")
    images, labels = batch()
    with torch.no_grad():
        logits, distances = trainer.model(images)
    cells = trainer.model.grid.labels(labels, logits.shape[2:])
    classes = trainer.model.prototype_class
    expected = {
        "cross_entropy": cross_entropy(logits, cells).value.item(),
        "l1": l1_loss(trainer.model.last_layer.weight, classes).value.item(),
        "diversity": diversity_loss(distances, cells, classes).value.item(),
        "purity": purity_loss(trainer.model.activations(distances), cells, classes).value.item(),
    }
    right, counted = (logits.argmax(1) == cells).sum().item(), (cells != IGNORE).sum().item()
    trainer.training_step(images, labels)
    averages = trainer.take_averages()
    assert {name: averages[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    total = expected["cross_entropy"] + 1e-4 * expected["l1"] + 0.25 * expected["diversity"]
    total += 0.5 * expected["purity"]
    assert averages["total"] == pytest.approx(total, rel=1e-5)
    assert averages["train_accuracy"] == right / counted


def test_averages_are_over_the_steps_since_they_were_last_taken(workdir):
    trainer = make(0, "training.iter_size=100", "training.phases.0.steps=100")
    single = []
    for seed in range(3):
        trainer.training_step(*batch(seed))
        single.append(trainer.take_averages()["cross_entropy"])
    train(trainer, 3)
    assert trainer.take_averages()["cross_entropy"] == pytest.approx(np.mean(single), rel=1e-6)


def test_an_update_happens_every_iter_size_steps_and_at_the_last(workdir):
    trainer = make(0)  # 3 steps, iter_size 2
    moved = []
    for seed in range(3):
        before = trainer.model.last_layer.weight.clone()
        trainer.training_step(*batch(seed))
        moved.append(not torch.equal(trainer.model.last_layer.weight, before))
    assert moved == [False, True, True]


def test_accumulated_gradients_are_averaged(workdir):
    whole, parts = make(1, "model.freeze_bn=true"), make(1, "model.freeze_bn=true", "training.iter_size=4")
    whole.phase.optimizer.step = parts.phase.optimizer.step = lambda: None
    gradients = []
    for seed in range(2):
        images, labels = batch(seed)
        total = module.weighted_sum(terms_of(whole, images, labels), whole.config.training.loss_weights)
        gradients.append(torch.autograd.grad(total, whole.model.features.aspp.branches[0].weight)[0])
        parts.training_step(images, labels)
    expected = (gradients[0] + gradients[1]) / 4
    torch.testing.assert_close(parts.model.features.aspp.branches[0].weight.grad, expected, rtol=1e-4, atol=1e-8)


def test_an_all_ignored_batch_moves_only_what_the_l1_term_and_the_decay_pull(workdir):
    trainer = make(0, "training.iter_size=1", "training.weight_decay=0", "training.loss_weights.l1=0")
    before = copied(trainer.model)
    images, labels = batch()
    trainer.training_step(images, torch.full_like(labels, IGNORE))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.take_averages()["total"] == 0.0


def test_the_poly_schedule(workdir):
    joint = Config().training.phases[1]
    assert lr_factor(joint, 0, 0.9) == 1.0
    assert lr_factor(joint, 75_000, 0.9) == pytest.approx(0.5**0.9)
    assert 0 < lr_factor(joint, joint.steps - 1, 0.9) < 1e-4
    assert lr_factor(Config().training.phases[0], 9_000, 0.9) == 1.0
    trainer = make(1)
    train(trainer, 4)
    assert trainer.phase.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 3 / 5) ** 0.9)
    assert trainer.learning_rates()["backbone"] == pytest.approx(1e-2 * (1 - 4 / 5) ** 0.9)


def test_a_multi_scale_step_averages_the_losses_over_scales_and_maximum(workdir):
    how = ("model.msc_scales=[0.5, 0.75]", "model.freeze_bn=true", "training.loss_weights.purity=1")
    trainer = make(1, *how)
    images, labels = batch()
    with torch.no_grad():
        outputs = outputs_at_scales(trainer.model, images, (0.5, 0.75))
    assert len(outputs) == 4
    classes = trainer.model.prototype_class
    cells = [trainer.model.grid.labels(labels, output.logits.shape[2:]) for output in outputs]
    ce = np.mean([cross_entropy(o.logits, c).value.item() for o, c in zip(outputs, cells, strict=True)])
    diversity = np.mean(
        [diversity_loss(o.distances, c, classes).value.item() for o, c in zip(outputs[:3], cells, strict=False)]
    )
    similarities = [trainer.model.activations(output.distances) for output in outputs[:3]]
    purity = np.mean([purity_loss(s, c, classes).value.item() for s, c in zip(similarities, cells, strict=False)])
    before = copied(trainer.model)
    trainer.training_step(images, labels)
    trainer.training_step(images, labels)
    assert not torch.equal(trainer.model.prototype_vectors, before["prototype_vectors"])
    trainer = make(1, *how)
    trainer.training_step(images, labels)
    averages = trainer.take_averages()
    found = [averages[name] for name in ("cross_entropy", "diversity", "purity")]
    assert found == pytest.approx([ce, diversity, purity], rel=1e-5)


@pytest.mark.parametrize(("diversity", "fusion", "calls"), [(1, "logits", 3), (1, "features", 4), (0, "features", 0)])
def test_a_loss_is_called_where_it_can_say_something(workdir, monkeypatch, diversity, fusion, calls):
    seen = []
    for loss in (l1_loss, diversity_loss):
        monkeypatch.setattr(module, loss.__name__, lambda *a, f=loss: (seen.append(f.__name__), f(*a))[1])
    scales = ("model.msc_scales=[0.5, 0.75]", f"model.msc_fusion={fusion}")
    train(make(1, *scales, f"training.loss_weights.diversity={diversity}"), 1)
    assert seen.count("l1_loss") == 1 and seen.count("diversity_loss") == calls


def test_images_of_any_size_are_padded_to_the_grid(workdir):
    images, labels = batch(size=36)
    padded, unlabelled = torch.zeros(2, 3, 41, 41), torch.full((2, 41, 41), IGNORE)
    padded[..., :36, :36], unlabelled[:, :36, :36] = images, labels
    odd, whole = make(1, "model.freeze_bn=true"), make(1, "model.freeze_bn=true")
    odd.training_step(images, labels)
    whole.training_step(padded, unlabelled)
    assert odd.take_averages() == whole.take_averages()


def test_the_twin_trains_with_cross_entropy_alone_and_has_nothing_to_finetune(workdir):
    for phase, trains in ((0, True), (1, True), (2, False)):
        trainer = make(phase, "model.head=linear")
        trainer.begin_phase(0)
        assert (trainer.begin_phase(phase) is not None) == (trainer.current_phase is not None) == trains
        if trains:
            train(trainer)
            averages = trainer.take_averages()
            assert averages["l1"] == averages["diversity"] == 0 and averages["total"] == averages["cross_entropy"] > 0
        else:
            trainer.check_weights()
            with pytest.raises(RuntimeError, match="begin_phase"):
                train(trainer, 1)


def test_twenty_updates_on_four_images_learn_them(workdir):
    trainer = make(1, "training.iter_size=1", "training.phases.1.steps=200", "model.distance_scale=0.25")
    batches = [batch(seed) for seed in range(2)]
    first = None
    for _ in range(20):
        for images, labels in batches:
            trainer.training_step(images, labels)
        averages = trainer.take_averages()
        first = first or averages["cross_entropy"]
    assert averages["cross_entropy"] < 0.7 * first


# --- losses that are not finite --------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_found_at_the_next_step_and_every_term_named(workdir, monkeypatch):
    trainer = make(1)
    train(trainer, 1)
    monkeypatch.setattr(module, "cross_entropy", lambda *a: cross_entropy(*a)._replace(total=torch.tensor(torch.nan)))
    train(trainer, 1)
    for ask in (trainer.phase.check_finite, trainer.check_weights, trainer.take_averages, lambda: train(trainer, 1)):
        with pytest.raises(NotFiniteError, match="joint.*step 2.*cross_entropy = nan, l1 = .*, diversity = ") as caught:
            ask()  # whoever asks, and however often
        assert caught.value.step == 1 and caught.value.exit_code == 6


def test_weights_that_are_not_finite_are_not_saved(workdir):
    trainer = train(make(1))
    with torch.no_grad():
        trainer.model.last_layer.weight[0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="after step 3 of .*last_layer.weight is not finite; it is not saved"):
        trainer.state()
    with pytest.raises(NotFiniteError, match="^last_layer.weight is not finite"):  # of a push, before any phase
        TrainingModule(trainer.config, trainer.model, CPU).check_weights()


# --- validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(), (0.5,)])
def test_validation_counts_every_pixel_of_every_image(workdir, scales):
    trainer, dataset = make(0, f"model.msc_scales={list(scales)}"), RandomImages(3, 6)
    counts = trainer.inference.validate(dataset).counts
    expected = torch.zeros(6, 6, dtype=torch.int64)
    grid = trainer.model.eval().grid
    with torch.no_grad():
        for image, label in dataset.items:
            padded = grid.pad(image[None], 0.0)
            logits = grid.upsample(outputs_at_scales(trainer.model, padded, scales)[-1].logits, padded.shape[2:])[0]
            found = logits[:, : label.shape[0], : label.shape[1]].argmax(0)
            for truth, answer in zip(label.flatten().tolist(), found.flatten().tolist(), strict=True):
                if truth != IGNORE:
                    expected[truth, answer] += 1
    assert torch.equal(counts, expected)


# --- the state of a resume -------------------------------------------------------------------------------------


def through_a_file(trainer):
    buffer = io.BytesIO()
    torch.save(trainer.state() | {"model": trainer.model.state_dict()}, buffer)
    buffer.seek(0)
    return SimpleNamespace(**torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("cut", range(1, 5))
@pytest.mark.parametrize("phase", PHASES, ids=PHASES.get)
def test_a_resumed_module_goes_on_bit_by_bit(workdir, phase, cut):
    how = (f"training.phases.{phase}.steps=5", "training.iter_size=3")
    straight = make(phase, *how)
    for seed in range(cut):
        straight.training_step(*batch(seed))
    resumed = make(phase, *how)
    state = through_a_file(straight)
    load_weights(resumed.model, state.model)
    resumed.begin_phase(phase)
    resumed.load_state(state, cut)
    for trainer in (straight, resumed):
        for seed in range(cut, 5):
            trainer.training_step(*batch(seed))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert straight.take_averages() == resumed.take_averages() and straight.phase.step == resumed.phase.step == 5


def test_rates_decay_and_betas_are_those_of_the_configuration_and_the_moments_those_of_the_file(workdir):
    state = through_a_file(train(make(1, "training.iter_size=1"), 2))
    for group in state.optimizer["param_groups"]:
        group |= {"lr": 9.0, "base_lr": 9.0, "weight_decay": 9.0, "betas": (0.1, 0.2), "eps": 9.0, "maximize": True}
    asked = ("training.phases.1.lr.add_on=1e-5", "training.weight_decay=0", "training.phases.1.schedule=constant")
    resumed = make(1, "training.iter_size=1", *asked)
    resumed.load_state(state, 2)
    new = make(1, *asked).phase.optimizer.param_groups
    for group, other in zip(resumed.phase.optimizer.param_groups, new, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
    assert resumed.learning_rates() == {"backbone": 1e-2, "add_on": 1e-5, "prototypes": 1e-2, "last_layer": 1e-2}
    for index, moments in enumerate(resumed.phase.optimizer.state.values()):
        assert moments.keys() == state.optimizer["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, state.optimizer["state"][index][key]) for key, value in moments.items())
    train(resumed, 1)
    assert resumed.phase.optimizer.param_groups[1]["lr"] == 1e-5


def moments_of(state):
    return state.optimizer["state"][0]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: moments_of(s).update(exp_avg=torch.zeros(3)), "moments have other shapes"),
        (lambda s: moments_of(s).update(exp_avg_sq=torch.zeros(())), "moments have other shapes"),
        (lambda s: moments_of(s).update(max_exp_avg_sq=torch.zeros(3)), "not Adam's"),
        (lambda s: moments_of(s).pop("exp_avg"), "not Adam's"),
        (lambda s: moments_of(s)["exp_avg"].fill_(torch.nan), "not finite"),
        (lambda s: moments_of(s)["exp_avg_sq"].fill_(-1.0), "negative"),
        (lambda s: moments_of(s)["step"].fill_(9), "counts 9 updates in 2 steps"),
        (lambda s: moments_of(s)["step"].fill_(0), "counts 0 updates"),
        (lambda s: moments_of(s)["step"].fill_(1.5), "counts 1.5 updates"),
        (lambda s: moments_of(s)["step"].fill_(torch.nan), "counts nan updates"),
        (lambda s: moments_of(s).update(step="2"), ""),
        (lambda s: s.optimizer["state"].update({-1: moments_of(s)}), "other parameters"),
        (lambda s: s.optimizer["state"].update({99: moments_of(s)}), "other parameters"),
        (lambda s: s.optimizer["param_groups"].pop(), "groups are others"),
        (lambda s: s.optimizer["param_groups"][0].update(name="neck"), "groups are others"),
        (lambda s: s.optimizer["param_groups"][0]["params"].pop(), "groups are others"),
        (lambda s: s.optimizer.pop("state"), "state"),
        *((lambda s, key=key: delattr(s, key), key) for key in ("optimizer", "gradients", "sums", "batches")),
        (lambda s: setattr(s, "gradients", {"prototype_vectors": torch.zeros(3)}), ""),
        (lambda s: setattr(s, "gradients", {"unknown": torch.zeros(3)}), "unknown"),
        (lambda s: setattr(s, "sums", torch.zeros(1)), "losses"),
        (lambda s: setattr(s, "sums", torch.zeros(7)), "it sums 5 losses, not 4"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(workdir, harm, message):
    state = through_a_file(train(make(1), 2))
    harm(state)
    with pytest.raises(CheckpointError, match=f"does not fit the phase 'joint': .*{message}"):
        make(1).load_state(state, 2)


def test_a_gradient_of_what_is_frozen_is_refused(workdir):
    state = through_a_file(train(make(2), 1))
    state.gradients["prototype_vectors"] = torch.zeros(12, 8, 1, 1)
    with pytest.raises(CheckpointError, match="prototype_vectors"):
        make(2).load_state(state, 1)


def test_a_step_beyond_the_phase_is_refused(workdir):
    with pytest.raises(CheckpointError, match="this checkpoint is of step 9; 'joint' has 5 steps"):
        make(1).load_state(through_a_file(train(make(1), 1)), 9)


def test_a_state_of_another_phase_is_refused(workdir):
    state = through_a_file(train(make(1), 1))
    with pytest.raises(CheckpointError, match="does not fit the phase 'finetune'"):
        make(2).load_state(state, 1)


@pytest.mark.parametrize("frozen_bn", [True, False])
@pytest.mark.parametrize("phase", PHASES, ids=PHASES.get)
def test_what_a_phase_changes_brings_back_the_whole_model(workdir, phase, frozen_bn):
    trainer = make(phase, f"model.freeze_bn={str(frozen_bn).lower()}", "training.iter_size=1")
    train(trainer, 1)
    whole, best = copied(trainer.model), trainer.trained_state()
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert best.keys() == whole.keys() - frozen
    train(trainer, 2)
    trainer.model.load_state_dict(best, strict=False)
    assert all(torch.equal(value, whole[name]) for name, value in trainer.model.state_dict().items())


# --- loading weights -------------------------------------------------------------------------------------------


def test_a_pruned_model_comes_back_with_its_shapes():
    pruned, fresh = tiny_ppnet(seed=1), tiny_ppnet(seed=2)
    pruned.keep_prototypes(torch.tensor([0, 3, 4, 5]))
    load_weights(fresh, pruned.state_dict())
    assert fresh.prototype_class.tolist() == [0, 1, 2, 2] and fresh.last_layer.in_features == 4
    image = torch.rand(1, 3, 17, 17)
    assert torch.equal(fresh.predict(image), pruned.predict(image))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: s.pop("last_layer.weight"), "last_layer.weight is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda s: s.update(prototype_vectors=torch.zeros(6, 4, 1, 1)), r"prototype_vectors has shape \[6, 4, 1, 1\]"),
        (lambda s: s.update(prototype_vectors=torch.zeros(4, 5, 1, 1)), "prototype_vectors has shape"),
        (lambda s: s["last_layer.weight"].fill_(torch.nan), "last_layer.weight is not finite float32"),
        (lambda s: s.update(prototype_class=torch.zeros(6)), "prototype_class is not finite int64"),
        (lambda s: s.update({"last_layer.weight": "text"}), "not a state dict"),
        (lambda s: s.update(prototype_class=torch.zeros(0, dtype=torch.int64)), "prototype_class has shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(harm, message):
    model, state = tiny_ppnet(seed=1), copied(tiny_ppnet(seed=2))
    before = copied(model)
    harm(state)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_comes_back_from_its_checkpoint_alone(workdir):
    trainer = make(1)
    trainer.model.keep_prototypes(torch.tensor([0, 2, 5, 9]))
    state = Checkpoint(config_to_dict(trainer.config), "joint", 1, 5, dict(trainer.model.state_dict()))
    save_checkpoint(workdir / "some.pth", state)
    saved = open_model(workdir / "some.pth")
    model = saved.model
    assert isinstance(model, PPNet) and not model.training
    assert saved.config == trainer.config and saved.checkpoint.step == 5
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in model.state_dict().items())
    save_checkpoint(workdir / "some.pth", state.with_(config={"modle": {}}))
    with pytest.raises(CheckpointError, match="some.pth: its configuration cannot be used: .*modle"):
        open_model(workdir / "some.pth")


def test_devices():
    assert choose_device("cpu").type == "cpu" and isinstance(choose_device("auto"), torch.device)
    with pytest.raises(ConfigError, match="there is no cuda:99 here; use auto or cpu"):
        choose_device("cuda:99")


def test_bfloat16_on_request(workdir):
    trainer = make(1, "system.precision=bfloat16")
    seen = []
    trainer.model.features.aspp.branches[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    train(trainer, 2)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert np.isfinite(trainer.take_averages()["total"])


def test_every_batch_norm_of_the_network_is_in_the_backbone(workdir):
    norms = [n for n, m in make(1).model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(name.startswith("features.backbone.") for name in norms)


def test_a_compiled_backbone_computes_the_same_and_keeps_its_names(workdir, monkeypatch):
    backends = []

    def without_a_compiler(function, **how):  # the graph is captured, and run as it is
        backends.append(how)
        return original(function, backend="eager")

    original = torch.compile
    plain = make(1, "model.freeze_bn=true")
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    compiled = make(1, "model.freeze_bn=true", "system.compile=true")
    train(plain, 2), train(compiled, 2)
    assert len(backends) == 1
    assert compiled.take_averages() == pytest.approx(plain.take_averages())
    weights = compiled.model.state_dict()
    assert weights.keys() == plain.model.state_dict().keys()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_one_large_batch_makes_the_update_of_several_small_ones(workdir):
    """As long as every image has as many labelled cells, and without the terms that are means over other things."""
    how = ("model.freeze_bn=true", "training.loss_weights.diversity=0")
    small = make(1, *how, "training.iter_size=2")
    large = make(1, *how, "training.iter_size=1")
    batches = [batch(seed) for seed in range(2)]
    batches = [(images, labels.masked_fill(labels == IGNORE, 0)) for images, labels in batches]
    for images, labels in batches:
        small.training_step(images, labels)
    large.training_step(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    states = (trainer.phase.optimizer.state for trainer in (small, large))
    for (name, one), (_, other) in zip(*(state.items() for state in states), strict=True):
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], rtol=1e-3, atol=1e-7, msg=str(name.shape))


def test_class_weights_weigh_the_cross_entropy(workdir):
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    plain, weighted = make(1), make(1, f"training.class_weights={weights}")
    images, labels = batch()
    for trainer, expected in ((plain, None), (weighted, torch.tensor(weights))):
        (inputs,) = trainer._inputs(images, labels)
        theirs = torch.nn.functional.cross_entropy(inputs.logits, inputs.labels, expected, ignore_index=IGNORE)
        torch.testing.assert_close(trainer.loss_terms([inputs])["cross_entropy"], theirs)


# --- a loss of one's own, in several processes -----------------------------------------------------------------

OWN_LOSSES = {
    "config.py": ("    spread: float = 0.1\n    entropy: float = 0.5\n", r"class LossWeights:.*?\n(?=\n\n)"),
    "losses.py": (
        """

def spread_loss(prototypes: Tensor, prototype_class: Tensor) -> Mean:
    vectors = prototypes.flatten(1)
    same = (prototype_class[:, None] == prototype_class).to(vectors.device).triu(1)
    return Mean((torch.exp(-torch.cdist(vectors, vectors).square()) * same).sum(), same.sum())


def entropy_loss(logits: Tensor, labels: Tensor) -> Mean:
    counts = labels != IGNORE
    return Mean((-(logits.softmax(1) * logits.log_softmax(1)).sum(1) * counts).sum(), counts.sum())
""",
        r".*",
    ),
    "module.py": (
        """
from losses import entropy_loss, spread_loss
LOSSES["spread"] = "weights", lambda i: spread_loss(i.model.prototype_vectors, i.prototype_class)
LOSSES["entropy"] = "logits", lambda i: entropy_loss(i.logits, i.labels)
""",
        r".*",
    ),
}
STEP = """
import torch
import deeplab_features
from config import load_config
from model import construct_PPNet
from module import LOSS_NAMES, TrainingModule
from runtime import distributed
from tests.tiny import TinyResNet

distributed.start(30)
rank, size = distributed.rank(), distributed.world_size()
deeplab_features.BACKBONES["resnet18"] = TinyResNet, None
weights = "training.class_weights=[1, 2, 3, 1, 2, 3]"
config = load_config("tiny.yaml", ["model.freeze_bn=true", "training.iter_size=1", "system.timeout=30", weights])
torch.manual_seed(0)
trainer = TrainingModule(config, construct_PPNet(config.model), torch.device("cpu"))
trainer.begin_phase(1)
images, labels = torch.randn(4, 3, 33, 33), torch.randint(0, 6, (4, 33, 33))
labels[1:3, :9], labels[3] = 255, 255  # the processes see different numbers of labelled cells
own = slice(rank * 4 // size, (rank + 1) * 4 // size)
trainer.training_step(images[own], labels[own])
moments = trainer.state()["optimizer"]["state"]
found = {i: values["exp_avg"] for i, values in moments.items()} | trainer.take_averages()
torch.save(found, f"{size}.pth")
"""


def test_a_loss_of_ones_own_is_the_same_mean_in_two_processes_as_in_one(tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        if path.parent.name != "tests":
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(path.read_text())
    for name, (lines, after) in OWN_LOSSES.items():
        source = (tmp_path / name).read_text()
        place = re.search(after, source, re.DOTALL).end()
        (tmp_path / name).write_text(source[:place] + lines + source[place:])
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    for processes in (1, 2):
        assert finish(start(tmp_path, STEP, processes)) == [0] * processes
    one, two = (torch.load(tmp_path / f"{processes}.pth", weights_only=True) for processes in (1, 2))
    assert one["spread"] > 0 and one["entropy"] > 0 and one["diversity"] > 0
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-7, msg=f"{name}: {two[name]} {value}")
