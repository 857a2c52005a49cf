"""A one-stage detector on a feature pyramid; one head runs on all levels, as in RetinaNet."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return F.relu(out)


class Backbone(nn.Module):
    def __init__(self, widths=(16, 32, 48, 64)):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 7, 2, 3, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            self.stages.append(
                nn.Sequential(
                    BasicBlock(before, width, 1 if i == 0 else 2), BasicBlock(width, width)
                )
            )
        self.channels = list(widths[1:])

    def forward(self, x):
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return tuple(features[1:])


class FPN(nn.Module):
    """Lateral 1x1, top-down nearest interpolation to the size of the finer level, 3x3 on each."""

    def __init__(self, in_channels, out_channels=32):
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels
        )
        self.p6 = nn.Conv2d(in_channels[-1], out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)

    def forward(self, inputs):
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            size = laterals[i - 1].shape[-2:]
            laterals[i - 1] = laterals[i - 1] + F.interpolate(
                laterals[i], size=size, mode="nearest"
            )
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]
        p6 = self.p6(inputs[-1])
        outs.append(p6)
        outs.append(self.p7(F.relu(p6)))
        return outs


class Scale(nn.Module):
    def __init__(self, value=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return x * self.scale


class Head(nn.Module):
    """Class and box towers whose weights all levels share; a learned scale for each level."""

    def __init__(self, channels=32, num_anchors=3, num_classes=5, levels=5, depth=2):
        super().__init__()
        self.num_anchors, self.num_classes = num_anchors, num_classes
        cls, box = [], []
        for _ in range(depth):
            cls += [nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU(inplace=True)]
            box += [nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU(inplace=True)]
        self.cls_tower, self.box_tower = nn.Sequential(*cls), nn.Sequential(*box)
        self.cls_logits = nn.Conv2d(channels, num_anchors * num_classes, 3, 1, 1)
        self.bbox_pred = nn.Conv2d(channels, num_anchors * 4, 3, 1, 1)
        self.scales = nn.ModuleList(Scale(1.0 + 0.1 * i) for i in range(levels))
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, features):
        all_logits, all_boxes = [], []
        for scale, x in zip(self.scales, features, strict=True):
            logits = self.cls_logits(self.cls_tower(x))
            boxes = scale(self.bbox_pred(self.box_tower(x)))
            n, _, h, w = logits.shape
            logits = logits.view(n, -1, self.num_classes, h, w).permute(0, 3, 4, 1, 2)
            all_logits.append(logits.reshape(n, -1, self.num_classes))
            boxes = boxes.view(n, -1, 4, h, w).permute(0, 3, 4, 1, 2)
            all_boxes.append(boxes.reshape(n, -1, 4))
        return torch.cat(all_logits, dim=1), torch.cat(all_boxes, dim=1)


class Detector(nn.Module):
    """Class logits [n, anchors, classes] and box offsets [n, anchors, 4] over all levels."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.backbone = Backbone()
        self.neck = FPN(self.backbone.channels)
        self.head = Head(num_classes=num_classes)

    def forward(self, images):
        logits, boxes = self.head(self.neck(self.backbone(images)))
        return {"logits": logits, "boxes": boxes}
