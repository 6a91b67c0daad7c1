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

import pytest
import torch
from torch import nn

from module import load_weights
from runtime import checkpoint
from runtime.checkpoint import CheckpointError, load_checkpoint, load_last, load_tensors, previous, save_checkpoint
from tests.reliability.faults import KILLED, Child, Place, difference
from tests.tiny import tiny_ppnet

STATE = {
    "config": {"a": [1, 2.5, None, True]}, "phase": 1, "step": 7, "stage": "joint", "text": "ü" * 50,
    "model": {"w": torch.arange(600.0), "b": torch.arange(7)},
}  # fmt: skip


def state(step):
    return {**STATE, "step": step}


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

        monkeypatch.setattr(checkpoint, "open", open_watched, raising=False)
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
        assert found["step"] in (2, 3) and difference(found, {"format": 1, **state(found["step"])}) is None, n
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
        saves = load_last(file)[0]["step"]
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
        if found["step"] == 2:
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
            if Path(path).name == "last_checkpoint.pth" and arguments[0]["step"] == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            real(path, *arguments, **how)

        import train

        train.save_checkpoint = save

    place.overrides = ["training.checkpoint_every=2"]
    assert place.train("full", before=fill) == 4
    said = place.said("full")
    assert "cannot save this checkpoint (File too large)" in said and "MB are free" in said and "--resume auto" in said
    assert place.last("full")["step"] == 2 and not list((place.folder / "full" / "models").glob(".*tmp*"))
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
    assert difference(found, expected) is None
    return False


@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.nightly)])
def test_row_8_cut_files(file, every):
    good = file.read_bytes()
    for cut in sorted({*range(0, len(good), every), 1, len(good) - 1}):
        file.write_bytes(good[:cut])
        with pytest.warns(UserWarning, match=r"last\.pth: damaged.*going back to the one before"):
            found, path = load_last(file)
        assert (found["step"], path) == (1, previous(file))
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
    "other classes": (with_value(7, "config", "model", "num_classes"), "model.num_classes is 7 there"),
    "other prototypes": (with_value([6, 8, 1, 1], "config", "model", "prototype_shape"), "model.prototype_shape is"),
    "an unknown stage": (with_value("later", "stage"), "'later'"),
    "no stage": (without("stage"), "None"),
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
    "an optimizer of nothing": (with_value({}, "optimizer"), "phase 'joint'"),
    "an optimizer of another kind": (with_value(7, "optimizer"), "optimizer is a int"),
    "an optimizer of other shapes": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1, 1)), "phase 'joint'"),
    "gradients of another kind": (with_value([1], "gradients"), "gradients is a list"),
    "gradients of other names": (with_value({"x": torch.ones(1)}, "gradients"), "phase 'joint'"),
    "sums of another shape": (with_value(torch.ones(2), "sums"), "phase 'joint'"),
    "a count that is text": (with_value("2", "batches"), "batches is a str"),
    "records that are text": (with_value("none", "prototypes"), "prototypes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_row_10_wrong_checkpoints(place, trained, case):
    change, message = WRONG[case]
    state = load_checkpoint(trained)
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


OTHERS = (
    "a legacy pickle", "a legacy file of torch", "TorchScript", "a link to another file", "a link to itself",
    "a folder", "a bomb",
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
