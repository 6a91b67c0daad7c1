"""Checkpoint files under attack: killed and failing saves, full disks, cut, rotten, wrong and malicious files
(rows 5 to 12 of the fault battery).

What must hold: a save that was announced is never lost, a file is loaded whole or refused with one line, and no file
runs code.
"""

import builtins
import errno
import io
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import nn

from config import config_to_dict
from inference import load_weights, open_model
from model import construct_PPNet
from runtime import checkpoint, files
from runtime.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_last,
    load_tensors,
    previous,
    save_checkpoint,
)
from runtime.checkpoint_content import MIDWAY
from tests.reliability.faults import KILLED, Child, Place, contents, difference
from tests.tiny import tiny_config, tiny_ppnet

STATE = {
    "config": {"a": [1, 2.5, None, True], "text": "ü" * 50}, "phase": 1, "step": 7, "stage": "joint",
    "model": {"w": torch.arange(600.0), "b": torch.arange(7)},
}  # fmt: skip


def state(step):
    return Checkpoint(**{**STATE, "step": step})


@pytest.fixture
def file(tmp_path):
    """A checkpoint of step 2, its predecessor of step 1 beside it."""
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "last.pth"
    save_checkpoint(path, state(1))
    save_checkpoint(path, state(2), keep_previous=True)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- rows 5 and 6: killed, or failing, at every call of a save ----------------------------------------------------


class Moments:
    """Calls `act` at the n-th thing that a save asks of the file system; counts them."""

    def __init__(self, n, act):
        self.n, self.act, self.count = n, act, 0

    def __call__(self, *_):
        self.count += 1
        if self.count == self.n:
            self.act()

    def watch(self, monkeypatch):
        def open_watched(path, mode="r"):
            self()
            return Watched(io.FileIO(path, mode), self)

        monkeypatch.setattr(files, "open", open_watched, raising=False)
        for module, name in (
            (os, "fsync"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "link"), (checkpoint, "load_tensors"),
        ):  # fmt: skip
            real = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, real=real, **k: (self(), real(*a, **k))[1])


class Watched(io.BufferedWriter):
    """A file without a buffer of its own to speak of, so that its writes are moments, too."""

    def __init__(self, raw, moment):
        super().__init__(raw, buffer_size=1)
        self.moment = moment

    def write(self, data):
        self.moment()
        return super().write(data)


def moments_of_a_save(file, monkeypatch):
    counter = Moments(0, None)
    with monkeypatch.context() as patch:
        counter.watch(patch)
        save_checkpoint(file, state(2), keep_previous=True)
    assert counter.count > 10
    return range(1, counter.count + 1)


def test_row_5_kill_9_at_every_call_of_a_save(file, monkeypatch):
    for n in moments_of_a_save(file, monkeypatch):
        save_checkpoint(file, state(1))
        save_checkpoint(file, state(2), keep_previous=True)

        def save(n=n):
            moments = Moments(n, lambda: os.kill(os.getpid(), 9))
            moments.watch(monkeypatch)
            save_checkpoint(file, state(3), keep_previous=True)

        assert Child(save, file.parent.parent / "log").end() == KILLED, n
        found, path = load_last(file)
        assert found.step in (2, 3) and difference(contents(found), contents(state(found.step))) is None, n
        save_checkpoint(file, state(4), keep_previous=True)
        assert names(file.parent) == ["last.prev.pth", "last.pth"], n


@pytest.mark.parametrize("kills", [100, pytest.param(2000, marks=pytest.mark.nightly)])
def test_row_5_kill_9_at_random_times_of_saving(file, rng, kills):
    told = file.parent.parent / "told"
    told.write_text("2")

    def save_for_ever():
        step = int(told.read_text())
        while True:
            step += 1
            save_checkpoint(file, state(step), keep_previous=True)
            told.write_text(f"{step:9}")

    saves = 0
    for _ in range(kills):
        child = Child(save_for_ever, file.parent.parent / "log")
        assert child.wait(rng.uniform(0.0, 0.05)) is None, child.said()
        child.kill()
        assert child.end() == KILLED
        acknowledged = int(told.read_text() or saves)
        saves = load_last(file)[0].step
        assert saves >= acknowledged
        told.write_text(str(saves))
    save_checkpoint(file, state(0))
    assert names(file.parent) == ["last.prev.pth", "last.pth"]
    assert saves > kills / 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_row_6_an_error_at_every_call_of_a_save(file, monkeypatch, number):
    tried = 0
    for n in moments_of_a_save(file, monkeypatch):
        before = {path: path.read_bytes() for path in file.parent.iterdir()}
        moments = Moments(n, lambda: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        with monkeypatch.context() as patch:
            moments.watch(patch)
            try:
                save_checkpoint(file, state(3), keep_previous=True)
            except OSError as error:
                assert str(file) in str(error) and os.strerror(number) in str(error) and "MB are free" in str(error)
                tried += 1
        found, path = load_last(file)
        if found.step == 2:
            assert path == file and file.read_bytes() == before[file], n
        assert names(file.parent) == ["last.prev.pth", "last.pth"], n
        save_checkpoint(file, state(1))
        save_checkpoint(file, state(2), keep_previous=True)
    assert tried > 10


# --- row 7: a disk that is really full ---------------------------------------------------------------------------


SIZES = [5_000, 20_000, 50_000]


MORE_SIZES = [pytest.param(size, marks=pytest.mark.nightly) for size in range(10_000, 60_000, 7_000)]


@pytest.mark.parametrize("size", [*SIZES, *MORE_SIZES])
def test_row_7_a_full_disk(place, size):
    """A file may not grow beyond `size` bytes: the kernel refuses the write, as on a full disk."""

    def fill():
        real = checkpoint.save_checkpoint

        def save(path, *arguments, **how):
            if Path(path).name == "last_checkpoint.pth" and arguments[0].step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            real(path, *arguments, **how)

        import train

        train.save_checkpoint = save

    place.overrides = ["training.checkpoint_every=2"]
    assert place.train("full", before=fill) == 4
    said = place.said("full")
    assert "cannot save this checkpoint (File too large)" in said and "MB are free" in said and "--resume auto" in said
    assert place.last("full").step == 2 and not list((place.folder / "full" / "models").glob(".*tmp*"))
    assert place.train("full", "--resume", "auto") == 0
    assert difference(place.result("full"), place.whole()) is None


# --- rows 8 and 9: cut and rotten files --------------------------------------------------------------------------


def refuses_or_is_equal(path, expected):
    """Whether a harmed file was refused; if it was not, it has to hold what it held."""
    try:
        found = load_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    assert difference(contents(found), contents(expected)) is None
    return False


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.nightly)])
def test_row_8_cut_files(file, every):
    good = file.read_bytes()
    for cut in sorted({*range(0, len(good), every), 1, len(good) - 1}):
        file.write_bytes(good[:cut])
        with pytest.warns(UserWarning, match=r"last\.pth: damaged.*going back to the one before"):
            found, path = load_last(file)
        assert (found.step, path) == (1, previous(file))
    previous(file).write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="last.prev.pth: damaged") as caught:
        load_last(file)
    assert caught.value.exit_code == 3


def flip(body, rng):
    place = rng.randrange(len(body))
    body[place] ^= 1 << rng.randrange(8)


def swap(body, rng):
    one, two = rng.randrange(len(body)), rng.randrange(len(body))
    body[one], body[two] = body[two], body[one]


def zero(body, rng):
    start = rng.randrange(0, len(body), 512)
    body[start : start + 512] = bytes(len(body[start : start + 512]))


def replace(body, rng):
    start = rng.randrange(len(body))
    body[start : start + 16] = rng.randbytes(16)


@pytest.mark.parametrize("cases", [1000, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_row_9_rotten_files(file, rng, cases):
    good, expected, unseen = file.read_bytes(), load_checkpoint(file), 0
    for case in range(cases):
        body = bytearray(good)
        harm = (flip, flip, swap, zero, replace)[case % 5]
        harm(body, rng)
        file.write_bytes(body)
        unseen += not refuses_or_is_equal(file, expected)
    print(f"{unseen} of {cases} harmed files held what they held before")
    assert unseen < cases / 2


def test_row_9_every_bit_of_the_archives_end(file):
    """There the table of contents is found, and Python's own checks have their gaps."""
    good, expected = file.read_bytes(), load_checkpoint(file)
    for bit in range(8 * (len(good) - 98), 8 * len(good)):
        body = bytearray(good)
        body[bit // 8] ^= 1 << bit % 8
        file.write_bytes(body)
        refuses_or_is_equal(file, expected)


def test_row_9_swapped_records(file):
    """Two records of one archive exchanged, with right checksums: the model's tensors have different sizes."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    first, second = (name for name in records if "/data/" in name)
    records[first], records[second] = records[second], records[first]
    write_archive(file, records)
    with pytest.raises(CheckpointError):
        load_checkpoint(file)


def write_archive(path, records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


# --- row 10: a checkpoint of something else ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was stopped in the joint phase, with its warmup done."""
    from tests import tiny
    from tests.reliability.faults import stop_after

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(tiny.CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        import deeplab_features

        patch.setitem(deeplab_features.BACKBONES, "resnet18", (tiny.TinyResNet, None))
        assert Place(folder).train("run", before=lambda: stop_after(5)) == 143
    return folder / "run" / "models" / "last_checkpoint.pth"


def without(key, *path):
    def change(state):
        for name in path:
            state = state[name]
        del state[key]

    return change


def with_value(value, *path):
    def change(state):
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value

    return change


WRONG = {  # what is changed in last_checkpoint.pth, and what is said about it
    "another backbone": (with_value("resnet50", "config", "model", "backbone"), "model.backbone is 'resnet50' there"),
    "other classes": (with_value(4, "config", "model", "num_classes"), "it names 6 classes, its model has 4"),
    "other prototypes": (with_value([6, 8, 1, 1], "config", "model", "prototype_shape"), "model.prototype_shape is"),
    "an unknown stage": (with_value("later", "stage"), "'later'"),
    "no stage": (without("stage"), "it ends the stage ''"),
    "a later format": (with_value(2, "format"), "format 2, want 1"),
    "no model": (without("model"), "without model"),
    "a model that is no mapping": (with_value([1], "model"), "model"),
    "a config that is no mapping": (with_value("x", "config"), "config"),
    "a model section that is no mapping": (with_value(3, "config", "model"), "model"),
    "a weight is missing": (without("last_layer.weight", "model"), "last_layer.weight is missing"),
    "a weight too many": (with_value(torch.ones(1), "model", "extra"), "extra is unknown"),
    "a weight of another shape": (with_value(torch.ones(3, 3), "model", "last_layer.weight"), "shape"),
    "a weight of another type": (
        lambda s: s["model"].update(prototype_vectors=s["model"]["prototype_vectors"].double()), "float32"),
    "a weight that is NaN": (
        lambda s: s["model"].update(prototype_vectors=s["model"]["prototype_vectors"] * torch.nan), "not finite"),
    "weights by number": (with_value({1: torch.ones(1)}, "model"), "fit"),
    "step as text": (with_value("5", "step"), "step"),
    "a step beyond the phase": (with_value(10**6, "step"), "step"),
    "a step before the phase": (with_value(-1, "step"), "step"),
    "no progress": (without("progress"), "progress"),
    "half the progress": (without("stale", "progress"), "progress without stale"),
    "progress of another kind": (with_value(5, "progress"), "progress"),
    "no optimizer": (without("optimizer"), None),  # a phase's result then: the next one begins
    "an optimizer of nothing": (with_value({}, "optimizer"), "optimizer is not the state of an optimizer"),
    "an optimizer of another kind": (with_value(7, "optimizer"), "optimizer is a int"),
    "an optimizer of other shapes": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1, 1)), "the moments of parameter 0 have"),
    "gradients of another kind": (with_value([1], "gradients"), "gradients is a list"),
    "gradients of other names": (with_value({"x": torch.ones(1)}, "gradients"), "gradients: x is unknown"),
    "sums of another type": (with_value(torch.ones(2), "sums"), "sums is no row"),
    "sums of another shape": (with_value(torch.ones(2, dtype=torch.float64), "sums"), "phase 'joint'"),
    "a count that is text": (with_value("2", "batches"), "batches is a str"),
    "records that are text": (with_value("none", "prototypes"), "prototypes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_row_10_wrong_checkpoints(place, trained, case):
    change, message = WRONG[case]
    state = load_tensors(trained)
    change(state)
    Path("one").mkdir()
    torch.save(state, "one/odd.pth")
    code = place.train("one", "--resume", "odd.pth")
    if message is None:
        assert code == 0 and "phase 2" in place.said("one") and "phase 1" not in place.said("one")
        return
    said = place.said("one").splitlines()
    assert code == 3 and said[-1].startswith("error: ") and message in said[-1], said
    assert not list(Path("one").rglob("*_checkpoint.pth"))


def whole_content():
    """The flat dict of a file that has everything: prototypes with records, and what a resume needs."""
    model = construct_PPNet(tiny_config().model)
    adam = torch.optim.Adam([{"params": list(model.add_on_layers.parameters()) + [model.prototype_vectors], "lr": 0.01,
                              "name": "add_on", "base_lr": 0.01, "weight_decay": 0.5},
                             {"params": [model.last_layer.weight], "lr": 0.01, "name": "last_layer", "base_lr": 0.01,
                              "weight_decay": 0.0}])  # fmt: skip
    for step in range(2):
        adam.zero_grad()
        for group in adam.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 0.1 + step)
        adam.step()
    where = {"image": "b.png", "image_index": 1, "image_size": [44, 40], "split": "train", "cell": [2, 3],
             "pixel": [24, 16], "distance": 0.25, "box": [16, 8, 32, 24], "picture": "prototype_000.png"}  # fmt: skip
    names = [f"class {c}" for c in range(6)]
    records = []
    for p, c in enumerate(model.prototype_class.tolist()):
        record = {"prototype": p, "class": c, "class_name": names[c], "merged": [p, p + 12], **where}
        records.append(record if p else record | dict.fromkeys(where))
    gradients = {"prototype_vectors": torch.ones(12, 8, 1, 1), "last_layer.weight": torch.ones(6, 12)}
    progress = {"reported": 4, "val_miou": float("nan"), "best_miou": 0.5, "phase_best": -1.0, "stale": 1,
                "best_weights": {"last_layer.weight": torch.ones(6, 12)}}  # fmt: skip
    return {
        "format": 1, "config": config_to_dict(tiny_config()), "stage": "joint", "phase": 1, "step": 5,
        "model": dict(model.state_dict()), "prototypes": records, "metrics": {"val_miou": 0.5}, "class_names": names,
        "palette": [[c, 2 * c, 255 - c] for c in range(6)], "file_ids": [7, 8, 0, 26, 1, 255],
        "provenance": {"commit": "", "torch": "2.14"},
        "optimizer": adam.state_dict(), "gradients": gradients, "sums": torch.ones(6, dtype=torch.float64),
        "batches": 3, "progress": progress, "processes": 2,
    }  # fmt: skip


@pytest.fixture
def content(workdir):
    torch.manual_seed(0)
    return whole_content()


def believe(content, path="odd.pth"):
    """All that a script does with a file before it is used. Raises CheckpointError."""
    torch.save(content, path)
    return open_model(path, ["system.device=cpu"]).checkpoint


def flat(found):
    """A checkpoint as the dict that stands in its file."""
    return checkpoint._to_file(found)


def test_row_10_a_whole_file_is_believed_and_comes_back(content):
    assert difference(flat(believe(content)), content) is None


def prototype_classes(values):
    return lambda s: s["model"].update(prototype_class=values)


def of_model(change, name="last_layer.weight"):
    return lambda s: s["model"].update({name: change(s["model"][name])})


def of_optimizer(**settings):
    return lambda s: s["optimizer"]["param_groups"][1].update(settings)


def of_moments(**moments):
    return lambda s: s["optimizer"]["state"][0].update(moments)


def of_record(**values):
    return lambda s: s["prototypes"][3].update(values)


NAN, INFINITE = float("nan"), float("inf")
UNBELIEVABLE = {  # what a stranger may write into a file, and what is said about it
    "class names too few": (lambda s: s["class_names"].pop(), "class_names has 5 entries for 6 classes"),
    "class names that are numbers": (with_value(7, "class_names", 0), "class_names: a name is not text"),
    "class names that cannot be written": (with_value("\udc80", "class_names", 0), "a name is not text"),
    "a palette too short": (lambda s: s["palette"].pop(), "palette has 5 entries for 6 classes"),
    "a palette of 300": (with_value([300, 0, 0], "palette", 1), "palette: a color"),
    "a palette of -1": (with_value([0, -1, 0], "palette", 1), "palette: a color"),
    "a palette of NaN": (with_value([NAN, 0, 0], "palette", 1), "palette: a color"),
    "a palette of text": (with_value(["red;}<b>", 0, 0], "palette", 1), "palette: a color"),
    "a palette of yes": (with_value([True, 0, 0], "palette", 1), "palette: a color"),
    "a color of two": (with_value([0, 0], "palette", 1), "palette: a color"),
    "a color that is a text": (with_value("abc", "palette", 1), "palette: a color"),
    "ids too few": (lambda s: s["file_ids"].pop(), "file_ids has 5 entries for 6 classes"),
    "an id of 256": (with_value(256, "file_ids", 1), "file_ids: an id is no number of 0..255"),
    "an id that is there twice": (with_value(7, "file_ids", 1), "or there twice"),
    "an id that is a text": (with_value("7", "file_ids", 1), "file_ids: an id is no number"),
    "records too few": (lambda s: s["prototypes"].pop(), "prototypes: 11 records for 12 prototypes"),
    "a record that is a text": (with_value("x", "prototypes", 3), "record 3 is no plain data"),
    "a record of a tensor": (of_record(distance=torch.ones(1)), "record 3 is no plain data"),
    "a record of another prototype": (of_record(prototype=4), "record 3 is of another prototype"),
    "a record of another class": (of_record(**{"class": 5}), "record 3 is of another prototype or class"),
    "a record of another name": (of_record(class_name="x"), "class_name of record 3"),
    "a record without a place": (lambda s: s["prototypes"][3].pop("pixel"), "pixel of record 3"),
    "a place as text": (of_record(pixel=["0", "0"]), "pixel of record 3"),
    "a place of three": (of_record(cell=[0, 0, 0]), "cell of record 3"),
    "a place before the image": (of_record(cell=[-1, 0]), "cell of record 3"),
    "a place outside the image": (of_record(pixel=[44, 0]), "pixel of record 3"),
    "a box outside the image": (of_record(box=[0, 0, 45, 8]), "box of record 3"),
    "a box of nothing": (of_record(box=[8, 8, 8, 16]), "box of record 3"),
    "an image by number": (of_record(image=7), "image of record 3"),
    "an image that is not there": (of_record(image=None), "image_index of record 3"),
    "an index below 0": (of_record(image_index=-1), "image_index of record 3"),
    "a distance below 0": (of_record(distance=-0.5), "distance of record 3"),
    "a distance of NaN": (of_record(distance=NAN), "distance of record 3"),
    "a picture elsewhere": (of_record(picture="../../x.png"), "picture of record 3"),
    "merged with a text": (of_record(merged=["x"]), "merged of record 3"),
    "prototype_class out of range": (prototype_classes(torch.arange(12)), "prototype_class is outside 0..5"),
    "prototype_class below 0": (prototype_classes(torch.full((12,), -1)), "prototype_class is outside"),
    "prototype_class of 0 dimensions": (prototype_classes(torch.tensor(3)), "no list of whole numbers"),
    "prototype_class of floats": (prototype_classes(torch.zeros(12)), "no list of whole numbers"),
    "prototype_class of int32": (prototype_classes(torch.zeros(12, dtype=torch.int32)), "no list of whole numbers"),
    "prototype_class too short": (prototype_classes(torch.zeros(11, dtype=torch.int64)), "12, 11 and 12 prototypes"),
    "no prototypes": (lambda s: s["model"].update(
        prototype_vectors=torch.ones(0, 8, 1, 1), prototype_class=torch.zeros(0, dtype=torch.int64),
        **{"last_layer.weight": torch.ones(6, 0)}), "0, 0 and 0 prototypes"),
    "prototypes of two cells": (with_value(torch.ones(12, 8, 2, 1), "model", "prototype_vectors"), "want [P, D, 1, 1]"),
    "a sparse tensor": (of_model(torch.Tensor.to_sparse), "no dense tensor"),
    "a tensor without values": (of_model(lambda w: w.to("meta")), "no dense tensor"),
    "a quantized tensor": (of_model(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.quint8)), "no dense tensor"),
    "a nested tensor": (of_model(lambda w: torch.nested.nested_tensor([w, w])), "no dense tensor"),
    "a complex tensor": (of_model(lambda w: w.to(torch.complex64)), "no dense tensor"),
    "a tensor of 8 bits": (of_model(lambda w: w.to(torch.float8_e4m3fn)), "no dense tensor"),
    "a parameter": (of_model(nn.Parameter), "is a Parameter, want a tensor"),
    "a tensor to be differentiated": (of_model(lambda w: w.clone().requires_grad_()), "no dense tensor"),
    "a tensor larger than its file": (
        of_model(lambda w: torch.zeros(1).expand(10**13), "prototype_vectors"), "larger than what the file holds"),
    "a tensor that is a list": (of_model(torch.Tensor.tolist), "is a list, want a tensor"),
    "an infinite weight": (of_model(lambda w: w / 0), "last_layer.weight is not finite"),
    "a variance below 0": (of_model(lambda w: w - 2, "features.backbone.bn1.running_var"), "running_var is negative"),
    "a count below 0": (
        of_model(lambda w: w - 9, "features.backbone.bn1.num_batches_tracked"), "num_batches_tracked is negative"),
    "metrics that are text": (with_value("0.5", "metrics", "val_miou"), "metrics: 'val_miou' is '0.5'"),
    "an mIoU of 2": (with_value(2.0, "metrics", "val_miou"), "val_miou is 2.0, want 0 to 1"),
    "an mIoU of -1": (with_value(-1.0, "metrics", "val_miou"), "val_miou is -1.0"),
    "an infinite mIoU": (with_value(INFINITE, "metrics", "val_miou"), "val_miou' is inf"),
    "an optimizer without moments": (with_value({}, "optimizer", "state"), "no moments, after 2 updates"),
    "moments without a mean": (without("exp_avg", "optimizer", "state", 0), "not the moments of a plain Adam"),
    "moments of another Adam": (of_moments(max_exp_avg_sq=torch.ones(12, 8, 1, 1)), "not the moments of a plain Adam"),
    "moments that are text": (of_moments(exp_avg="0"), "exp_avg of parameter 0 is a str"),
    "moments that are NaN": (of_moments(exp_avg=torch.full((12, 8, 1, 1), NAN)), "exp_avg of parameter 0 is not fin"),
    "squares below 0": (of_moments(exp_avg_sq=torch.full((12, 8, 1, 1), -1.0)), "or are negative"),
    "updates without end": (of_moments(step=torch.tensor(6.0)), "another number of updates than 1 to 5"),
    "half an update": (of_moments(step=torch.tensor(0.5)), "another number of updates"),
    "updates as a number": (of_moments(step=2), "step of parameter 0 is a int"),
    "moments of nobody": (
        lambda s: s["optimizer"]["state"].update({99: s["optimizer"]["state"][0]}), "of an unknown parameter"),
    "parameters twice": (of_optimizer(params=[0]), "its parameters are not numbered"),
    "parameters as text": (of_optimizer(params=["0"]), "its parameters are not numbered"),
    "betas as text": (of_optimizer(betas=("0.9", "0.999")), "betas is a tuple, not that of a plain Adam"),
    "betas of 1": (of_optimizer(betas=(0.9, 1.0)), "betas"),
    "maximize": (of_optimizer(maximize=True), "maximize is True, not that of a plain Adam"),
    "amsgrad": (of_optimizer(amsgrad=True), "amsgrad is True"),
    "capturable": (of_optimizer(capturable=True), "capturable is True"),
    "a rate below 0": (of_optimizer(lr=-1.0), "lr is -1.0"),
    "a rate of NaN": (of_optimizer(lr=NAN), "lr is nan"),
    "a rate as a tensor": (of_optimizer(lr=torch.tensor(0.1)), "lr is a Tensor"),
    "a decay as text": (of_optimizer(weight_decay="x"), "weight_decay is 'x'"),
    "an eps below 0": (of_optimizer(eps=-1.0), "eps is -1.0"),
    "a setting of a tensor": (of_optimizer(more=torch.ones(1)), "a setting"),
    "a group without a name": (of_optimizer(name=None), "name is a NoneType"),
    "a gradient of another shape": (with_value(torch.ones(1), "gradients", "last_layer.weight"), "another shape"),
    "a gradient of NaN": (with_value(torch.full((6, 12), NAN), "gradients", "last_layer.weight"), "not finite"),
    "sums of NaN": (lambda s: s["sums"].mul_(NAN), "sums is not finite"),
    "sums of no dimension": (with_value(torch.ones((), dtype=torch.float64), "sums"), "sums is no row"),
    "more batches than steps": (with_value(6, "batches"), "batches is 6, want 0 to 5"),
    "progress as text": (with_value("4", "progress", "reported"), "progress: reported is a str, want int"),
    "progress beyond the step": (with_value(6, "progress", "reported"), "progress: reported is 6, want -1 to 5"),
    "progress of NaN": (with_value(NAN, "progress", "best_miou"), "progress: 'best_miou' is nan"),
    "progress of unknown weights": (
        with_value(torch.ones(1), "progress", "best_weights", "x"), "progress: best_weights: x is unknown"),
    "progress of an object": (with_value(["x"], "progress", "more"), "progress: 'more' is a list"),
    "no process": (with_value(0, "processes"), "processes is 0"),
    "a phase below 0": (with_value(-1, "phase"), "phase is a int, want 0 to"),
    "a phase that is a truth": (with_value(True, "phase"), "phase is a bool, want int"),
    "a phase beyond the schedule": (with_value(3, "phase"), "phase 3, step 5 is not in its configuration"),
    "a stage of two lines": (with_value("a\nb", "stage"), "stage is not a line of text"),
    "provenance that is no text": (with_value(7, "provenance", "commit"), "provenance is not text"),
    "a configuration of tensors": (with_value(torch.ones(1), "config", "x"), "config holds more than plain data"),
    "a configuration of huge numbers": (with_value(10**400, "config", "training", "seed"), "more than plain data"),
    "a configuration within itself": (lambda s: s["config"].update(x=s["config"]), "nested without end"),
    "a split elsewhere": (with_value("../images/train", "config", "dataset", "train_split"), "the name of a split"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNBELIEVABLE)
def test_row_10_unbelievable_content_is_refused_when_it_is_read(content, case):
    change, message = UNBELIEVABLE[case]
    change(content)
    with pytest.raises(CheckpointError) as caught:
        believe(content)
    said = str(caught.value)
    assert said.startswith("odd.pth: ") and message in said and "\n" not in said and len(said) < 400
    assert caught.value.exit_code == 3


def test_row_10_a_best_checkpoint_without_its_metrics_is_refused(content):
    for metrics in ({}, {"val_miou": NAN}):
        found = believe(content | {"metrics": metrics})
        with pytest.raises(CheckpointError, match="odd.pth: it does not say which mIoU"):
            found.val_miou  # noqa: B018


def leaves(value, path=()):
    """The paths of all that a file holds, mappings and lists themselves included."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))


def sick_tensor(tensor, how):
    return {
        "nan": lambda: tensor.double() * NAN, "half": lambda: tensor.half(), "double": lambda: tensor.double(),
        "long": lambda: tensor.long(), "less": lambda: tensor[:-1] if tensor.dim() else tensor[None],
        "more": lambda: tensor[None], "none": lambda: torch.zeros(0), "minus": lambda: tensor * -1 - 1,
        "wide": lambda: torch.zeros(1).expand(10**12), "meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse() if tensor.dim() else tensor.bool(), "other": lambda: tensor * 0 + 1,
        "strided": lambda: tensor.mT if tensor.dim() > 1 else tensor.clone(),
    }[how]()  # fmt: skip


TENSORS = (
    "nan",
    "half",
    "double",
    "long",
    "less",
    "more",
    "none",
    "minus",
    "wide",
    "meta",
    "sparse",
    "other",
    "strided",
)
ODD = [
    None, True, False, 0, 1, -1, 2, 255, 256, 10**9, 10**18, 10**300, -(10**300), 0.0, -0.0, 0.5, 1.0, -1.5, 1e300, NAN,
    INFINITE, "", "x", "0.5", "a\nb", "\udc80", "../x", "\0", [], {}, [0], [None], [[0, 0, 0]], {"x": 1}, {1: 2},
    {"": []}, (), (1, 2, 3), [1.0, 2.0], torch.tensor(0), torch.ones(2), torch.ones(0), torch.Size([3]), {0},
]  # fmt: skip


def mutate(content, path, what):
    """Put something else in a place of `content`; what: a number in ODD, a word of TENSORS, or a change of the keys."""
    *above, last = path
    place = content
    for key in above:
        place = place[key]
    old = place[last]
    if isinstance(what, int):
        place[last] = ODD[what]
    elif what in TENSORS:
        place[last] = sick_tensor(old, what) if isinstance(old, torch.Tensor) else ODD[TENSORS.index(what)]
    elif what == "gone":
        del place[last]
    elif what == "twice" and isinstance(place, list):
        place.append(old)
    else:
        place.update({"odd": old}) if isinstance(place, dict) else place.insert(0, None)


@pytest.mark.parametrize("cases", [400, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_row_10_whatever_is_changed_is_refused_or_comes_back(workdir, seed, cases):
    torch.manual_seed(0)
    paths = [path for path in leaves(whole_content()) if path]
    whats = [*range(len(ODD)), *TENSORS, "gone", "twice", "extra"]
    count = {"refused": 0, "believed": 0}

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=cases, deadline=None, database=None, derandomize=False)
    @hypothesis.given(strategies.sampled_from(paths), strategies.sampled_from(whats))
    def check(path, what):
        torch.manual_seed(0)
        content = whole_content()
        mutate(content, path, what)
        try:
            found = believe(content)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(error).startswith("odd.pth: ") and len(str(error)) < 1000
            count["refused"] += 1
        else:
            known = {key: value for key, value in content.items() if key != "odd"}
            defaults = {key: [] for key in ("prototypes", "class_names", "palette", "file_ids")} | {
                "metrics": {},
                "stage": "",
            }
            defaults |= {"provenance": {}, "processes": 1}
            if "optimizer" not in content:
                known = {key: value for key, value in known.items() if key not in MIDWAY}
                del defaults["processes"]
            assert difference(flat(found), defaults | known) is None
            count["believed"] += 1

    check()
    assert count["refused"] > cases / 2 and count["believed"] > cases / 100, count


def test_row_10_a_model_that_is_refused_changes_nothing():
    model = tiny_ppnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for harm in ({}, {**before, "x": before["prototype_vectors"]}, {**before, "prototype_vectors": torch.ones(2)}):
        with pytest.raises(CheckpointError):
            load_weights(model, harm)
        assert difference(dict(model.state_dict()), before) is None


# --- row 11: malicious files -------------------------------------------------------------------------------------


class Call:
    """Pickles to the call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class SetState(Call):
    def __reduce__(self):
        return (list, (), {"x": Call(*self.call)})


def touch(marker):
    return f"open({str(marker)!r}, 'w').close()"


def archive_with(pickled):
    """A checkpoint whose pickle is another one, all checksums right."""
    buffer = io.BytesIO()
    torch.save({"format": 1, **STATE}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    return {name: pickled if name.endswith("data.pkl") else content for name, content in records.items()}


def deep(depth):
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def declared_large():
    """The tensors' storages claim 10 GB."""
    buffer = io.BytesIO()
    torch.save({"format": 1, **STATE}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = next(archive.read(i) for i in archive.infolist() if i.filename.endswith("data.pkl"))
    number = b"M" + struct.pack("<H", 600)
    assert number in pickled
    return archive_with(pickled.replace(number, b"\x8a\x05" + struct.pack("<Q", 2_500_000_000)[:5]))


def escaping():
    records = archive_with(b"")
    return {name.replace("archive/", "../../evil/"): content for name, content in records.items()}


MALICIOUS = {
    "os.system": lambda m: {"model": Call(os.system, f"touch {m}")},
    "eval": lambda m: {"model": Call(eval, touch(m))},
    "exec": lambda m: {"model": Call(exec, touch(m))},
    "open": lambda m: {"model": Call(builtins.open, str(m), "w")},
    "set state": lambda m: {"model": SetState(exec, touch(m))},
    "inside a list": lambda m: {"model": [[Call(exec, touch(m))]]},
    "as a key": lambda m: {Call(os.system, f"touch {m}"): 1},
    "a module": lambda m: {"model": nn.Linear(2, 2)},
    "getattr": lambda m: {"model": Call(getattr, Call(__import__, "os"), "system")},
    "torch.load": lambda m: {"model": Call(torch.load, str(m))},
    "torch.jit": lambda m: {"model": Call(torch.jit.load, str(m))},
}
FORGED = {
    "another pickle": lambda m: archive_with(pickle.dumps(Call(exec, touch(m)), 2)),
    "a deep pickle": lambda m: archive_with(deep(200_000)),
    "10 GB declared": lambda m: declared_large(),
    "records outside": lambda m: escaping(),
    "no pickle": lambda m: {n: c for n, c in archive_with(b"").items() if "data.pkl" not in n},
    "an empty pickle": lambda m: archive_with(b""),
    "a long integer": lambda m: archive_with(b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "a memo that is not there": lambda m: archive_with(b"\x80\x02h\x05."),
}


def hostile_file(path, case, marker):
    if case in MALICIOUS:
        torch.save({"format": 1, **STATE, **MALICIOUS[case](marker)}, path)
    elif case in FORGED:
        write_archive(path, FORGED[case](marker))
    elif case == "a legacy pickle":
        path.write_bytes(pickle.dumps({"format": 1, **STATE, "model": Call(exec, touch(marker))}))
    elif case == "a legacy file of torch":
        evil = {"format": 1, **STATE, "model": Call(exec, touch(marker))}
        torch.save(evil, path, _use_new_zipfile_serialization=False)
    elif case == "TorchScript":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    elif case == "a link to another file":
        path.symlink_to("/etc/passwd")
    elif case == "a link to itself":
        path.symlink_to(path)
    elif case == "a folder":
        path.mkdir()
    elif case == "a bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(300_000_000))
    elif case == "a pipe":
        os.mkfifo(path)
    elif case == "a device":
        path.symlink_to("/dev/zero")
    elif case == "one record a thousand times":
        torch.save({"format": 1, **STATE}, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.filelist += [max(archive.filelist, key=lambda info: info.file_size)] * 1000
            archive.comment = b"written anew"
    elif case == "a record that claims to be larger":
        torch.save({"format": 1, **STATE}, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.filelist[1].file_size = archive.filelist[1].compress_size = 3_000_000_000
            archive.comment = b"written anew"


OTHERS = (
    "a legacy pickle", "a legacy file of torch", "TorchScript", "a link to another file", "a link to itself",
    "a folder", "a bomb", "a pipe", "a device", "one record a thousand times", "a record that claims to be larger",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("case", [*MALICIOUS, *FORGED, *OTHERS])
def test_row_11_malicious_files(tmp_path, case):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    hostile_file(path, case, marker)
    before = names(tmp_path)

    def load():
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read in (load_tensors, load_checkpoint):
            try:
                read(path)
            except CheckpointError as error:
                print(f"refused: {error}")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
        assert grown < 200_000, f"{grown} KB"

    child = Child(load, tmp_path / "log")
    assert child.end() == 0
    refusals = child.said().splitlines()
    assert all(line.startswith("refused: ") and len(line) < 600 for line in refusals), refusals
    assert refusals and refusals[-1].startswith(f"refused: {path}"), refusals
    if case in ("os.system", "eval", "exec", "open", "getattr", "a module"):
        assert "could run code" in refusals[-1] and "unknown" not in refusals[-1]
    assert not marker.exists() and set(names(tmp_path)) - set(before) == {"log"}


# --- row 12: our own files are clean -----------------------------------------------------------------------------


def test_row_12_our_own_files_hold_plain_data_alone(place):
    place.overrides = ["training.checkpoint_every=2"]
    assert place.train("run") == 0
    found = sorted((place.folder / "run" / "models").glob("*.pth"))
    assert len(found) == 7
    for path in found:
        assert torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) == []
        torch.load(path, weights_only=True)
