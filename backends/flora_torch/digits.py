"""A real fine-tuning that takes seconds: handwritten digits, the same digits shifted, and a small network.

The demonstration and the notebooks decompose the change that this fine-tuning makes. Everything is drawn from a seed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Digits", "DigitsNet", "accuracy", "digits", "predict", "shifted", "train"]

_CANVAS = 12
_REACH = 2  # how far a shifted digit is moved, at most
_N_TRAIN = 1200


@dataclass(frozen=True, eq=False)
class Digits:
    """Images and labels, to train on and held out.

    Parameters
    ----------
    train, test : Tensor of shape (n, 1, 12, 12)
        Images, gray values from 0 to 1.
    train_labels, test_labels : Tensor of shape (n,)
        The digit on each.

    References
    ----------
    Alpaydin and Kaynak, *Optical recognition of handwritten digits*, UCI Machine Learning Repository (1998).
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits(seed: int = 0) -> Digits:
    """Load scikit-learn's 1,797 digits, 8×8, in the middle of a 12×12 canvas: 1,200 to train on, 597 held out.

    Parameters
    ----------
    seed : int
        What the division is drawn from.

    Returns
    -------
    Digits
        The base task.

    References
    ----------
    Alpaydin and Kaynak, *Optical recognition of handwritten digits*, UCI Machine Learning Repository (1998).

    Examples
    --------
    >>> task = digits()
    >>> tuple(task.train.shape), tuple(task.test.shape)
    ((1200, 1, 12, 12), (597, 1, 12, 12))
    """
    loaded: Any = load_digits()
    images = torch.from_numpy(np.asarray(loaded.images, dtype=np.float32) / 16.0)[:, None]
    images = functional.pad(images, ((_CANVAS - images.shape[-1]) // 2,) * 4)
    labels = torch.from_numpy(np.asarray(loaded.target, dtype=np.int64))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    first, rest = order[:_N_TRAIN], order[_N_TRAIN:]
    return Digits(images[first], labels[first], images[rest], labels[rest])


def shifted(task: Digits, seed: int = 0) -> Digits:
    """Make another task of the same digits: each is moved by up to two pixels, blurred and inverted.

    Parameters
    ----------
    task : Digits
        The base task.
    seed : int
        What the translations are drawn from.

    Returns
    -------
    Digits
        The same labels in the same order, other images.

    References
    ----------
    Hendrycks and Dietterich, *Benchmarking neural network robustness to common corruptions and perturbations*, ICLR
    2019, for shifts of this kind.

    Examples
    --------
    >>> moved = shifted(digits())
    >>> round(float(moved.test.max()), 3), bool(moved.test.mean() > digits().test.mean())
    (1.0, True)
    """
    rng = np.random.default_rng(seed)
    return Digits(_shifted(task.train, rng), task.train_labels, _shifted(task.test, rng), task.test_labels)


def _shifted(images: Tensor, rng: np.random.Generator) -> Tensor:
    offsets = rng.integers(0, 2 * _REACH + 1, size=(len(images), 2))
    wide = functional.pad(images, (_REACH,) * 4)
    moved = [image[:, y : y + _CANVAS, x : x + _CANVAS] for image, (y, x) in zip(wide, offsets.tolist())]
    kernel = torch.tensor([1.0, 2.0, 1.0])
    blur = (kernel[:, None] * kernel / 16.0)[None, None]
    return 1.0 - functional.conv2d(torch.stack(moved), blur, padding=1)


class DigitsNet(nn.Module):
    """A convolutional network with 5×5 and 3×3 kernels; 12×12 images in, ten scores out.

    Parameters
    ----------
    width : int
        The channels of its convolutions.
    seed : int
        What the weights are drawn from; the global generator is left as it was.

    References
    ----------
    LeCun, Bottou, Bengio and Haffner, *Gradient-based learning applied to document recognition* (1998).

    Examples
    --------
    >>> sum(p.numel() for p in DigitsNet().parameters())
    38602
    """

    def __init__(self, width: int = 32, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(1, width, 5, padding=2)
            self.middle = nn.Conv2d(width, width, 5, padding=2)
            self.top = nn.Conv2d(width, width, 3, padding=1)
            self.head = nn.Linear(9 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Score images.

        Parameters
        ----------
        images : Tensor of shape (n, 1, 12, 12)
            The images.

        Returns
        -------
        Tensor of shape (n, 10)
            A score for each digit.
        """
        # Shapes: (n, 1, 12, 12), (n, width, 6, 6), (n, width, 3, 3), (n, 10).
        x = functional.max_pool2d(functional.relu(self.stem(images - 0.5)), 2)
        x = functional.max_pool2d(functional.relu(self.middle(x)), 2)
        return self.head(functional.relu(self.top(x)).flatten(1))


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    parameters: Iterable[nn.Parameter] | None = None,
    seed: int = 0,
) -> list[float]:
    """Train a classifier by Adam with a cosine schedule, on batches of 50.

    Parameters
    ----------
    model : nn.Module
        The model, changed in place.
    images : Tensor of shape (n, …)
        What it is trained on.
    labels : Tensor of shape (n,)
        The right classes.
    epochs : int
        How often each image is seen.
    learning_rate : float
        Where the schedule starts.
    parameters : iterable of nn.Parameter, optional
        What is trained; by default all that the model has.
    seed : int
        What the order of the images is drawn from.

    Returns
    -------
    list of float
        The mean loss of each epoch.

    References
    ----------
    Kingma and Ba, *Adam: a method for stochastic optimization*, ICLR 2015.

    Examples
    --------
    >>> task, model = digits(), DigitsNet(4)
    >>> losses = train(model, task.train, task.train_labels, epochs=2, learning_rate=3e-3)
    >>> losses[1] < losses[0]
    True
    """
    optimizer = torch.optim.Adam(list(model.parameters() if parameters is None else parameters), learning_rate)
    n_batches = math.ceil(len(images) / 50)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * n_batches))
    generator = torch.Generator().manual_seed(seed)
    history: list[float] = []
    model.train()
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images), generator=generator).split(50):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        history.append(total / len(images))
    model.eval()
    return history


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Score images without recording gradients.

    Parameters
    ----------
    model : nn.Module
        A classifier.
    images : Tensor of shape (n, …)
        The images.

    Returns
    -------
    Tensor of shape (n, classes)
        The scores.

    References
    ----------
    LeCun, Bottou, Bengio and Haffner, *Gradient-based learning applied to document recognition* (1998).

    Examples
    --------
    >>> predict(DigitsNet(4), digits().test).shape
    torch.Size([597, 10])
    """
    with torch.inference_mode():
        return model(images)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose best score is the right one.

    Parameters
    ----------
    model : nn.Module
        A classifier.
    images : Tensor of shape (n, …)
        The images.
    labels : Tensor of shape (n,)
        The right classes.

    Returns
    -------
    float
        From 0 to 1.

    References
    ----------
    LeCun, Bottou, Bengio and Haffner, *Gradient-based learning applied to document recognition* (1998).

    Examples
    --------
    >>> task = digits()
    >>> 0.0 <= accuracy(DigitsNet(4), task.test, task.test_labels) < 0.5
    True
    """
    return float((predict(model, images).argmax(-1) == labels).float().mean())
