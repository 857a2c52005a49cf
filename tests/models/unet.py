"""A U-Net as segmentation code has it: double convolutions, skips by concatenation, odd sizes."""

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F


class DoubleConv(nn.Module):
    """(conv => norm => ReLU) * 2"""

    def __init__(self, in_channels, out_channels, mid_channels=None, norm=nn.BatchNorm2d):
        super().__init__()
        mid_channels = mid_channels or out_channels
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=1, bias=False),
            norm(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False),
            norm(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, in_channels, out_channels, norm):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.conv = DoubleConv(in_channels, out_channels, norm=norm)

    def forward(self, x):
        return self.conv(self.pool(x))


class Up(nn.Module):
    """Upsample, bring to the size of the skip connection, concatenate, convolve."""

    def __init__(self, in_channels, out_channels, norm, bilinear=False, crop=False):
        super().__init__()
        self.crop = crop
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            width = in_channels + out_channels
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            width = in_channels // 2 + out_channels
        self.conv = DoubleConv(width, out_channels, norm=norm)

    def forward(self, x, skip):
        x = self.up(x)
        if self.crop:
            dy = (skip.size(2) - x.size(2)) // 2
            dx = (skip.size(3) - x.size(3)) // 2
            skip = skip[:, :, dy : dy + x.size(2), dx : dx + x.size(3)]
        else:
            dy = skip.size()[2] - x.size()[2]
            dx = skip.size()[3] - x.size()[3]
            x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """Logits at the input's size (of the cropped sizes with `crop`)."""

    def __init__(
        self, n_channels=3, n_classes=4, base=16, depth=3, norm="batch", bilinear=False, crop=False
    ):
        super().__init__()
        layer = {
            "batch": nn.BatchNorm2d,
            "instance": lambda width: nn.InstanceNorm2d(width, affine=True),
        }[norm]
        self.n_classes = n_classes
        widths = [base * 2**i for i in range(depth + 1)]
        self.inc = DoubleConv(n_channels, base, norm=layer)
        self.downs = nn.ModuleList(Down(a, b, layer) for a, b in pairwise(widths))
        self.ups = nn.ModuleList(
            Up(b, a, layer, bilinear, crop) for a, b in reversed(list(pairwise(widths)))
        )
        self.outc = nn.Conv2d(base, n_classes, kernel_size=1)

    def forward(self, x):
        skips = []
        x = self.inc(x)
        for down in self.downs:
            skips.append(x)
            x = down(x)
        for up in self.ups:
            x = up(x, skips.pop())
        return self.outc(x)
