"""What the tests of the explanation pages share: checkpoints, and pages read back without a browser."""

import base64
import json
import os
import re
import zlib
from html.parser import HTMLParser
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import nn

from config import config_to_dict
from dataset import build_dataset
from grid import Grid
from inference import Inference, open_model
from model import PPNet, construct_PPNet
from push import push_prototypes
from runtime.checkpoint import Checkpoint, save_checkpoint
from tests.tiny import tiny_config


def make_checkpoint(path, *overrides, pushed=True, change=lambda state: None):
    """A checkpoint of the tiny network with random weights and a mixed last layer, as train.py leaves one."""
    config = tiny_config(*overrides)
    torch.manual_seed(0)
    model = construct_PPNet(config.model).eval()
    records = []
    train_set = build_dataset(config, "train")
    if isinstance(model, PPNet):
        torch.nn.init.normal_(model.last_layer.weight)
        if pushed:
            records = push_prototypes(Inference(model, torch.device("cpu")), train_set).records
    state = {
        "config": config_to_dict(config),
        "stage": "finetune",
        "phase": 2,
        "step": 4,
        "model": dict(model.state_dict()),
        "prototypes": tuple(records),
        "metrics": {"val_miou": 0.5},
        "class_names": train_set.mapping.names,
        "palette": train_set.mapping.palette,
    }
    change(state)
    save_checkpoint(path, Checkpoint(**state))
    return open_model(path).model


class Patches(nn.Module):
    """Features like a patch embedding's: a cell is made of 8 x 8 pixels of its own, so it looks at 8i + 3.5."""

    grid = Grid(8, 3.5)

    def __init__(self, backbone, out_channels, pretrained):
        super().__init__()
        self.embed = nn.Conv2d(3, out_channels, 8, stride=8)

    def forward(self, images):
        return self.embed(images)


class Page(HTMLParser):
    """The tags with the names of their attributes, the attributes' values, and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.structure, self.links, self.texts, self.policy = [], [], [], None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.structure.append((tag, tuple(sorted(values))))
        self.links += [values[name] for name in ("src", "href") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    @property
    def data(self):
        return json.loads(re.search(r'id="data">(.*?)</script>', self.source, re.S)[1])


def check_folder(out):
    """Every page has a policy, and every link is to a file (and a place) in the same folder."""
    for path in out.glob("*.html"):
        page = Page(path)
        assert page.policy.startswith("default-src 'none';") and "http" not in page.policy
        for link in page.links:
            parts = urlsplit(link)
            assert not parts.scheme and not parts.netloc and not parts.path.startswith("/") and ".." not in link
            target = out / parts.path if parts.path else path
            assert target.is_file(), link
            assert not parts.fragment or f'id="{parts.fragment}"' in target.read_text()


def files(folder):
    return sorted(
        os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names
    )


def unpack(data):
    """The encoding of pixel_data.py undone: scores (C, h, w), [(tile's rows, columns, {prototype: activations})],
    prediction (H, W), truth (H, W)."""
    height, width = data["grid"]
    side, steps = data["tileSide"], np.array(data["activationSteps"])
    stream = zlib.decompress(base64.b64decode(data["scores"]))
    pixels = data["height"] * data["width"]
    labels = np.frombuffer(stream[-2 * pixels :], np.uint8).reshape(2, data["height"], data["width"])
    shape = ((len(stream) - 2 * pixels) // 4 // height // width, height, width)
    (scores,) = unfolded(stream[: -2 * pixels], [shape])
    tiles = []
    if data["tiles"]:
        tops, lefts = (range(0, max(1, length - 1), side) for length in (height, width))
        places = [
            (slice(t, min(t + side + 1, height)), slice(q, min(q + side + 1, width))) for t in tops for q in lefts
        ]
        shapes = [
            (len(kept), rows.stop - rows.start, columns.stop - columns.start)
            for (rows, columns), kept in zip(places, data["tiles"], strict=True)
        ]
        parts = unfolded(zlib.decompress(base64.b64decode(data["activations"])), shapes)
        tiles = [
            (*place, {p: steps[p] * part[k] for k, p in enumerate(kept)})
            for place, kept, part in zip(places, data["tiles"], parts, strict=True)
        ]
    return data["scoreStep"] * scores, tiles, *labels.cumsum(1, dtype=np.uint8)


def unfolded(stream, shapes):
    """Bytes -> integers of these shapes."""
    bytes_of = np.frombuffer(stream, np.uint8).reshape(4, -1).astype(np.int64)
    folded = sum(plane << 8 * i for i, plane in enumerate(bytes_of))
    rest, parts = np.where(folded % 2, -(folded + 1) // 2, folded // 2), []
    for shape in shapes:
        part, rest = np.split(rest, [np.prod(shape)])
        padded = np.pad(part.reshape(shape), ((0, 0), (1, 0), (1, 0)))
        for i in range(1, shape[1] + 1):
            for j in range(1, shape[2] + 1):
                left, above, corner = padded[:, i, j - 1], padded[:, i - 1, j], padded[:, i - 1, j - 1]
                padded[:, i, j] += np.median([left, above, left + above - corner], axis=0).astype(np.int64)
        parts.append(padded[:, 1:, 1:])
    assert not len(rest)
    return parts
