"""What several tests share: a network of some thousand weights, and a configuration that trains it in a second."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock

from config import Config, load_config
from datasets.base import ClassMapping
from model import PPNet

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """
dataset:
  name: shapes
  root: .
  crop_size: 33
  shapes: {train_images: 5, val_images: 2, image_size: 44}
model: {num_classes: 6, backbone: resnet18, pretrained: none, prototype_shape: [12, 8, 1, 1]}
training:
  iter_size: 2
  log_every: 2
  val_every: 3
  phases:
    - {name: warmup, steps: 3, lr: {add_on: 1e-2, prototypes: 1e-2, last_layer: 1e-2}}
    - name: joint
      steps: 5
      schedule: poly
      push: true
      lr: {backbone: 1e-2, add_on: 1e-2, prototypes: 1e-2, last_layer: 1e-2}
    - {name: finetune, steps: 4, early_stopping: 3, lr: {last_layer: 1e-2}}
system: {device: cpu, num_workers: 0}
"""


class TinyResNet(nn.Module):
    """What DeepLabFeatures needs of torchvision's ResNet: its names, its strides, its blocks; 8 channels wide."""

    def __init__(self, weights=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=4, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer2 = nn.Sequential(strided_block())
        self.layer3 = nn.Sequential(strided_block())
        self.layer4 = nn.Sequential(strided_block())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)


def strided_block():
    return BasicBlock(8, 8, 2, nn.Sequential(nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8)))


def tiny_config(*overrides: str) -> Config:
    """The configuration of tiny.yaml (in the `workdir`), with overrides."""
    return load_config("tiny.yaml", list(overrides))


class EveryEighthPixel(nn.Module):
    """Features with the exact geometry and nothing else: cell (i, j) is a linear map of pixel (8i, 8j)."""

    def __init__(self, depth: int = 5, seed: int = 0):
        super().__init__()
        self.project = nn.Conv2d(3, depth, 1, stride=8)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, images):
        return self.project(images)


def tiny_ppnet(prototypes: int = 6, classes: int = 3, depth: int = 5, seed: int = 0, **how) -> PPNet:
    """A PPNet on EveryEighthPixel whose prototypes and last layer are random."""
    torch.manual_seed(seed)
    model = PPNet(EveryEighthPixel(depth, seed), (prototypes, depth, 1, 1), classes, **how)
    nn.init.normal_(model.last_layer.weight)
    return model.eval()


class RandomImages(torch.utils.data.Dataset):
    """A data set of random images with random labels (0..classes-1 and 255), of different sizes."""

    split = "train"

    def __init__(self, count: int = 4, classes: int = 3, seed: int = 0, absent: int | None = None):
        rng = np.random.default_rng(seed)
        self.items = []
        for _ in range(count):
            height, width = rng.integers(17, 50, 2)
            label = rng.choice([*(c for c in range(classes) if c != absent), 255], (height, width))
            self.items.append((torch.from_numpy(rng.normal(size=(3, height, width))).float(), torch.from_numpy(label)))
        names = tuple(f"class {c}" for c in range(classes))
        self.mapping = ClassMapping(names, ((255, 0, 0),) * classes, {c: c for c in range(classes)})
        self.num_classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def image_id(self, index):
        return f"image {index}"

    def read(self, index):
        image = (self.items[index][0].clamp(-2, 2) * 60 + 128).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(image), Image.fromarray(self.items[index][1].numpy().astype(np.uint8))
