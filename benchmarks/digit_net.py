"""The network of skada-bench's MNIST and USPS experiments, for images as ``adaptation.py`` writes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SCALE = 0.5
"""Grey values are stored at half their size: USPS, brought to MNIST's scale, has room above."""
MEAN, STD = 0.1307, 0.3081
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Grey(nn.Module):
    """tldist's normalised colour input to one channel, standardised as MNIST is."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images[:, :1] * _IMAGENET[1][0] + _IMAGENET[0][0]
        return (pixels / SCALE - MEAN) / STD


class _Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout, self.fc = nn.Dropout(0.25), nn.Linear(9216, 128)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.second(torch.relu(self.first(images))))
        return torch.relu(self.fc(torch.flatten(self.dropout(nn.functional.max_pool2d(maps, 2)), 1)))


def shallow_conv_net(num_classes: int) -> nn.Module:
    """Two convolutions, a layer of 128, a head; 28 pixels."""
    return nn.Sequential(_Grey(), _Features(), nn.Dropout(0.5), nn.Linear(128, num_classes))
