"""What each phase trains and what it leaves alone, the training step, validation, and the state of a resume."""

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import module
from config import Config, config_to_dict
from losses import cross_entropy, diversity_loss, l1_loss, purity_loss
from model import PPNet, cell_labels, construct_PPNet, multi_scale_outputs
from module import NotFiniteError, TrainingModule, freeze_and_group, group_of, load_model, load_weights, lr_factor
from runtime.checkpoint import CheckpointError, save_checkpoint
from runtime.device import choose_device
from runtime.errors import ConfigError
from tests.tiny import RandomImages, tiny_config, tiny_ppnet

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
    for name, value in trainer.model.state_dict().items():
        in_bn = name.rpartition(".")[0] in bn
        moves = group_of(name) in TRAINED[phase] and not (in_bn and frozen_bn) and name != "prototype_class"
        assert torch.equal(value, before[name]) != moves, name


def test_frozen_statistics_survive_train_and_validation(workdir):
    trainer = make(1, "model.freeze_bn=true")
    before = copied(trainer.model)
    train(trainer, 1)
    trainer.validate(RandomImages(2, 6))
    trainer.model.train()
    train(trainer, 1)
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
def test_every_parameter_has_its_group(name, group):
    assert group_of(name) == group


def test_weight_decay_is_for_backbone_and_add_on_alone(workdir):
    groups = {group["name"]: group for group in make(1).optimizer.param_groups}
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
        assert all(p.requires_grad == (group_of(n) in phase.lr.trained) for n, p in model.named_parameters())


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
        with_gradient = {group_of(n) for n, p in trainer.model.named_parameters() if p.grad is not None}
        assert with_gradient == groups


# --- the step --------------------------------------------------------------------------------------------------


def test_the_losses_of_a_step_are_those_of_the_functions(workdir):
    trainer = make(1, "model.freeze_bn=true", "training.loss_weights.purity=0.5")
    images, labels = batch()
    with torch.no_grad():
        logits, distances = trainer.model(images)
    cells = cell_labels(labels, logits.shape[2:])
    classes = trainer.model.prototype_class
    expected = {
        "cross_entropy": cross_entropy(logits, cells).item(),
        "l1": l1_loss(trainer.model.last_layer.weight, classes).item(),
        "diversity": diversity_loss(distances, cells, classes).item(),
        "purity": purity_loss(trainer.model.activations(distances), cells, classes).item(),
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
    whole.optimizer.step = parts.optimizer.step = lambda: None
    gradients = []
    for seed in range(2):
        images, labels = batch(seed)
        outputs = multi_scale_outputs(whole.model, images, ())
        total = module.weighted_sum(whole.loss_terms(outputs[:1], labels), whole.config.training.loss_weights)
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
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 3 / 5) ** 0.9)
    assert trainer.learning_rates()["backbone"] == pytest.approx(1e-2 * (1 - 4 / 5) ** 0.9)


def test_a_multi_scale_step_averages_the_losses_over_scales_and_maximum(workdir):
    how = ("model.msc_scales=[0.5, 0.75]", "model.freeze_bn=true", "training.loss_weights.purity=1")
    trainer = make(1, *how)
    images, labels = batch()
    with torch.no_grad():
        outputs = multi_scale_outputs(trainer.model, images, (0.5, 0.75))
    assert len(outputs) == 4
    classes = trainer.model.prototype_class
    cells = [cell_labels(labels, output.logits.shape[2:]) for output in outputs]
    ce = np.mean([cross_entropy(o.logits, c).item() for o, c in zip(outputs, cells, strict=True)])
    diversity = np.mean(
        [diversity_loss(o.distances, c, classes).item() for o, c in zip(outputs[:3], cells, strict=False)]
    )
    similarities = [trainer.model.activations(output.distances) for output in outputs[:3]]
    purity = np.mean([purity_loss(s, c, classes).item() for s, c in zip(similarities, cells, strict=False)])
    before = copied(trainer.model)
    trainer.training_step(images, labels)
    trainer.training_step(images, labels)
    assert not torch.equal(trainer.model.prototype_vectors, before["prototype_vectors"])
    trainer = make(1, *how)
    trainer.training_step(images, labels)
    averages = trainer.take_averages()
    found = [averages[name] for name in ("cross_entropy", "diversity", "purity")]
    assert found == pytest.approx([ce, diversity, purity], rel=1e-5)


def test_the_twin_trains_with_cross_entropy_alone_and_has_nothing_to_finetune(workdir):
    for phase, trains in ((0, True), (1, True), (2, False)):
        trainer = make(phase, "model.head=linear")
        assert (trainer.optimizer is not None) == trains
        if trains:
            train(trainer)
            averages = trainer.take_averages()
            assert averages["l1"] == averages["diversity"] == 0 and averages["total"] == averages["cross_entropy"] > 0


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
    monkeypatch.setattr(module, "cross_entropy", lambda *tensors: cross_entropy(*tensors) * torch.nan)
    train(trainer, 1)
    with pytest.raises(NotFiniteError, match="joint.*step 2.*cross_entropy = nan, l1 = .*, diversity = ") as caught:
        train(trainer, 1)
    assert caught.value.step == 1 and caught.value.exit_code == 6


def test_weights_that_are_not_finite_are_not_saved(workdir):
    trainer = train(make(1))
    with torch.no_grad():
        trainer.model.last_layer.weight[0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="last_layer.weight is not finite; it is not saved"):
        trainer.state()


# --- validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["[]", "[0.5]"])
def test_validation_counts_every_pixel_of_every_image(workdir, scales):
    trainer, dataset = make(0, f"model.msc_scales={scales}"), RandomImages(3, 6)
    counts = trainer.validate(dataset).counts
    assert trainer.model.training
    expected = torch.zeros(6, 6, dtype=torch.int64)
    trainer.model.eval()
    with torch.no_grad():
        for image, label in dataset.items:
            logits = trainer.model.predict_multi_scale(image[None], (0.5,) if scales == "[0.5]" else ())[0]
            for truth, found in zip(label.flatten().tolist(), logits.argmax(0).flatten().tolist(), strict=True):
                if truth != IGNORE:
                    expected[truth, found] += 1
    assert torch.equal(counts, expected)


# --- the state of a resume -------------------------------------------------------------------------------------


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("cut", range(1, 5))
@pytest.mark.parametrize("phase", PHASES, ids=PHASES.get)
def test_a_resumed_module_goes_on_bit_by_bit(workdir, phase, cut):
    how = (f"training.phases.{phase}.steps=5", "training.iter_size=3")
    straight = make(phase, *how)
    for seed in range(cut):
        straight.training_step(*batch(seed))
    resumed = make(phase, *how)
    state = through_a_file(straight.state())
    load_weights(resumed.model, state["model"])
    resumed.begin_phase(phase)
    resumed.load_state(state, cut)
    for trainer in (straight, resumed):
        for seed in range(cut, 5):
            trainer.training_step(*batch(seed))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert straight.take_averages() == resumed.take_averages() and straight.step == resumed.step == 5


@pytest.mark.parametrize("key", ["optimizer", "gradients", "sums", "batches"])
def test_a_state_without_a_part_is_refused(workdir, key):
    trainer = train(make(1), 1)
    state = trainer.state()
    del state[key]
    with pytest.raises(CheckpointError, match=f"cannot be resumed exactly: {key} missing"):
        trainer.load_state(state, 1)


def test_a_state_of_another_phase_is_refused(workdir):
    state = train(make(1), 1).state()
    with pytest.raises(CheckpointError, match="does not fit the phase 'finetune'"):
        make(2).load_state(state, 1)


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
    state = {"config": config_to_dict(trainer.config), "phase": 1, "step": 5, "model": trainer.model.state_dict()}
    save_checkpoint(workdir / "some.pth", state)
    model, config, loaded = load_model(workdir / "some.pth")
    assert isinstance(model, PPNet) and not model.training and config == trainer.config and loaded["step"] == 5
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in model.state_dict().items())
    save_checkpoint(workdir / "some.pth", state | {"config": {"modle": {}}})
    with pytest.raises(CheckpointError, match="some.pth: its configuration cannot be used: .*modle"):
        load_model(workdir / "some.pth")


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
    for (name, one), other in zip(small.optimizer.state.items(), large.optimizer.state.values(), strict=True):
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], rtol=1e-3, atol=1e-7, msg=str(name.shape))


def test_class_weights_weigh_the_cross_entropy(workdir):
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    plain, weighted = make(1), make(1, f"training.class_weights={weights}")
    images, labels = batch()
    for trainer, expected in ((plain, None), (weighted, torch.tensor(weights))):
        outputs = multi_scale_outputs(trainer.model, images, ())[:1]
        cells = cell_labels(labels, outputs[0].logits.shape[2:])
        terms = trainer.loss_terms(outputs, labels)
        theirs = torch.nn.functional.cross_entropy(outputs[0].logits, cells, expected, ignore_index=IGNORE)
        torch.testing.assert_close(terms["cross_entropy"], theirs)
