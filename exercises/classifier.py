"""A small classifier of the labels, for measures that do not depend on the networks that were trained.

A distance in the features of stage 1 judges a generator by the network from which it started. This
classifier knows only images and labels. It is trained in a minute and kept in the cache folder.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import nn

import project  # noqa: F401
import fid
from machinery import data, files, training

VERSION = 2  # of the cached weights; raise it when the network or its training changes


class Classifier(nn.Module):
    """Images x [N, C, H, W] in [-1, 1] -> logits [N, classes]; `features(x)`: [N, 64]."""

    def __init__(self, channels, resolution, classes):
        super().__init__()
        if channels == 1:
            stride = 1 if resolution < 16 else 2
            self.conv1 = nn.Conv2d(channels, 32, 5, stride, padding=2)
            self.conv2 = nn.Conv2d(32, 64, 3, 2, padding=1)
            side = -(-resolution // (2 * stride))
            self.hidden = nn.Linear(64 * side**2, 64)
        else:
            self.conv1, self.conv2 = (self.block(a, b) for a, b in ((channels, 32), (32, 64)))
            self.conv2.append(self.block(64, 128))
            self.hidden = nn.Linear(128 * (resolution // 8) ** 2, 64)
        self.out = nn.Linear(64, classes)

    @staticmethod
    def block(cin, cout):
        return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(), nn.MaxPool2d(2))

    def features(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x):
        return self.out(F.dropout(self.features(x), 0.3, self.training))


def train(dataset, images, seed=0, batch=100, device="cpu"):
    """A trained `Classifier`. Coloured images are mirrored and shifted by up to 4 pixels."""
    torch.manual_seed(training.seed_of(seed, "classifier"))
    net = Classifier(dataset.channels, dataset.resolution, dataset.label_dim).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, images // batch)
    batches = data.Batches(dataset, training.Runtime(torch.device("cpu"), batch=batch), seed)
    for _ in range(images // batch):
        raw, labels = next(batches)
        x = dataset.to_model(raw, "cpu").to(device)
        if dataset.channels > 1:
            (dy, dx), flip = torch.randint(9, (2,)).tolist(), torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            x = F.pad(torch.where(flip, x.flip(3), x), (4, 4, 4, 4))[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
        F.cross_entropy(net(x), labels.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval().requires_grad_(False)


def load(dataset, images=None, device="cpu"):
    """The classifier of a labelled data set on `device`, from the cache folder if it was trained before."""
    if not dataset.label_dim:
        raise files.UserError(f"{dataset.name}: has no labels, and a classifier needs them")
    images = images or max(100_000, (4 if dataset.channels == 1 else 6) * len(dataset))
    labels = hashlib.sha256(dataset.labels.tobytes()).hexdigest()
    key = hashlib.sha256(f"{VERSION} {images} {dataset.fingerprint()} {labels}".encode()).hexdigest()[:16]
    path = files.cache_dir() / "classifiers" / f"{key}.pt"
    if not path.exists():
        files.save_checkpoint({"kind": "classifier", "state": train(dataset, images, device=device).state_dict()}, path)
    net = Classifier(dataset.channels, dataset.resolution, dataset.label_dim).to(device).eval().requires_grad_(False)
    with files.reading(path, "a classifier", "delete it and it is trained again"):
        net.load_state_dict(files.load_checkpoint(path)["state"])
    return net


@torch.no_grad()
def predict(net, images):
    """Classes int64 [N] of uint8 images [N, H, W, C]."""
    x = torch.tensor(images).permute(0, 3, 1, 2)  # a copy, as a data set may be read-only
    parts = x.to(net.out.weight.device).split(500)
    return torch.cat([net(part / 127.5 - 1).argmax(dim=1) for part in parts]).cpu().numpy()


def extractor(net, dataset):
    """The features of the classifier of `dataset` for the distances of fid.py."""
    def function(images):
        return net.features(images.permute(0, 3, 1, 2) / 127.5 - 1), None

    name, size = f"the classifier of {dataset.name}", net.hidden.out_features
    shape, device = dataset.images.shape[1:], net.out.weight.device
    # Not for `fid.reference_statistics`: this tag does not tell the weights.
    return fid.Extractor(name, name, size, shape, device, function)
